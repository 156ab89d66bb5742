"""A store knows its data by content: other images, other captions or another tar are refused wherever they come in."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reinforce.config import Recipe, RunOptions, Teacher
from reinforce.data.shards import expand, read_parts, stamp, write
from reinforce.errors import ManifestMismatch, ReplayError
from reinforce.run import driver
from reinforce.run.worker import Worker
from reinforce.store.store import Store
from tests import tiny

OPTIONS = RunOptions(workers="0", device="cpu")


@dataclass(frozen=True)
class Made:
    tar: str
    store: str
    recipe: Recipe

    def run(self, tar: str | None = None) -> tuple[int, int, list[str]]:
        """Already there, done, and why shards failed."""
        report = driver.run(tar or self.tar, self.store, self.recipe, OPTIONS)
        return report.already_there, report.done, [failure.reason for failure in report.failed]


@pytest.fixture
def made(recipe: Recipe, tmp_path: Path) -> Made:
    tar = tiny.tar(tmp_path / "in/00000.tar", 6)
    driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
    return Made(tar, str(tmp_path / "s"), recipe)


def edited(tar: str, change: Callable[[list[tuple[str, dict[str, bytes]]]], None]) -> str:
    """A tar of the same name in another folder, its samples changed."""
    samples = list(read_parts(expand(tar)[0], ("jpg", "txt")))
    change(samples)
    folder = Path(tar).parent.parent / "edited"
    folder.mkdir(exist_ok=True)
    write(str(folder / Path(tar).name), samples)
    return str(folder / Path(tar).name)


def swap_images(samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """Every key has its neighbour's picture: the same keys, captions and bytes in all."""
    pictures = [parts["jpg"] for _, parts in samples]
    for (_, parts), jpg in zip(samples, pictures[1:] + pictures[:1], strict=True):
        parts["jpg"] = jpg


def swap_captions(samples: list[tuple[str, dict[str, bytes]]]) -> None:
    for _, parts in samples:
        parts["txt"] = parts["txt"][::-1]


def test_a_stamp_is_of_the_content_and_not_of_the_file(made: Made, tmp_path: Path) -> None:
    copy = shutil.copy(made.tar, tmp_path / "copy.tar")
    assert stamp(str(copy)) == stamp(made.tar)
    assert stamp(edited(made.tar, swap_images)) != stamp(made.tar)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    assert stamp(str(empty))["bytes"] == 0


def test_a_run_over_another_tar_of_that_name_is_refused(made: Made) -> None:
    before = tiny.tree(made.store)
    there, done, [why] = made.run(edited(made.tar, swap_images))
    assert (there, done) == (0, 0) and "is not the tar that group 00000 was made from" in why
    assert tiny.tree(made.store) == before
    assert made.run() == (1, 0, [])


@pytest.mark.parametrize(("change", "says"), [(swap_images, "its images "), (swap_captions, "captions differ")])
@pytest.mark.parametrize("lost", ["view/base/vit", "text/original/vit", "text/coca/caption"])
def test_a_tar_that_was_rewritten_between_two_runs_is_refused(
    made: Made, change: Callable[[list[tuple[str, dict[str, bytes]]]], None], says: str, lost: str
) -> None:
    Store(made.store).remove("00000", lost)
    before = tiny.tree(made.store)
    _, done, [why] = made.run(edited(made.tar, change))
    assert done == 0 and says in why
    assert tiny.tree(made.store) == before


def test_stored_parameters_that_are_not_those_drawn_are_refused(made: Made) -> None:
    """As when another version draws them otherwise: embeddings of other views must not lie beside them."""
    store = Store(made.store)
    params, data = store.read("00000", "view/base/augment"), store.identity("00000")
    params[1, 2, 0] += 1
    store.remove("00000", "view/base/augment")
    assert data and store.commit("00000", "view/base/augment", params, data)
    store.remove("00000", "view/base/vit")
    _, done, [why] = made.run()
    assert done == 0 and "its views have other parameters" in why


