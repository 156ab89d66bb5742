"""What a user types and sees: exit codes, sentences on stderr, exactly one JSON object on stdout."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from reinforce.__main__ import app
from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from reinforce.terminal import show
from tests import tiny
from tests.processes import here, python_m


def reinforce(*arguments: str) -> tuple[int, str, str]:
    return here(app, *arguments)


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Shards, store and recipe file of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    tar = tiny.tar(folder / "00000.tar", 6, 1)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    driver.run(tar, str(folder / "s"), recipe, RunOptions(workers="0", device="cpu", max_invalid=0.5))
    return tar, str(folder / "s"), str(folder / "recipe.json")


@pytest.mark.heavy
def test_in_a_process_of_its_own_it_is_the_same(made: tuple[str, str, str]) -> None:
    _, store, _ = made
    for arguments in (["info", store, "--json"], ["info", store, "--quarantine"], ["info", f"{store}/none"]):
        assert python_m("reinforce", *arguments) == reinforce(*arguments)


def test_info(made: tuple[str, str, str]) -> None:
    _tar, store, _ = made
    code, out, _ = reinforce("info", store, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["format_version"], told["shards"], told["samples"], told["valid"]) == (2, 1, 7, 6)
    assert sum(told["quarantined"].values()) == 1
    assert told["view_sets"] == {"base": {"views": 3, "teachers": ["vit", "conv"]}}
    assert told["text_sets"]["coca"] == {"captions": 2, "teachers": ["vit", "conv"]}
    # 3 views and 1 + 2 captions of 7 rows, 16 + 24 numbers of 2 bytes each
    assert told["bytes"]["embeddings_raw"] == (3 + 3) * 7 * (16 + 24) * 2
    assert told["missing_columns"] == []
    code, out, _ = reinforce("info", store, "--quarantine")
    assert code == 0 and "00000-0-bad0" in out


def test_verify_with_replay(made: tuple[str, str, str]) -> None:
    tar, store, _ = made
    code, out, _ = reinforce("verify", store, "--shards", tar, "--replay", "9", "--json", "--device", "cpu")
    told = json.loads(out)
    assert code == 0
    assert (told["corrupt"], told["missing"]) == ([], [])
    assert told["replay"]["views"] == told["replay"]["pixel_equal"] == 9
    assert told["replay"]["cosine_min"] > 0.999


def test_verify_finds_faults_and_says_so_by_its_exit_code(
    made: tuple[str, str, str], recipe: Recipe, tmp_path: Path
) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    driver.run(tar, str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    (tmp_path / "s/00000/view/base/conv/c.0.0.0").unlink()
    (tmp_path / "s/00000/text/coca/vit/zarr.json").unlink()
    code, out, _ = reinforce("verify", str(tmp_path / "s"), "--json")
    told = json.loads(out)
    assert code == 1
    assert told["missing"] == ["00000/text/coca/vit"]
    assert len(told["corrupt"]) == 1 and told["corrupt"][0].startswith("00000/view/base/conv: ")


def test_run_again_says_that_all_is_there(made: tuple[str, str, str]) -> None:
    tar, store, recipe = made
    code, out, _ = reinforce("run", tar, "--store", store, "--recipe", recipe)
    assert code == 0 and "nothing to do" in out
    code, out, _ = reinforce("run", tar, "--store", store, "--recipe", recipe, "--json")
    assert code == 0 and json.loads(out)["already_there"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "seed=1"], "recipe.seed: the store has 0, this run asks for 1"),
        (["--set", "view_sets.base.num_views=5"], "recipe.view_sets.base.num_views: the store has 3"),
        (["--set", "teachers.vit.model=ViT-B-32"], "neither a file nor a tag"),
        (["--set", "sead=1"], "did you mean seed"),
        (["--workers", "many"], "--workers many"),
        (["--max-invalid", "7"], "max_invalid"),
    ],
)
def test_a_wrong_request_is_exit_2_with_a_sentence_and_changes_nothing(
    made: tuple[str, str, str], arguments: list[str], told: str
) -> None:
    tar, store, recipe = made
    before = tiny.tree(store)
    code, out, err = reinforce("run", tar, "--store", store, "--recipe", recipe, *arguments)
    assert (code, out) == (2, "")
    assert told in err and "Traceback" not in err
    assert tiny.tree(store) == before


def test_other_wrong_requests(made: tuple[str, str, str], tmp_path: Path) -> None:
    tar, store, _recipe = made
    for arguments, told in [
        (["run", str(tmp_path / "none.tar"), "--store", str(tmp_path / "s"), "--recipe", "sample"], "none.tar"),
        (["run", tar, "--store", str(tmp_path / "s")], "name a recipe with --recipe: one of these"),
        (["run", tar, "--store", str(tmp_path / "s"), "--recipe", ""], "the recipe has no name"),
        (["run", tar, "--store", str(tmp_path / "s"), "--recipe", "sampel"], "did you mean sample"),
        (["info", str(tmp_path / "s")], "no store at"),
        (["verify", store, "--replay", "3"], "--shards"),
    ]:
        code, _, err = reinforce(*arguments)
        assert code == 2 and told in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_failed_shards_are_exit_1_and_in_the_table(made: tuple[str, str, str], tmp_path: Path) -> None:
    _, _, recipe = made
    (tmp_path / "cut.tar").write_bytes(b"\0" * 100)
    arguments = ["run", str(tmp_path / "cut.tar"), "--store", str(tmp_path / "s"), "--recipe", recipe, "--workers", "0"]
    code, out, _ = reinforce(*arguments)
    assert code == 1 and "cut.tar" in out
    code, out, _ = reinforce(*arguments, "--json")
    assert code == 1 and json.loads(out)["failed"][0]["shard"] == "cut"


def test_tars_that_a_shell_has_expanded(made: tuple[str, str, str], tmp_path: Path) -> None:
    """Several words are several tars. What is bad is told with its first sample, and a store that is not there cannot
    be extended."""
    _, _, recipe = made
    tars = [tiny.tar(tmp_path / f"{i}.tar", 4, i, seed=i) for i in range(2)]
    arguments = [*tars, "--store", str(tmp_path / "s"), "--recipe", recipe, "--workers", "0", "--max-invalid", "0.5"]
    code, out, err = reinforce("extend", *arguments)
    assert code == 2 and f"there is no store at {tmp_path / 's'} to extend" in err
    code, out, _ = reinforce("run", *arguments)
    assert code == 0 and "2 of 2 shards reinforced" in out and re.search(r"\nBad:    1 \w+, as \w+", out)


def test_recipes_are_listed_and_printed(tmp_path: Path) -> None:
    code, out, _ = reinforce("recipes", "--json")
    assert code == 0 and set(json.loads(out)) == {"datacompdr_12m", "datacompdr_1b", "mobileclip2", "sample"}
    code, out, _ = reinforce("recipe", "sample", "--set", "seed=4")
    assert code == 0 and Recipe.model_validate_json(out).seed == 4
    (tmp_path / "mine.json").write_text(out)
    assert reinforce("recipe", str(tmp_path / "mine.json"))[1] == out


def test_the_version() -> None:
    assert reinforce("--version")[1] == f"clip-reinforce {version('clip-reinforce')}\n"


def test_help_explains_every_option() -> None:
    for command in ("run", "info", "verify"):
        code, out, _ = reinforce(command, "--help")
        assert code == 0 and "--json" in out


def test_what_comes_next_may_take_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show({"sound": False}, False, "first a\n       then b")
    assert capsys.readouterr().out == "sound: False\nNext:  first a\n       then b\n"
