"""Whatever is damaged in a store is found, not read, and mended to the same bytes."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reinforce.__main__ import app
from reinforce.check.repair import redo, repair
from reinforce.check.verify import verify
from reinforce.config import ClassSet, Recipe, RunOptions
from reinforce.errors import ConfigError, StoreError
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here
from tests.test_identity import edited, swap_images

OPTIONS = RunOptions(workers="0", device="cpu", max_invalid=1)
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def lose(path: Path, rng: random.Random) -> None:
    path.unlink()


def grow(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(1 + rng.randrange(9)))


def swap(path: Path, rng: random.Random) -> None:
    """Another object of the store in its place: of another column, or of the same column of another shard."""
    others = [p for p in sorted(root_of(path).rglob(path.name)) if p.read_bytes() != path.read_bytes()]
    shutil.copy(rng.choice(others), path)


def exchange(path: Path, rng: random.Random) -> None:
    """A whole column in the place of another: of another shard, or of another kind, sound in itself."""
    store = root_of(path)
    columns = sorted(p.parent for p in store.rglob("c.*") if p.parent != path.parent)
    shutil.copytree(rng.choice(columns), path.parent, dirs_exist_ok=True)


def of_another_store(path: Path, rng: random.Random) -> None:
    """The column, or the group, of a store of the same tars and another recipe."""
    store = root_of(path)
    shutil.copytree(store.parent / "other" / path.parent.relative_to(store), path.parent, dirs_exist_ok=True)


def root_of(path: Path) -> Path:
    return next(folder for folder in path.parents if (folder / ".root").exists())


DAMAGES: list[Damage] = [flip, cut, empty, lose, grow, swap, exchange, of_another_store]


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, bytes]]:
    """Two tars, a store of them with class texts, and its bytes."""
    folder = tmp_path_factory.mktemp("repair")
    tars = "::".join(tiny.tar(folder / f"{i:05d}.tar", 5, i, seed=i) for i in range(2))
    whole = recipe.but(class_sets={"kinds": ClassSet(classnames=("hat", "shoe"))})
    driver.run(tars, str(folder / "s"), whole, OPTIONS)
    driver.run(tars, str(folder / "other"), whole.but(seed=1), OPTIONS)
    (folder / "s/.root").touch()
    return tars, folder / "s", tiny.tree(folder / "s")


def restore(store: Path, whole: dict[str, bytes]) -> None:
    for path in sorted(store.rglob("*")):
        if path.is_file() and str(path.relative_to(store)) not in whole:
            path.unlink()
    for name, data in whole.items():
        if not (store / name).is_file() or (store / name).read_bytes() != data:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(data)


def columns_of(url: str) -> dict[tuple[str, str], np.ndarray]:
    """Every column, as a training reads it: together with what says whose it is."""
    store = Store(url)
    manifest = store.promised()
    found = {}
    for shard in store.shards():
        data = store.identity(shard)
        for column in manifest.columns():
            found[shard, str(column)] = store.read(shard, column, None, data)
    return found


def assert_nothing_wrong_is_read(url: str, whole: dict[tuple[str, str], np.ndarray]) -> None:
    """What can be read of a damaged store is what was written; the rest is an error of the store's."""
    store = Store(url)
    for (shard, column), array in whole.items():
        try:
            read = store.read(shard, column, None, store.identity(shard))
        except StoreError:
            continue
        assert read.tolist() == array.tolist() if array.dtype == object else read.tobytes() == array.tobytes()


