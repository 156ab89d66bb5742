"""A store grows: a teacher, views, captions and classes are added, and nothing that is there is written again."""

import json
from pathlib import Path

import numpy as np
import pytest

from reinforce.__main__ import app
from reinforce.check.verify import verify
from reinforce.config import Captioner, ClassSet, Recipe, RunOptions, Teacher, ViewSet
from reinforce.errors import ManifestMismatch, StoreError
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here
from train.config import TrainConfig
from train.data.mixture import source_of
from train.data.sources import StoreSource
from train.trainer import fit

RUN = RunOptions(workers="0", device="cpu")
EXTEND = RUN.but(extend=True)


@pytest.fixture
def small(recipe: Recipe, tmp_path: Path) -> tuple[str, str, Recipe]:
    """Tars, and a store with one teacher and no captioner."""
    tars = "::".join(tiny.tar(tmp_path / f"in/{i:05d}.tar", 9, seed=i) for i in range(2))
    few = recipe.but(teachers={"vit": recipe.teachers["vit"]}, captioners={})
    driver.run(tars, str(tmp_path / "s"), few, RUN)
    return tars, str(tmp_path / "s"), few


def larger(few: Recipe, recipe: Recipe) -> Recipe:
    return few.but(
        teachers=few.teachers | {"conv": recipe.teachers["conv"]},
        captioners=recipe.captioners,
        view_sets=few.view_sets | {"more": ViewSet(num_views=2, view_px=40)},
        class_sets={"kinds": ClassSet(classnames=("hat", "shoe"))},
    )


def student(folder: Path) -> str:
    return str(folder / "student") if (folder / "student").exists() else tiny.student(folder / "student")


def training(tars: str, store: str, tmp_path: Path, **settings: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": student(tmp_path), "shards": tars, "store": store, "global_batch_size": 8,
        "streams": 4, "steps": 4, "precision": "fp32", "workers": 0, "report_to": [], "teachers": ["vit"],
        "text_sets": ["original"],
    }  # fmt: skip
    return TrainConfig.model_validate(base | settings)


def test_what_was_there_is_untouched_and_the_rest_is_as_if_written_at_once(
    small: tuple[str, str, Recipe], recipe: Recipe, tmp_path: Path
) -> None:
    tars, store, few = small
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(store).rglob("*") if path.is_file()}
    report = driver.run(tars, store, larger(few, recipe), EXTEND)
    assert (report.done, report.failed) == (2, [])
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert verify(store, tars, 20, "cpu").sound
    driver.run(tars, str(tmp_path / "at_once"), larger(few, recipe), RUN)
    one, other = Store(store), Store(str(tmp_path / "at_once"))
    columns = one.promised().columns()
    assert columns == other.promised().columns() and len(columns) == 5 + 2 + 4 + 4 + 4
    for shard, column in [("00001", c) for c in columns] + [("__classes__", c) for c in one.promised().class_columns()]:
        a, b = (made.read(shard, column) for made in (one, other))
        assert np.array_equal(a, b) or (column.teacher and np.array_equal(a.view(np.uint16), b.view(np.uint16))), column
    again = driver.run(tars, store, larger(few, recipe), EXTEND)
    assert again.already_there == 2 and [p.name for p in Path(store).glob("manifest.*")] == ["manifest.0001.json"]


def test_it_grows_twice(small: tuple[str, str, Recipe], recipe: Recipe) -> None:
    tars, store, few = small
    second = few.but(teachers=few.teachers | {"conv": recipe.teachers["conv"]})
    driver.run(tars, store, second, EXTEND)
    third = second.but(captioners=recipe.captioners)
    driver.run(tars, store, third, EXTEND)
    assert Store(store).manifests == ["zarr.json", "manifest.0001.json", "manifest.0002.json"]
    assert Store(store).promised().parsed_recipe() == third
    assert verify(store, tars, 10, "cpu").sound and not verify(store, tars, 0).foreign
    with pytest.raises(ManifestMismatch, match="recipe.captioners.coca.* this run asks for nothing"):
        driver.run(tars, store, second, EXTEND)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 9}, "recipe.seed: the store has 0"),
        ({"teachers": {"other": None}}, "recipe.teachers.vit.*this run asks for nothing"),
        ({"view_sets": {"base": ViewSet(num_views=4, view_px=40)}}, "recipe.view_sets.base.num_views: the store has 3"),
    ],
)
def test_what_is_promised_cannot_be_changed(
    small: tuple[str, str, Recipe], change: dict[str, object], says: str
) -> None:
    tars, store, few = small
    before = tiny.tree(store)
    if "teachers" in change:
        change = {"teachers": {"other": few.teachers["vit"]}}
    with pytest.raises(ManifestMismatch, match=says):
        driver.run(tars, store, few.but(**change), EXTEND)
    with pytest.raises(ManifestMismatch, match="`clip-reinforce extend` adds"):
        driver.run(tars, store, few.but(captioners={"c": Captioner(model=few.teachers["vit"].model)}), RUN)
    assert tiny.tree(store) == before


