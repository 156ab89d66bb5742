import json
from pathlib import Path

import pytest

from reinforce.config import Recipe, RunOptions, ViewSet, parse
from reinforce.errors import ConfigError
from reinforce.recipes import load_recipe

RECIPES = ["sample", "datacompdr_12m", "datacompdr_1b", "mobileclip2"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_and_survive_json(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / "r.json").write_text(recipe.model_dump_json())
    assert load_recipe(str(tmp_path / "r.json")) == recipe


def test_what_a_saved_recipe_leaves_out_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text('{"name": "few", "teachers": {"a": {"model": "x"}}, "captioners": {}}')
    recipe = load_recipe(str(tmp_path / "few.json"), ["seed=3", "teachers.a.prompts=p"])
    assert recipe.seed == 3 and recipe.teachers["a"].prompts == "p"


def test_published_numbers() -> None:
    """FACTS 1.1 to 1.3: 30 or 10 views, 5 captions, two teachers, nucleus sampling at 0.9, length 30, at least 5."""
    recipe = load_recipe("datacompdr_12m")
    assert recipe.view_sets["base"] == ViewSet(num_views=30, view_px=224, scale=(0.08, 1), num_ops=2, magnitude=9)
    assert [(t.model, t.pretrained) for t in recipe.teachers.values()] == [
        ("ViT-L-14-quickgelu", "openai"),
        ("ViT-L-14", "datacomp_xl_s13b_b90k"),
    ]
    coca = recipe.captioners["coca"]
    assert (coca.num_captions, coca.sampling, coca.top_p, coca.temperature) == (5, "top_p", 0.9, 1)
    assert (coca.max_tokens, coca.min_tokens) == (30, 5)
    assert load_recipe("datacompdr_1b").view_sets["base"].num_views == 10


def test_overrides_reach_the_leaf() -> None:
    recipe = load_recipe("sample", ["view_sets.base.num_views=7", "teachers.vit.precision=bf16", "seed=3"])
    assert (recipe.view_sets["base"].num_views, recipe.teachers["vit"].precision, recipe.seed) == (7, "bf16", 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", "no key 'sed'; did you mean seed"),
        ("teachers.vti.precision=bf16", "no key 'vti'; did you mean vit"),
        ("view_sets.base.num_view=3", "did you mean num_views"),
        ("seed", "dotted.key=value"),
        ("seed.x=1", "no key 'x'"),
        ("view_sets.base.num_views=0", "view_sets.base.num_views: Input should be greater than or equal to 1"),
        ("view_sets.base.magnitude=31", "magnitude"),
        ("view_sets.base.scale=[0.5,0.2]", "must rise"),
        ("view_sets.base.ratio=[0,1]", "must rise"),
        ("view_sets.base.ratio=[1,Infinity]", "finite"),
        ("captioners.coca.temperature=1e-320", "greater than or equal to 0.001"),
        ("teachers.vit.precision=fp8", "teachers.vit.precision: Input should be 'auto', 'fp32' or 'bf16'"),
    ],
)
def test_wrong_overrides_get_a_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("sample", [override])


def test_wrong_recipes_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean sample"):
        load_recipe("sampel")
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_recipe(str(tmp_path / "broken.json"))
    tree = load_recipe("sample").model_dump(mode="json")
    tree["view_sets"]["base"]["num_veiws"] = 3
    (tmp_path / "unknown.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"view_sets.base.num_veiws: unknown key; did you mean num_views"):
        load_recipe(str(tmp_path / "unknown.json"))


@pytest.mark.parametrize("name", ["augment", "caption", "a/b", "", "..", "original"])
def test_names_that_cannot_be_columns(name: str) -> None:
    tree = load_recipe("sample").model_dump(mode="json")
    tree["teachers"] = {name: {"model": "ViT-B-32"}}
    with pytest.raises(ConfigError, match="cannot name a column"):
        parse(Recipe, tree, "recipe")


def test_run_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_invalid"):
        parse(RunOptions, {"max_invalid": 2}, "the request")
