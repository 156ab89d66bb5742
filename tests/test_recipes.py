"""Recipes: how they are found, what is said of broken ones, and the published ones at full architecture with random
weights: shapes, memory and code paths."""

import ast
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reinforce.check.info import info
from reinforce.check.verify import verify
from reinforce.config import Config, RunOptions
from reinforce.errors import ConfigError
from reinforce.recipes import FOLDER, listed, load_recipe
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny
from train.comkd.adapt import load_adaptation
from train.config import load_training


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["datacompdr_12m", "datacompdr_1b", "mobileclip2"])
def test_full_size_on_a_few_images(name: str, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 2)
    # One view of many, to stay within minutes on two cores; everything else as published.
    recipe = load_recipe(name, ["weights=random", "batch_size=2", "cpu_threads=2", "view_sets.base.num_views=2"])
    report = driver.run(tar, str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    assert (report.done, report.valid) == (1, 2)
    store = Store(str(tmp_path / "s"))
    for teacher in recipe.teachers:
        assert store.read("00000", f"view/base/{teacher}").shape == (2, 2, 768)
        assert store.read("00000", f"text/coca/{teacher}").shape == (5, 2, 768)
    assert store.read("00000", "text/coca/caption").shape == (5, 2)
    assert np.isfinite(store.read("00000", "view/base/augment")).all()
    manifest = store.manifest()
    assert manifest and all(m["weights"] == "random" for kind in manifest.models.values() for m in kind.values())
    assert info(str(tmp_path / "s"))["weights"] == "random"
    doubt = verify(str(tmp_path / "s"), tar, 2, "cpu")
    assert doubt.sound and doubt.replay and doubt.replay["cosine_min"] >= 0.999


def test_openai_weights_need_quickgelu(tmp_path: Path) -> None:
    """Under open_clip's plain ViT-L-14 they would only warn, and be another teacher."""
    tar = tiny.tar(tmp_path / "00000.tar", 1)
    recipe = load_recipe("datacompdr_12m", ["weights=random", "teachers.openai.model=ViT-L-14"])
    with pytest.raises(ConfigError, match="ViT-L-14-quickgelu,openai"):
        driver.run(tar, str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teachers.openai.model=ViT-L-41", "open_clip has no model 'ViT-L-41'"),
        ("teachers.openai.pretrained=openia", "neither a file nor a tag; tags: openai"),
        ("teachers.openai.pretrained=/none/weights.pt", "neither a file nor a tag"),
    ],
)
def test_models_that_do_not_exist_get_a_sentence(tmp_path: Path, override: str, told: str) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 1)
    with pytest.raises(ConfigError, match=told):
        driver.run(
            tar, str(tmp_path / "s"), load_recipe("datacompdr_12m", [override]), RunOptions(workers="0", device="cpu")
        )


NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_by_name_and_by_path_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(FOLDER / f"{name}.py", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    loaders: dict[str, Callable[[str], Config]] = {
        "RECIPE": load_recipe,
        "TRAINING": load_training,
        "ADAPTATION": load_adaptation,
    }
    held = [constant for constant in loaders if name in listed(constant)]
    assert "TRAINING" in held
    for constant in held:
        assert loaders[constant](name) == loaders[constant]("./mine.py") == loaders[constant](str(tmp_path / "mine.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_its_command_and_its_machine(name: str) -> None:
    said = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert said.partition("\n")[0].endswith((".", "?")) and "\nCommand: " in said and "\nMachine: " in said


def test_a_recipe_may_take_that_of_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from pipelines.datacompdr_12m import RECIPE, TRAINING\n")
    assert load_recipe(str(mine)) == load_recipe("datacompdr_12m")
    assert load_training(str(mine)) == load_training("datacompdr_12m")
    mine.write_text("from pipelines.datacompdr_12m import RECIPE as OTHER\n\nRECIPE: object = OTHER.but(name='mine')\n")
    assert load_recipe(str(mine)) == load_recipe("datacompdr_12m").but(name="mine")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("TRAINING = {'studnet': 'vit_tiny', 'lr': 1e-3}", "studnet: unknown key; did you mean student"),
        ("TRAINING = {'comkd': {'class_sett': 'x'}}", "comkd.class_sett: unknown key; did you mean class_set"),
        ("TRAINING = {'steps': 0}", "steps: Input should be greater than or equal to 1"),
        ("TRAINING = {'lr': float('inf')}", "lr: Input should be a finite number"),
        ("TRAINING = {'wd': float('inf')}", "wd: Input should be a finite number"),
        ("TRAINING = {'comkd': {'class_set': 'x', 'kl': float('inf')}}", "comkd.kl: Input should be a finite number"),
        ("TRAINING = {'data': [{'shards': 'x', 'weight': float('inf')}]}", "weight: Input should be a finite number"),
        ("TRAINING = {'seed': 2**63}", "seed: Input should be less than or equal to 9223372036854775807"),
        ("TRAINING = ['steps']", "valid dictionary"),
        ("RECIPE = 1", "mine.py has no TRAINING"),
    ],
)
def test_wrong_settings_of_a_training_get_a_sentence(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_training(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\nRECIPE = = 3", "mine.py, line 2: SyntaxError: invalid syntax"),
        ("x = 1\n\nRECIPE = Recip(name='mine')", "mine.py, line 3: NameError: name 'Recip' is not defined"),
        ("def make():\n    return 1 / 0\n\nRECIPE = make()", "mine.py, line 2: ZeroDivisionError"),
        ("import numpi", "mine.py, line 1: ModuleNotFoundError: No module named 'numpi'"),
        ("import sys\nsys.exit('no')", "mine.py, line 2: SystemExit: no"),
        (
            "from reinforce.config import Recipe\nRECIPE = Recipe(name='mine')",
            "mine.py, line 2 is not valid:\n  teachers",
        ),
        ("RECIPE = {'teachers': {'a': {'modell': 'x'}}}", "teachers.a.modell: unknown key; did you mean model?"),
        (
            "from pipelines.sample import RECIPE as OTHER\nRECIPE = OTHER.but(view_set={})",
            "line 2: ConfigError: Recipe.but is not valid:\n  view_set: unknown key; did you mean view_sets?",
        ),
        ("TRAINING = {}", "mine.py has no RECIPE"),
        ("RECIPE = 3", "mine.py is not valid:\n  Input should be a valid dictionary"),
        (None, "mine.py is a folder; give a file"),
    ],
)
def test_a_broken_recipe_gets_a_sentence_with_the_line(text: str | None, told: str, tmp_path: Path) -> None:
    if text is None:
        (tmp_path / "mine.py").mkdir()
    else:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_recipe(str(tmp_path / "mine.py"))


def test_what_is_no_recipe_gets_a_sentence_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("d.json", "samples"):
        (tmp_path / folder).mkdir()
    for file in ("README.md", "mine"):
        (tmp_path / file).write_text("RECIPE = 1")
    for name, told in [
        ("./samples", "recipe ./samples is a folder"),
        ("d.json", "recipe d.json is a folder"),
        ("README.md", "recipe README.md: the name of a recipe's file ends in .py or .json"),
        ("mine", "recipe mine: the name of a recipe's file ends in .py or .json"),
        ("samples", "no recipe of this project is called 'samples'; did you mean sample?"),
        ("./nothing.py", "no such file"),
        ("__main__", "no recipe of this project is called '__main__'"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(told)):
            load_recipe(name)
    with pytest.raises(ConfigError, match="^recipe sample has no ADAPTATION; .*\n  comkd "):
        load_adaptation("sample")


def test_a_name_can_be_added_to_settings_that_go_by_name() -> None:
    assert load_training(None, ["dist_logit_scale.vit=30", "eval_sets.own=x.tar"]).dist_logit_scale == {"vit": 30}
    for override, told in [
        ("dist_logit_scale.vit=0", "dist_logit_scale.vit: Input should be greater than 0"),
        ("dist_logit_scale.vit=NaN", "dist_logit_scale.vit: Input should be"),
        ("fresh_views.vit=1", "no key 'vit'"),
    ]:
        with pytest.raises(ConfigError, match=told):
            load_training(None, [override])


def test_broken_json_of_an_override_is_called_so() -> None:
    for override in ('teachers.x={"model": ', "teachers.x={model: ViT-B-32}", "view_sets.base.scale=[0.1,"):
        with pytest.raises(ConfigError, match=re.escape(f"--set {override}: this is broken JSON (")):
            load_recipe("sample", [override])
    assert load_training("sample", ["shards={00000..00003}.tar"]).shards == "{00000..00003}.tar"


def test_json_that_would_lose_or_crash_something_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for text, told in [
        ('{"teachers": {"a": {"model": "x"}}, "teachers": {}}', "it has the key 'teachers' twice"),
        ('{"name": ' + "[" * 100_000, "is not JSON that can be read"),
        ('{"seed": ' + "1" * 5000 + "}", "is not JSON that can be read"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            load_recipe(str(path))
    for override in ("seed=" + "1" * 5000, 'view_sets.base={"num_views": 1, "num_views": 2}'):
        with pytest.raises(ConfigError):
            load_recipe("sample", [override])
    path.write_text(load_recipe("sample").model_dump_json(), encoding="utf-8-sig")  # with a mark, as Windows writes it
    assert load_recipe(str(path)) == load_recipe("sample")


def test_what_a_recipe_prints_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("from pipelines.sample import RECIPE\nprint('hello')")
    load_recipe(str(tmp_path / "mine.py"))
    assert capsys.readouterr() == ("", "hello\n")


def test_a_recipe_may_import_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base_of_mine.py").write_text("from pipelines.sample import RECIPE\n")
    (tmp_path / "mine.py").write_text("from base_of_mine import RECIPE as BASE\nRECIPE = BASE.but(seed=5)\n")
    before = list(sys.path)
    assert load_recipe(str(tmp_path / "mine.py")).seed == 5 and sys.path == before


def test_a_stores_recipe_as_json_is_no_training(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(load_recipe("sample").model_dump_json())
    with pytest.raises(ConfigError, match="says what a store holds"):
        load_training(str(tmp_path / "mine.json"))
