"""Several stores, one training: each sample learns from the teachers that its own store has."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reinforce.config import Recipe, RunOptions, parse
from reinforce.errors import ConfigError
from reinforce.run import driver
from tests import tiny
from tests.test_loader import letters
from train.__main__ import app
from train.config import TrainConfig
from train.data.loader import Loader
from train.data.mixture import source_of
from train.data.sources import MIX
from train.trainer import fit

RUN = RunOptions(workers="0", device="cpu")


@pytest.fixture(scope="module")
def parts(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Three parts whose tars have the same name: with both teachers and captions, with one teacher, without a store."""
    folder = tmp_path_factory.mktemp("mixture")
    tars = [tiny.tar(folder / f"{part}/00000.tar", num, seed=10 + i) for i, (part, num) in enumerate(
        [("both", 12), ("one", 9), ("none", 6)])]  # fmt: skip
    one = recipe.but(teachers={"conv": recipe.teachers["conv"]}, captioners={})
    for name, tar, asked in (("both", tars[0], recipe), ("one", tars[1], one)):
        driver.run(tar, str(folder / f"{name}.zarr"), asked, RUN)
    return [
        {"shards": tars[0], "store": str(folder / "both.zarr")},
        {"shards": tars[1], "store": str(folder / "one.zarr")},
        {"shards": tars[2]},
    ]


def training(parts: list[dict[str, object]], **changes: object) -> TrainConfig:
    asked: dict[str, object] = {
        "data": parts, "global_batch_size": 8, "streams": 2, "distill": 0.5, "precision": "fp32", "workers": 0,
        "report_to": [], "device": "cpu", "steps": 3,
    }  # fmt: skip
    return parse(TrainConfig, asked | changes, "the test")


def test_each_sample_has_the_targets_of_its_own_store(parts: list[dict[str, object]]) -> None:
    source = source_of(training(parts))
    assert {name: facts.partial for name, facts in source.teachers.items()} == {"vit": True, "conv": True}
    assert source.text_sets == ["original"]  # of CoCa's captions the second part has none
    alone = [source_of(training([], shards=part["shards"], store=part["store"])) for part in parts[:2]]
    for number, part in enumerate([*alone, None]):
        opened = source.open(f"{number}/00000", epoch=1)
        for name, facts in source.teachers.items():
            image, text = opened.image_targets[name], opened.text_targets["original"][name]
            assert image.shape == text.shape == (len(opened.keys), facts.width)
            if part and name in part.teachers:
                own = part.open("00000", epoch=1)
                assert image.tobytes() == own.image_targets[name].tobytes()
                assert text.tobytes() == own.text_targets["original"][name].tobytes()
            else:
                assert np.isnan(image.astype(np.float32)).all() and np.isnan(text.astype(np.float32)).all()


def test_batches_mix_the_parts_as_often_as_they_weigh(parts: list[dict[str, object]]) -> None:
    weighed = [part | {"weight": weight} for part, weight in zip(parts, (1, 2, 0.5), strict=True)]
    loader = Loader(source_of(training(weighed)), 24, letters, 3, 1, 0)
    assert loader.order.num_samples == 12 + 2 * 9 + 3
    epochs = []
    for epoch in range(2):
        batches = list(loader.batches(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch))
        epochs.append(Counter(key for batch in batches for key in batch.keys))
        for batch in batches:
            for i, key in enumerate(batch.keys):
                has = {name: not batch.image_targets[name][i].isnan().any() for name in ("vit", "conv")}
                stem = {"10": (True, True), "11": (False, True), "12": (False, False)}
                assert tuple(has.values()) == stem[key.split("-")[1]]
    for counts in epochs:
        assert Counter((key.split("-")[1], num) for key, num in counts.items()) == {
            ("10", 1): 12, ("11", 2): 9, ("12", 1): 3,
        }  # fmt: skip
    assert epochs[0].keys() != epochs[1].keys()  # of half a part other halves


def test_a_sample_that_an_epoch_shows_twice_shows_two_views(parts: list[dict[str, object]]) -> None:
    loader = Loader(source_of(training([parts[0] | {"weight": 3}])), 24, letters, 4, 1, 0)
    seen: dict[str, set[bytes]] = {}
    for batch in loader.batches(0, loader.steps_per_epoch):
        for key, image in zip(batch.keys, batch.images, strict=True):
            seen.setdefault(key, set()).add(image.numpy().tobytes())
    assert len(seen) == 12 and all(len(views) == 3 for views in seen.values())