def test_students_of_the_old_and_of_the_new_train(
    small: tuple[str, str, Recipe], recipe: Recipe, tmp_path: Path
) -> None:
    """A training that rests goes on although the store has grown meanwhile, and ends in the same weights."""
    tars, store, few = small
    old = training(tars, store, tmp_path)
    fit(old.but(steps=4), tmp_path / "whole")
    fit(old.but(steps=4, save_every_n_steps=2), tmp_path / "rested")
    for path in (tmp_path / "rested/report.json", tmp_path / "rested/checkpoints/step_00000004.safetensors"):
        path.unlink()
    driver.run(tars, store, larger(few, recipe), EXTEND)
    fit(old.but(steps=4, save_every_n_steps=2), tmp_path / "rested")
    weights = [(tmp_path / run / "student/open_clip_model.safetensors").read_bytes() for run in ("whole", "rested")]
    assert weights[0] == weights[1]
    new = training(tars, store, tmp_path, teachers=None, text_sets=None, view_set="base+more")
    report = fit(new, tmp_path / "new")
    assert report["steps"] == 4 and np.isfinite(report["metrics"]["loss"])


def test_view_sets_are_gone_through_one_after_the_other(
    small: tuple[str, str, Recipe], recipe: Recipe, tmp_path: Path
) -> None:
    tars, store, few = small
    driver.run(tars, store, larger(few, recipe), EXTEND)
    source = source_of(training(tars, store, tmp_path, view_set="base+more"))
    assert isinstance(source, StoreSource)
    wanted = [Store(store).read("00000", f"view/{name}/augment") for name in ("base", "more")]
    for epoch, params in enumerate([*wanted[0], *wanted[1], wanted[0][0]]):
        assert np.array_equal(source.open("00000", epoch).params, params)


def test_a_teacher_is_added_by_one_option(small: tuple[str, str, Recipe], recipe: Recipe) -> None:
    tars, store, _ = small
    asked = json.dumps({"model": recipe.teachers["conv"].model})
    common = ["--store", store, "--workers", "0", "--device", "cpu"]
    code, out, err = here(app, "extend", tars, *common, "--set", f"teachers.conv={asked}", "--json")
    assert code == 0, err
    assert json.loads(out)["done"] == 2
    assert list(Store(store).promised().parsed_recipe().teachers) == ["vit", "conv"]
    code, out, _ = here(app, "run", tars, *common)  # without a recipe: that of the store
    assert code == 0 and "nothing to do" in out


def test_a_damaged_addition_is_an_error(small: tuple[str, str, Recipe], recipe: Recipe) -> None:
    tars, store, few = small
    driver.run(
        tars, store, few.but(teachers=few.teachers | {"conv": Teacher(model=recipe.teachers["conv"].model)}), EXTEND
    )
    path = Path(store) / "manifest.0001.json"
    path.write_text(path.read_text().replace("conv", "vonc"))
    with pytest.raises(
        StoreError, match=r"manifest.0001.json is not as it was written|manifest in its zarr.json is not"
    ):
        Store(store).promised()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_samples_get_a_third_teacher_and_two_views(recipe: Recipe, tmp_path: Path) -> None:
    """By the commands, as a user would; a student of before learns bit for bit the same after."""
    tars, store = "samples/train/*.tar", str(tmp_path / "s")
    common = ["--store", store, "--workers", "0", "--device", "cpu"]
    code, _, err = here(app, "run", tars, *common, "--recipe", "sample")
    assert code == 0, err
    old = TrainConfig(
        student="mamba_tiny", shards=tars, store=store, steps=3, precision="fp32", workers=0, report_to=[],
        global_batch_size=32,
    )  # fmt: skip
    fit(old, tmp_path / "before")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(store).rglob("*") if path.is_file()}
    third = "teachers.third=" + json.dumps(recipe.teachers["vit"].model_dump())
    views = "view_sets.more=" + json.dumps({"num_views": 2, "view_px": 64, "num_ops": 1})
    code, _, err = here(app, "extend", tars, *common, "--set", third, "--set", views)
    assert code == 0, err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert verify(store, tars, 20, "cpu").sound
    fit(old.but(teachers=["vit", "conv"]), tmp_path / "after")
    weights = [(tmp_path / run / "student/open_clip_model.safetensors").read_bytes() for run in ("before", "after")]
    assert weights[0] == weights[1]
    report = fit(old.but(view_set="base+more"), tmp_path / "new")
    assert report["steps"] == 3 and np.isfinite(report["metrics"]["loss"])
    assert source_of(old).teachers.keys() == {"vit", "conv", "third"}