def test_another_captioner_first_has_its_captions_embedded(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers whose captions differ, as on two kinds of GPU: the first one's are stored, and the embeddings beside
    them are theirs."""
    first = Store(made.store).read("00000", "text/coca/caption")
    wanted = {name: Store(made.store).read("00000", f"text/coca/{name}") for name in ("vit", "conv")}
    second = made.store + "2"
    worker = Worker(made.recipe, second, OPTIONS)
    genuine = worker.store.commit

    def racing(shard: str, column: object, array: np.ndarray, data: str = "", **more: object) -> bool:
        if str(column) == "text/coca/caption":
            Store(second).commit(shard, "text/coca/caption", first, data)
        return genuine(shard, column, array, data, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.store, "commit", racing)
    captioner = worker.loaded.captioners["coca"]
    monkeypatch.setattr(captioner, "caption", lambda inputs, seed, name, keys: [["other words"] * len(keys)] * 2)
    assert worker.reinforce(*expand(made.tar)).error == ""
    stored = Store(second)
    assert stored.read("00000", "text/coca/caption").tolist() == first.tolist()
    assert all(np.array_equal(stored.read("00000", f"text/coca/{name}"), wanted[name]) for name in wanted)


def test_a_view_of_another_image_is_refused(made: Made) -> None:
    from reinforce.store.reader import StoreReader

    view = StoreReader(made.store)["00000"].view("base", 2, 0)
    assert view.pixels(made.tar).shape == (40, 40, 3)
    with pytest.raises(ReplayError, match="the image was altered|the view was drawn for"):
        view.pixels(edited(made.tar, swap_images))


def test_a_store_that_holds_nothing_is_not_bound_to_a_recipe(recipe: Recipe, tmp_path: Path) -> None:
    """As after a first run that refused every shard: the second one asks for something else, as it was told to."""
    tar = tiny.tar(tmp_path / "00000.tar", 2, 3)
    report = driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
    assert "3 of 5 samples are invalid" in report.failed[0].reason
    assert Store(str(tmp_path / "s")).manifest() is None
    report = driver.run(tar, str(tmp_path / "s"), recipe.but(seed=5), OPTIONS.but(max_invalid=0.9))
    assert (report.done, report.failed) == (1, [])
    with pytest.raises(ManifestMismatch, match="recipe.seed: the store has 5"):
        driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)


def test_a_teacher_is_its_weights_and_not_its_path(tmp_path: Path) -> None:
    recipe = tiny.models(tmp_path / "models")
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
    shutil.copytree(tmp_path / "models", tmp_path / "moved")
    moved = {name: Teacher(model=f"local-dir:{tmp_path}/moved/{name}") for name in ("vit", "conv")}
    assert driver.run(tar, str(tmp_path / "s"), recipe.but(teachers=moved), OPTIONS).already_there == 1
    Store(str(tmp_path / "s")).remove("00000", "view/base/vit")
    assert driver.run(tar, str(tmp_path / "s"), recipe.but(teachers=moved), OPTIONS).done == 1
    swapped = moved | {"vit": Teacher(model=f"local-dir:{tmp_path}/moved/conv")}
    with pytest.raises(ManifestMismatch, match=r"models\.teachers\.vit\.weights_sha256"):  # although nothing is to do
        driver.run(tar, str(tmp_path / "s"), recipe.but(teachers=swapped), OPTIONS)


def test_an_activation_is_part_of_what_a_store_promises(tmp_path: Path) -> None:
    """QuickGELU and GELU have the same weights and give other embeddings."""
    recipe = tiny.models(tmp_path / "models")
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
    config = tmp_path / "models/vit/open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    Store(str(tmp_path / "s")).remove("00000", "view/base/conv")
    with pytest.raises(ManifestMismatch, match=r"models\.teachers\.vit\.architecture"):
        driver.run(tar, str(tmp_path / "s"), recipe, OPTIONS)