@pytest.mark.parametrize("changes", [{}, {"captions": "mix"}, {"feature_mse": 1.0, "feature_balance": True}])
def test_students_learn_from_all(parts: list[dict[str, object]], changes: dict, tmp_path: Path) -> None:
    config = training(parts, student=tiny.student(tmp_path / "student"), **changes)
    assert source_of(config).text_sets == ([MIX] if changes.get("captions") else ["original"])
    report = fit(config, tmp_path / "run")
    assert np.isfinite(report["metrics"]["loss"]) and report["metrics"]["distill"] > 0
    assert fit(config, tmp_path / "run") == report  # done before


def test_pieces_and_the_whole_have_the_same_loss(parts: list[dict[str, object]], tmp_path: Path) -> None:
    config = training(parts, student=tiny.student(tmp_path / "student"), steps=1, feature_mse=1.0)
    whole, pieces = (fit(config.but(accum_freq=num), tmp_path / f"{num}")["metrics"] for num in (1, 2))
    for name in ("loss", "distill", "feature_mse", "grad_norm"):
        assert pieces[name] == pytest.approx(whole[name], rel=1e-4), name


def test_what_cannot_be_mixed_is_said(parts: list[dict[str, object]], recipe: Recipe, tmp_path: Path) -> None:
    for changes, message in (
        ({"teachers": ["dog"]}, "has no teacher 'dog'.*vit, conv"),
        ({"text_sets": ["coca"]}, "has no common text set 'coca' to learn from; it has original"),
        ({"dist_logit_scale": {"dog": 3.0}}, "has no teacher 'dog'"),
    ):
        with pytest.raises(ConfigError, match=message):
            source_of(training(parts, **changes))
    with pytest.raises(ConfigError, match="no teachers to learn from"):
        source_of(training(parts[2:]))
    assert source_of(training(parts[2:], distill=0.0)).teachers == {}
    with pytest.raises(ConfigError, match="takes the place of"):
        training(parts, shards="a.tar")
    other = recipe.but(teachers={"vit": recipe.teachers["conv"]}, captioners={})
    driver.run(str(parts[1]["shards"]), str(tmp_path / "other.zarr"), other, RUN)
    with pytest.raises(ConfigError, match="'vit' is one model in .*both.zarr and another in .*other.zarr"):
        source_of(training([parts[0], parts[1] | {"store": str(tmp_path / "other.zarr")}]))


def test_the_command(parts: list[dict[str, object]], tmp_path: Path) -> None:
    data = [f"--data={part['shards']}::{part.get('store', '')}" for part in parts]
    asked = ["fit", *data, "--weight=2", "--weight=1", "--weight=0.5", "--student", tiny.student(tmp_path / "student")]
    settings = {"global_batch_size": 8, "streams": 2, "steps": 2, "workers": 0, "distill": 0.5, "report_to": "[]"}
    asked += [f"--set={name}={value}" for name, value in settings.items()]
    made = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "run"), "--json"])
    assert made.exit_code == 0, made.output
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert [part["weight"] for part in config["data"]] == [2.0, 1.0, 0.5] and config["data"][2]["store"] is None
    for wrong, message in (
        (["fit", "--data", "a.tar"], "write data as SHARDS::STORE"),
        (["fit", "--data", "a.tar::b.tar"], "write data as SHARDS::STORE"),
        (["fit", "--data", "a.tar::s", "--weight", "1", "--weight", "2"], "2 --weight for 1 --data"),
        (["fit", "--shards", "a.tar", "--weight", "2"], "1 --weight for 0 --data"),
        (["fit", "--data", "a.tar::s", "--weight", "inf"], "data.0.weight: Input should be a finite number"),
        (["fit", "--data", "a.tar::s", "--weight", "1e30"], "data.0.weight: Input should be less than or equal to 10"),
        (["fit", "--data", "a.tar::s", "--weight", "-1"], "data.0.weight: Input should be greater than 0"),
        (["fit"], "no shards"),
    ):
        failed = CliRunner().invoke(app, wrong)
        assert failed.exit_code == 2 and message in failed.output


def test_moved_data_is_the_same_and_another_weight_is_not(parts: list[dict[str, object]]) -> None:
    first = source_of(training(parts)).fingerprint
    assert source_of(training(parts)).fingerprint == first
    assert source_of(training([parts[0] | {"weight": 2}, *parts[1:]])).fingerprint != first
    assert source_of(training([parts[1], parts[0], parts[2]])).fingerprint != first