@pytest.mark.parametrize("seed", range(int(os.environ.get("DAMAGES", 72)) // 24))  # `make corrupt` asks for more
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_damage_is_found_and_mended_to_the_same_bytes(
    made: tuple[str, Path, dict[str, bytes]], damage: Damage, seed: int
) -> None:
    tars, store, whole = made
    whole_columns = columns_of(str(store))
    rng = random.Random(f"{damage.__name__} {seed}")
    for _ in range(3):  # one damage hides no other
        damage(store / rng.choice([name for name in sorted(whole) if "/" in name and (store / name).exists()]), rng)
    damaged = tiny.tree(store)
    changed = {name for name, data in damaged.items() if whole.get(name) != data}
    lost = whole.keys() - damaged.keys()
    found = verify(str(store), None, 0)
    assert_nothing_wrong_is_read(str(store), whole_columns)
    named = {fault.partition(":")[0].removesuffix("/zarr.json") for fault in found.corrupt + found.missing}
    assert named == {str(Path(name).parent) for name in changed | lost}
    report = repair(str(store), tars, OPTIONS, remove_foreign=True)
    (store / ".root").touch()
    assert report.sound and tiny.tree(store) == whole
    assert verify(str(store), tars, 4, "cpu").sound
    restore(store, whole)


@pytest.mark.parametrize("damage", [flip, cut, empty, lose], ids=lambda damage: damage.__name__)
def test_a_damaged_manifest_is_an_error_everywhere(
    made: tuple[str, Path, dict[str, bytes]], recipe: Recipe, damage: Damage
) -> None:
    tars, store, whole = made
    rng = random.Random(damage.__name__)
    try:
        for _ in range(20):
            damage(store / "zarr.json", rng)
            before = tiny.tree(store)
            for call in (
                lambda: verify(str(store), tars, 0),
                lambda: repair(str(store), tars, OPTIONS),
                lambda: driver.run(tars, str(store), recipe, OPTIONS),
            ):
                with pytest.raises(StoreError):
                    call()
            assert tiny.tree(store) == before
            restore(store, whole)
    finally:
        restore(store, whole)


def test_without_tars_it_takes_out_and_says_what_is_next(made: tuple[str, Path, dict[str, bytes]]) -> None:
    tars, store, whole = made
    (store / "00001/view/base/vit/c.0.0.0").write_bytes(b"x")
    (store / "00000/text/coca/caption/zarr.json").write_bytes(b"{")
    code, out, _ = here(app, "repair", str(store))
    assert code == 1 and f"repair {store} --shards" in out
    absent = [f"00000/text/coca/{part}" for part in ("caption", "vit", "conv")]  # embeddings of captions go with them
    assert sorted(verify(str(store), None, 0).missing) == sorted([*absent, "00001/view/base/vit"])
    code, out, _ = here(app, "repair", str(store), "--shards", tars, "--workers", "0", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["run"]["done"] == 2 and tiny.tree(store) == whole


def test_what_is_foreign_is_told_and_removed_only_when_asked(made: tuple[str, Path, dict[str, bytes]]) -> None:
    _, store, whole = made
    (store / "notes.txt").write_text("mine")
    (store / "00000/view/mine").mkdir()
    (store / "00000/view/mine/c.0").write_text("mine")
    report = repair(str(store), None, OPTIONS)
    assert report.sound and {"00000/view/mine/c.0", "notes.txt"} <= set(report.foreign)
    assert (store / "notes.txt").exists()
    assert repair(str(store), None, OPTIONS, remove_foreign=True).sound
    restore(store, whole)
    assert tiny.tree(store) == whole


def test_what_cannot_be_mended_is_told(made: tuple[str, Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Of another tar a shard fails, and of none at all its columns stay away: exit code 1, and why."""
    tars, store, _ = made
    first, second = tars.split("::")
    shutil.copytree(store, tmp_path / "s")
    Store(str(tmp_path / "s")).remove("00001", "view/base/vit")
    asked = ("repair", str(tmp_path / "s"), "--workers", "0", "--device", "cpu", "--shards")
    for given, told in ((edited(second, swap_images), "    00001: "), (first, "left:\n  00001/view/base/vit")):
        code, out, err = here(app, *asked, given)
        assert code == 1 and told in out and "not all is mended" in out, (out, err)
    code, out, _ = here(app, *asked, tars)
    assert code == 0 and out.endswith("sound\n") and tiny.tree(tmp_path / "s") == tiny.tree(store)


def test_a_shard_is_made_again_of_a_tar_that_was_replaced(
    made: tuple[str, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    tars, store, _ = made
    shutil.copytree(store, tmp_path / "s")
    first, second = tars.split("::")
    new = edited(second, swap_images)
    with pytest.raises(ConfigError, match="has no shard '7'"):
        redo(str(tmp_path / "s"), ["7"], new, OPTIONS)
    with pytest.raises(ConfigError, match=r"has no 00000\.tar"):
        redo(str(tmp_path / "s"), ["00000"], new, OPTIONS)
    cut = tmp_path / "00001.tar"
    for wrong in (Path(second).read_bytes()[:3000], b""):
        cut.write_bytes(wrong)
        with pytest.raises(ConfigError, match="nothing was removed: .*00001.tar"):
            redo(str(tmp_path / "s"), ["00001"], str(cut), OPTIONS)
        assert tiny.tree(tmp_path / "s") == tiny.tree(store)
    before = Store(str(store)).read("00001", "digest")
    report = redo(str(tmp_path / "s"), ["00001"], f"{first}::{new}", OPTIONS)
    assert report.sound and report.run and (report.run["done"], report.run["already_there"]) == (1, 1)
    assert verify(str(tmp_path / "s"), f"{first}::{new}", 20, "cpu").sound
    after = Store(str(tmp_path / "s")).read("00001", "digest")
    assert sorted(before) == sorted(after) and not np.array_equal(before, after)
