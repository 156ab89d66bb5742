"""What `plan` says before a run is what the run then shows."""

import json
from pathlib import Path

import pytest

from reinforce.__main__ import app
from reinforce.check.plan import plan
from reinforce.config import Recipe, RunOptions
from reinforce.errors import ConfigError, ManifestMismatch, ShardError
from reinforce.run import driver
from reinforce.store.objects import Objects
from tests import tiny
from tests.processes import here

OPTIONS = RunOptions(workers="0", device="cpu", extend=True)


@pytest.fixture
def tars(tmp_path: Path) -> str:
    return "::".join(tiny.tar(tmp_path / f"in/{i:05d}.tar", 40, seed=i) for i in range(3))


def test_bytes_and_samples_are_those_of_the_run(recipe: Recipe, tars: str, tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    found = plan(tars, url, recipe, OPTIONS)
    assert not Path(url).exists()
    assert (found.shards, found.shards_todo, found.samples_todo, found.bytes_now) == (3, 3, 120, 0)
    assert found.hours == pytest.approx(120 * found.seconds_per_sample / 3600)
    assert found.hours_of_all == pytest.approx(found.hours + found.load_seconds / 3600)
    assert sum(of["share"] for of in found.stages.values()) == pytest.approx(1)
    assert list(found.stages) == ["vit, 3 views", "vit, 3 texts", "conv, 3 views", "conv, 3 texts", "coca, 2 captions"]
    report = driver.run(tars, url, recipe, OPTIONS)
    root = Objects(url).size("zarr.json")
    assert found.bytes == pytest.approx(Objects(url).total_bytes("") - root, rel=0.02)
    assert 120 * found.seconds_per_sample < 3 * report.seconds
    after = plan(tars, url, recipe, OPTIONS)
    assert (after.shards_todo, after.hours, after.measured_on) == (0, 0.0, "nothing to do")
    assert after.bytes == after.bytes_now == Objects(url).total_bytes("")


def test_what_a_store_has_already_costs_nothing(recipe: Recipe, tars: str, tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    driver.run(tars, url, recipe.but(teachers={"vit": recipe.teachers["vit"]}, captioners={}), OPTIONS)
    found = plan(tars, url, recipe.but(captioners={}), OPTIONS)
    assert list(found.stages) == ["conv, 3 views", "conv, 1 texts"]
    before = tiny.tree(url)
    driver.run(tars, url, recipe.but(captioners={}), OPTIONS)
    added = {name for name in tiny.tree(url).keys() - before.keys() if "manifest" not in name}
    grown = sum(Objects(url).size(name) for name in added)
    assert found.bytes - found.bytes_now == pytest.approx(grown, rel=0.15)  # groups' metadata are there already


def test_a_card_that_is_not_here_is_reckoned_by_flops(recipe: Recipe, tars: str, tmp_path: Path) -> None:
    slow, fast = (plan(tars, str(tmp_path / "s"), recipe, OPTIONS, card) for card in ("L4", "H100"))
    assert slow.hours / fast.hours == pytest.approx(989 / 121)
    assert fast.measured_on == "H100, by FLOPs at 45% of its rate"
    measured = plan(tars, str(tmp_path / "s"), recipe, OPTIONS)
    assert measured.stages["vit, 3 views"]["tflop"] == pytest.approx(fast.stages["vit, 3 views"]["tflop"])
    with pytest.raises(ConfigError, match="no figures of a card 'H1000'; there are those of A100, H100"):
        plan(tars, str(tmp_path / "s"), recipe, OPTIONS, "H1000")


def test_the_command(recipe: Recipe, tars: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(recipe.model_dump_json())
    asked = [tars, "--store", str(tmp_path / "s"), "--recipe", str(tmp_path / "r.json"), "--device", "cpu"]
    code, out, err = here(app, "plan", *asked, "--workers", "2", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["samples_todo"] == 120
    assert told["hours_of_all"] == pytest.approx(told["hours"] / 2 + told["load_seconds"] / 3600)
    driver.run(tars, str(tmp_path / "s"), recipe, OPTIONS)
    code, _, err = here(app, "plan", *asked, "--set", "seed=4")
    assert code == 2 and "recipe.seed: the store has 0" in err


def test_a_tar_that_is_not_there_gets_a_sentence(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"memory://none/0.tar: cannot be read"):
        plan("memory://none/0.tar", str(tmp_path / "s"), recipe, OPTIONS)


def test_a_recipe_that_does_not_fit_is_an_error(recipe: Recipe, tars: str, tmp_path: Path) -> None:
    driver.run(tars, str(tmp_path / "s"), recipe, OPTIONS)
    with pytest.raises(ManifestMismatch):
        plan(tars, str(tmp_path / "s"), recipe.but(seed=3), OPTIONS)
