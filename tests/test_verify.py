"""`verify --replay` finds a tar that is not the one, a view that is not the same, and weights that are not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from reinforce.__main__ import app
from reinforce.check.info import info
from reinforce.check.replay import replay
from reinforce.check.verify import verify
from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import expand, read_parts, write
from reinforce.errors import ConfigError
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here

OPTIONS = RunOptions(workers="0", device="cpu")


@pytest.fixture
def made(recipe: Recipe, tmp_path: Path) -> tuple[str, str]:
    tars = [tiny.tar(tmp_path / f"{i:05d}.tar", 5, seed=i) for i in range(2)]
    driver.run("::".join(tars), str(tmp_path / "s"), recipe, OPTIONS)
    return "::".join(tars), str(tmp_path / "s")


def rewritten(store: str, column: str, change) -> None:
    """Commits a column anew with other content: sound in itself, and wrong."""
    array, data = Store(store).read("00001", column), Store(store).identity("00001")
    change(array)
    Store(store).remove("00001", column)
    assert data and Store(store).commit("00001", column, array, data)


def test_a_sound_store_replays_whole(made: tuple[str, str]) -> None:
    shards, store = made
    report = verify(store, shards, 1000, "cpu")
    assert report.sound and report.columns_checked == 2 * 15
    assert report.replay["views"] == report.replay["pixel_equal"] == 2 * 5 * 3
    assert report.replay["cosine_min"] > 0.999


def test_a_shifted_crop_is_found(made: tuple[str, str]) -> None:
    shards, store = made

    def shift(augment: np.ndarray) -> None:
        augment[:, :, :2] = 0
        augment[:, :, 2:4] = 20

    rewritten(store, "view/base/augment", shift)
    report = verify(store, shards, 1000, "cpu")
    assert not report.sound
    assert report.replay["pixel_equal"] == 15
    assert report.replay["cosine_min"] < 0.999


def test_swapped_embeddings_are_found_by_their_cosine(made: tuple[str, str]) -> None:
    shards, store = made

    def swap(embeddings: np.ndarray) -> None:
        embeddings[:] = embeddings[:, ::-1].copy()

    rewritten(store, "view/base/vit", swap)
    report = verify(store, shards, 1000, "cpu")
    assert report.replay["pixel_equal"] == 30 and report.replay["cosine_min"] < 0.999
    assert not report.sound


def test_embeddings_that_are_not_unit_are_found(made: tuple[str, str]) -> None:
    _, store = made
    for value in (2.0, np.nan, 0.0):

        def scale(embeddings: np.ndarray, value: float = value) -> None:
            embeddings[0, 0] = value

        rewritten(store, "text/coca/conv", scale)
        assert verify(store, None, 0).corrupt == [
            "00001/text/coca/conv: embeddings of good samples that are not unit vectors"
        ]


def test_rows_that_do_not_match_are_found(made: tuple[str, str]) -> None:
    _, store = made
    data = Store(store).identity("00001")
    Store(store).remove("00001", "view/base/pixels")
    assert data and Store(store).commit("00001", "view/base/pixels", np.zeros((3, 4), np.uint64), data)
    assert verify(store, None, 0).corrupt == ["00001/view/base/pixels: 4 rows, status has 5"]


def test_the_wrong_tar_is_told_and_hides_nothing(made: tuple[str, str], tmp_path: Path) -> None:
    shards, store = made
    first, _ = shards.split("::")
    (tmp_path / "other").mkdir()
    other = tiny.tar(tmp_path / "other/00001.tar", 5, seed=7)
    report = verify(store, f"{first}::{other}", 100, "cpu")
    assert report.other_tars == [f"00001: the keys of {other} are not those of the store"] and not report.sound
    assert report.replay and report.replay["views"] == report.replay["pixel_equal"] == 15
    nothing = tiny.tar(tmp_path / "other/00009.tar", 5, seed=7)
    report = verify(store, nothing, 10, "cpu")
    assert (
        report.missing == ["00009: its whole group, which was lost or never written"]
        and not report.sound
        and report.replay is None
    )
    assert report.unchecked == [
        "00000: its tar was not given", "00001: its tar was not given",
        "replay: none of the shards given is whole in the store",
    ]  # fmt: skip


def swapped(source: str, target: Path, part: str) -> str:
    """The tar with the first two samples' images, or captions, in each other's place."""
    samples = list(read_parts(expand(source)[0], ("jpg", "txt")))
    (_, a), (_, b) = samples[:2]
    a[part], b[part] = b[part], a[part]
    target.parent.mkdir(exist_ok=True)
    write(str(target), samples)
    return str(target)


def test_other_images_and_other_captions_are_found_by_content(made: tuple[str, str], tmp_path: Path) -> None:
    shards, store = made
    first, second = shards.split("::")
    images = swapped(second, tmp_path / "images/00001.tar", "jpg")
    rows = [
        f"00001: row {row} ({key}) is another image" for row, key in enumerate(Store(store).read("00001", "key")[:2])
    ]
    assert verify(store, f"{first}::{images}", 0).other_tars == rows
    captions = swapped(second, tmp_path / "captions/00001.tar", "txt")
    rows = [row.replace("is another image", "has another caption") for row in rows]
    assert verify(store, f"{first}::{captions}", 0).other_tars == rows


def test_one_damage_hides_no_other(made: tuple[str, str]) -> None:
    shards, store = made
    group = Path(store) / "00000"
    (group / "view/base/vit/zarr.json").write_text("{")
    (group / "text/coca/vit/c.0.0.0").unlink()
    (group / "view/zarr.json").write_text("[]")
    (group / "text/coca/zarr.json").unlink()
    shutil.rmtree(group / "size")
    shutil.copytree(Path(store) / "00001/status", group / "status", dirs_exist_ok=True)
    (Path(store) / "notes.txt").write_text("mine")
    (group / "view/base/other").mkdir()
    (group / "view/base/other/c.0").write_text("mine")
    report = verify(store, shards, 10, "cpu")
    assert [fault.partition(":")[0] for fault in report.corrupt] == [
        *("00000/status", "00000/text/coca/vit", "00000/view/base/vit", "00000/view/zarr.json")
    ]
    assert sorted(report.missing) == ["00000/size", "00000/text/coca/zarr.json"]
    assert report.foreign == ["00000/view/base/other/c.0", "notes.txt"]
    told = info(store)
    assert (told["shards"], told["samples"]) == (2, 5)  # of the other shard
    assert [fault.split(": ")[1].partition("/zarr.json")[0].partition(" ")[0] for fault in told["damaged_columns"]] == [
        *("00000/status", "00000/view/base/vit")
    ]
    assert report.replay and report.replay["views"] == report.replay["pixel_equal"] == 10 and not report.sound


def test_strict_asks_for_everything(made: tuple[str, str]) -> None:
    shards, store = made
    first, _ = shards.split("::")
    for asked, codes in ((shards, (0, 0)), (first, (0, 1))):
        for strict, expected in zip(([], ["--strict"]), codes, strict=True):
            code, out, _ = here(app, "verify", store, "--shards", asked, *strict)
            assert code == expected, out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(made: tuple[str, str], tmp_path: Path) -> None:
    shards, store = made
    with pytest.raises(ConfigError, match="finds no GPU"):
        verify(store, shards, 4, "cuda")
    with pytest.raises(ConfigError, match="finds no GPU"):
        replay(Store(store), Store(store).promised(), expand(shards), 4, "cuda")
    with pytest.raises(ConfigError, match="finds no GPU"):
        verify(str(tmp_path / "no store here"), None, 0, "cuda")


def test_without_the_weights_pixels_are_still_compared(tmp_path: Path) -> None:
    recipe = tiny.models(tmp_path / "models")
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
    (tmp_path / "models/vit").rename(tmp_path / "models/gone")
    report = verify(str(tmp_path / "s"), tar, 4, "cpu")
    assert report.sound and report.replay["pixel_equal"] == 4
    [why] = report.unchecked
    assert why.startswith("cosines of teacher vit, which is not at hand:")
