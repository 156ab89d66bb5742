"""`verify --replay` finds a tar that is not the one, a view that is not the same, and weights that are not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reinforce.check.replay import replay
from reinforce.check.verify import verify
from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import expand
from reinforce.errors import ConfigError
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny

OPTIONS = RunOptions(workers="0", device="cpu")


@pytest.fixture
def made(recipe: Recipe, tmp_path: Path) -> tuple[str, str]:
    tars = [tiny.tar(tmp_path / f"{i:05d}.tar", 5, seed=i) for i in range(2)]
    driver.run("::".join(tars), str(tmp_path / "s"), recipe, OPTIONS)
    return "::".join(tars), str(tmp_path / "s")


def rewritten(store: str, column: str, change) -> None:
    """Commits a column anew with other content: sound in itself, and wrong."""
    array = Store(store).read("00001", column)
    change(array)
    (Path(store) / "00001" / column / "zarr.json").unlink()
    Store(store).commit("00001", column, array)


def test_a_sound_store_replays_whole(made: tuple[str, str]) -> None:
    shards, store = made
    report = verify(store, shards, 1000, "cpu")
    assert report.sound and report.columns_checked == 2 * 13
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
    column = Path(store) / "00001/view/base/pixels/zarr.json"
    column.unlink()
    Store(store).commit("00001", "view/base/pixels", np.zeros((3, 4), np.uint64))
    assert verify(store, None, 0).corrupt == ["00001/view/base/pixels: 4 rows, status has 5"]


def test_the_wrong_tar_gets_a_sentence(made: tuple[str, str], tmp_path: Path) -> None:
    _, store = made
    (tmp_path / "other").mkdir()
    other = tiny.tar(tmp_path / "other/00001.tar", 5, seed=7)
    with pytest.raises(ConfigError, match="is not the tar that group 00001 was made from"):
        verify(store, other, 10, "cpu")
    nothing = tiny.tar(tmp_path / "other/00009.tar", 5, seed=7)
    with pytest.raises(ConfigError, match="none of the shards given"):
        verify(store, nothing, 10, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(made: tuple[str, str], tmp_path: Path) -> None:
    shards, store = made
    with pytest.raises(ConfigError, match="finds no GPU"):
        verify(store, shards, 4, "cuda")
    with pytest.raises(ConfigError, match="finds no GPU"):
        replay(Store(store), Store(store).promised(), expand(shards), 4, "cuda")
    with pytest.raises(ConfigError, match="finds no GPU"):
        verify(str(tmp_path / "no store here"), None, 0, "cuda")


def test_without_the_weights_pixels_are_still_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny.models(tmp_path / "models")
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
    (tmp_path / "models/vit").rename(tmp_path / "models/gone")
    report = verify(str(tmp_path / "s"), tar, 4, "cpu")
    assert report.sound and report.replay["pixel_equal"] == 4
    assert "vit is not at hand" in caplog.text
