"""The dial: embeddings as bfloat16, the same bits in pcodec, or int8, whose loss is measured."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.__main__ import app
from reinforce.check.repack import repack
from reinforce.check.verify import verify
from reinforce.config import ClassSet, Packing, Recipe, RunOptions
from reinforce.errors import ConfigError, ManifestMismatch, MissingExtra, StoreError
from reinforce.run import driver
from reinforce.store.packing import LARGEST, loss, packed, unpacked
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here
from train.config import TrainConfig
from train.trainer import fit

RUN = RunOptions(workers="0", device="cpu", max_invalid=0.5)
PACKED = ("bf16-pco", "int8")


def units(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(ml_dtypes.bfloat16)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


# -- numbers -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 90), st.integers(0, 99))
def test_int8_is_within_half_a_step(num: int, views: int, width: int, seed: int) -> None:
    exact = units(views, num, width, seed=seed)
    exact[0, 0] = np.nan
    stored = packed(exact, "int8")
    again, wide = unpacked(stored, "int8").astype(np.float64), exact.astype(np.float64)
    assert stored.dtype == np.int8 and int(np.abs(stored).max(initial=0)) in (0, LARGEST)
    assert np.isnan(again[0, 0]).all() and np.isnan(again).sum() == width
    rest = ~np.isnan(wide[..., 0])
    step = np.abs(wide[rest]).max(-1, keepdims=True) / LARGEST
    # Half a step of rounding moves the norm too, by which all is divided, and bfloat16 rounds once more.
    room = step / 2 * (1 + np.sqrt(width) * np.abs(wide[rest])) + 2.0**-8 * np.abs(wide[rest]) + 0.01 * step
    assert (np.abs(again[rest] - wide[rest]) <= room).all()


def test_pcodec_holds_the_bits() -> None:
    exact = units(3, 7, 16)
    exact[1, 2] = np.nan
    exact[0, 0, 0] = -0.0
    assert (bits(unpacked(packed(exact, "bf16-pco"), "bf16-pco")) == bits(exact)).all()


def test_int8_refuses_what_is_no_unit_vector() -> None:
    rows = units(4, 8)
    rows[2] *= ml_dtypes.bfloat16(3)
    with pytest.raises(
        StoreError, match=r"int8 holds unit vectors, and there is one of norm (2.9|3)\S*; use embeddings"
    ):
        packed(rows, "int8")


def test_the_loss_is_that_of_the_targets() -> None:
    images, texts = units(40, 24, seed=1), units(40, 24, seed=2)
    assert loss(images, texts, 30.0, "bf16") == loss(images, texts, 30.0, "bf16-pco") == {
        "kl": 0.0, "kl_back": 0.0, "top1": 1.0
    }  # fmt: skip
    told = loss(images, texts, 30.0, "int8")

    def targets(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        weights = np.exp(30.0 * x.astype(np.float64) @ y.astype(np.float64).T)
        return np.concatenate([weights / weights.sum(1, keepdims=True), (weights / weights.sum(0, keepdims=True)).T])

    p = targets(images, texts)
    q = targets(*(unpacked(packed(rows, "int8"), "int8") for rows in (images, texts)))
    assert told["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)
    assert told["kl_back"] == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-6)
    assert told["top1"] == (p.argmax(1) == q.argmax(1)).mean() and 0 < told["kl"] < 1e-2


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tars")
    return "::".join(tiny.tar(folder / f"{i:05d}.tar", 9, i, seed=i) for i in range(2))


def asked(recipe: Recipe, packing: str) -> Recipe:
    return recipe.but(embeddings=packing, class_sets={"kinds": ClassSet(classnames=("hat", "shoe"))})


@pytest.fixture(scope="module")
def stores(recipe: Recipe, tars: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {packing: str(tmp_path_factory.mktemp("stores") / packing) for packing in get_args(Packing)}
    for packing, store in made.items():
        report = driver.run(tars, store, asked(recipe, packing), RUN)
        assert report.done == 2 and list(report.embedding_loss) == (["vit", "conv"] if packing == "int8" else [])
        assert all(0 < lost["kl"] < 1e-2 for lost in report.embedding_loss.values())
    return made


def embeddings(store: str) -> dict[str, np.ndarray]:
    opened, found = Store(store), {}
    manifest = opened.promised()
    for group, columns in [("00001", manifest.columns()), ("__classes__", manifest.class_columns())]:
        found |= {f"{group}/{column}": opened.read(group, column) for column in columns if column.teacher}
    return found


def test_all_hold_the_same_teachers(stores: dict[str, str]) -> None:
    exact = embeddings(stores["bf16"])
    assert len(exact) == 2 * (1 + 2) + 2 and any(np.isnan(array.astype(np.float32)).any() for array in exact.values())
    for packing in PACKED:
        for name, array in embeddings(stores[packing]).items():
            assert array.dtype == exact[name].dtype and array.shape == exact[name].shape
            if packing == "bf16-pco":
                assert (bits(array) == bits(exact[name])).all()
            else:
                assert np.allclose(array.astype(float), exact[name].astype(float), atol=0.01, equal_nan=True)
                assert not (bits(array) == bits(exact[name])).all()


@pytest.mark.parametrize("packing", PACKED)
def test_one_view_is_read_alone(stores: dict[str, str], packing: str) -> None:
    store = Store(stores[packing])
    whole = store.read("00000", "view/base/vit")
    for index in range(len(whole)):
        assert (bits(store.read("00000", "view/base/vit", index)) == bits(whole[index])).all()


def test_plain_zarr_sees_what_the_page_says(stores: dict[str, str]) -> None:
    """docs/store.md: bits of bfloat16, or rows to be divided by their norm."""
    exact = zarr.open_array(f"{stores['bf16']}/00000/view/base/vit", mode="r")[0]
    in_pcodec = zarr.open_array(f"{stores['bf16-pco']}/00000/view/base/vit", mode="r")
    assert in_pcodec.dtype == np.uint16 and (in_pcodec[0].view(ml_dtypes.bfloat16) == exact).all()
    assert in_pcodec.fill_value == ml_dtypes.bfloat16("nan").view(np.uint16)
    stored = zarr.open_array(f"{stores['int8']}/00000/view/base/vit", mode="r")[0]
    rows = stored / np.linalg.norm(stored.astype(float), axis=-1, keepdims=True)
    assert stored.dtype == np.int8 and np.abs(rows - exact.astype(float)).max() < 0.01


def test_without_pcodec_a_sentence(
    recipe: Recipe, tars: str, stores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pcodec", None)
    for call in (
        lambda: Store(stores["bf16-pco"]).read("00000", "view/base/vit", 0),
        lambda: driver.run(tars, str(tmp_path / "s"), asked(recipe, "bf16-pco"), RUN),
        lambda: repack(stores["bf16"], str(tmp_path / "r"), "bf16-pco"),
    ):
        with pytest.raises(MissingExtra, match=r"bf16-pco needs pcodec: pip install 'clip-reinforce\[pco\]'"):
            call()
    assert not (tmp_path / "s").exists()
    assert Store(stores["bf16"]).read("00000", "view/base/vit", 0).size


@pytest.mark.parametrize("packing", PACKED)
def test_verify_finds_them_sound(stores: dict[str, str], tars: str, packing: str) -> None:
    report = verify(stores[packing], tars, 12, "cpu")
    assert report.sound and report.replay is not None and report.replay["cosine_min"] > 0.9999


@pytest.mark.parametrize("packing", PACKED)
def test_repacked_is_as_if_run(stores: dict[str, str], tmp_path: Path, packing: Packing) -> None:
    report = repack(stores["bf16"], str(tmp_path / "new"), packing)
    assert (report.groups, report.done, report.failed) == (3, 3, [])
    run, made = tiny.tree(stores[packing]), tiny.tree(tmp_path / "new")
    if packing == "int8":  # which has measured what it loses, and says so
        manifest = json.loads(made.pop("zarr.json"))["attributes"]["reinforce"]
        before = json.loads(run.pop("zarr.json"))["attributes"]["reinforce"]
        lost = manifest.pop("embedding_loss")
        assert manifest == before and lost == report.embedding_loss and set(lost) == {"vit", "conv"}
        assert Store(str(tmp_path / "new")).promised().embedding_loss == lost
    assert made == run
    if packing == "bf16-pco":
        assert report.embedding_loss == {}
        repack(str(tmp_path / "new"), str(tmp_path / "back"), "bf16")
        assert tiny.tree(tmp_path / "back") == tiny.tree(stores["bf16"])


def test_repacking_goes_on_where_it_stopped(stores: dict[str, str], tmp_path: Path) -> None:
    new = tmp_path / "new"
    repack(stores["bf16"], str(new), "int8")
    whole = tiny.tree(new)
    for path in list(new.rglob("conv/zarr.json"))[1:]:
        path.unlink()
    shutil.rmtree(new / "00001/text")
    again = repack(stores["bf16"], str(new), "int8")
    assert tiny.tree(new) == whole and 0 < again.bytes_after < again.bytes_before


def test_a_damaged_column_costs_its_own_shard(stores: dict[str, str], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(stores["bf16"], old)
    [damaged] = (old / "00001/view/base/vit").glob("c.*")
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"\0" * 9)
    (old / "00001/text/coca/vit/zarr.json").unlink()
    report = repack(str(old), str(tmp_path / "new"), "bf16-pco")
    assert report.done == 2 and len(report.failed) == 1 and "00001/view/base/vit" in report.failed[0]
    made = Store(str(tmp_path / "new"))
    assert not made.has("00001", "text/coca/vit") and not made.has("00001", "view/base/vit")
    assert made.has("00001", "text/original/vit")


def test_what_cannot_be_repacked_is_said(stores: dict[str, str], tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    with pytest.raises(ConfigError, match="holds int8, and what that has lost is in no store; run its recipe again"):
        repack(stores["int8"], new, "bf16")
    with pytest.raises(ConfigError, match="holds bf16 already; there is nothing to repack"):
        repack(stores["bf16"], new, "bf16")
    with pytest.raises(StoreError, match="no store at"):
        repack(str(tmp_path / "nothing"), new, "int8")
    for within in (stores["bf16"], f"{stores['bf16']}/in", str(Path(stores["bf16"]).parent)):
        with pytest.raises(ConfigError, match="lie in each other; a store has a folder to itself"):
            repack(stores["bf16"], within, "int8")
    with pytest.raises(ManifestMismatch, match=r"recipe.embeddings: the store has bf16-pco, this run asks for int8"):
        repack(stores["bf16"], stores["bf16-pco"], "int8")
    assert not Path(new).exists()


@pytest.mark.parametrize(("packing", "other"), [("bf16", "int8"), ("int8", "bf16")])
def test_a_store_holds_them_in_one_way(
    recipe: Recipe, stores: dict[str, str], tars: str, packing: str, other: str
) -> None:
    with pytest.raises(
        ManifestMismatch, match=f"recipe.embeddings: the store has {packing}, this run asks for {other}"
    ):
        driver.run(tars, stores[packing], asked(recipe, other), RUN)


def test_a_teacher_is_added_in_the_same_way(recipe: Recipe, tars: str, stores: dict[str, str], tmp_path: Path) -> None:
    grown = tmp_path / "s"
    few = asked(recipe, "int8").but(teachers={"vit": recipe.teachers["vit"]})
    driver.run(tars, str(grown), few, RUN)
    driver.run(tars, str(grown), asked(recipe, "int8"), RUN.but(extend=True))
    for name, array in embeddings(stores["int8"]).items():
        assert (bits(array) == bits(embeddings(str(grown))[name])).all()


def test_commands(stores: dict[str, str], tmp_path: Path) -> None:
    code, out, _ = here(app, "info", stores["bf16-pco"], "--embeddings", "--json")
    told: dict[str, Any] = json.loads(out)
    assert code == 0 and told["embeddings"] == "bf16-pco" and set(told["ways"]) == {"vit", "conv"}
    for ways in told["ways"].values():
        assert list(ways) == list(get_args(Packing))
        assert ways["int8"]["of_raw"] < ways["bf16-pco"]["of_raw"] and ways["int8"]["kl"] > ways["bf16"]["kl"] == 0.0
    assert here(app, "info", stores["int8"], "--embeddings")[0] == 2
    code, out, _ = here(app, "repack", stores["bf16"], "--to", str(tmp_path / "n"), "--embeddings", "int8", "--json")
    assert code == 0 and json.loads(out)["failed"] == []
    assert json.loads(here(app, "info", str(tmp_path / "n"), "--json")[1])["embedding_loss"].keys() == {"vit", "conv"}


def test_students_learn_the_same(stores: dict[str, str], tars: str, tmp_path: Path) -> None:
    """Of the same bits the same, of int8 nearly."""
    student, losses = tiny.student(tmp_path / "student"), {}
    for packing, store in stores.items():
        config = TrainConfig.model_validate(
            {"student": student, "shards": tars, "store": store, "global_batch_size": 8, "streams": 4, "steps": 3}
            | {"precision": "fp32", "workers": 0, "report_to": [], "distill": 1.0}
        )
        losses[packing] = fit(config, tmp_path / packing)["metrics"]["loss"]
    assert losses["bf16"] == losses["bf16-pco"] != losses["int8"]
    assert losses["int8"] == pytest.approx(losses["bf16"], rel=2e-3)
