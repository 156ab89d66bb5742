"""Promise 1: a column exists exactly when its zarr.json exists, whole. Promise 2: a doubled writer does no harm."""

import errno
import json
import os
import shutil
import socket
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from reinforce.config import ClassSet, Recipe, Teacher
from reinforce.errors import ConfigError, Corrupt, ManifestMismatch, NotCommitted, StoreError
from reinforce.store import arrays
from reinforce.store.arrays import CHUNK_ROWS
from reinforce.store.columns import CLASSES, Column, class_columns, columns
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store
from tests.tiny import tree

BF16 = np.dtype(ml_dtypes.bfloat16)


def embeddings(num: int, rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, rows, width)).astype(BF16)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == BF16 and bool((a.view(np.uint16) == b.view(np.uint16)).all())


@given(bits=npst.arrays(np.uint16, npst.array_shapes(min_dims=3, max_dims=3, max_side=5)))
@settings(max_examples=25, deadline=None)
def test_any_bfloat16_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, bits: np.ndarray) -> None:
    store = Store(str(tmp_path_factory.mktemp("s")))
    store.commit("00000", "view/base/vit", bits.view(BF16))
    assert same_bits(store.read("00000", "view/base/vit"), bits.view(BF16))
    assert same_bits(store.read("00000", "view/base/vit", 0), bits.view(BF16)[0])


@given(captions=npst.arrays(object, (2, 3), elements=st.text()))
@settings(max_examples=25, deadline=None)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, captions: np.ndarray) -> None:
    store = Store(str(tmp_path_factory.mktemp("s")))
    captions = np.vectorize(lambda text: text.encode(errors="replace").decode(), otypes=[object])(captions)
    store.commit("00000", "text/original/caption", captions)
    assert store.read("00000", "text/original/caption").tolist() == captions.tolist()


@given(bits=npst.arrays(np.uint16, npst.array_shapes(min_dims=2, max_dims=3, max_side=4)), axis=st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_the_object_is_what_zarr_would_write(bits: np.ndarray, axis: int) -> None:
    encoded = arrays.encode(bits.view(BF16), axis)
    plain, there = arrays._created(bits.shape, BF16, axis, "bf16", sharded=True)
    plain[...] = bits.view(BF16)
    name = arrays.object_name(encoded.metadata)
    assert name and there[name].to_bytes() == b"".join(encoded.parts)
    assert arrays.record(b"".join(encoded.parts), encoded.metadata) == encoded.record


class Late:
    """Views that are made when they are asked for."""

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[np.ndarray]:
        return (embeddings(1, 2000, 64, seed)[0] for seed in range(24))


def test_a_column_takes_the_memory_that_it_takes_encoded(tmp_path: Path) -> None:
    """And that of a few of its views, of which each is a quarter of a megabyte."""
    store, view = Store(str(tmp_path / "s")), 2000 * 64 * 2
    store.commit("00000", "view/base/conv", np.ones((1, 2, 3), BF16))  # loads what is loaded once
    tracemalloc.start()
    try:
        store.commit("00000", "view/base/vit", Late())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < store.stored_bytes("00000", "view/base/vit") + 12 * view
    assert same_bits(store.read("00000", "view/base/vit"), np.stack(list(Late())))


@pytest.mark.parametrize("rows", [0, 1, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_columns_of_every_length(tmp_path: Path, rows: int) -> None:
    store = Store(str(tmp_path))
    columns = {
        "key": np.array([f"k{i}" for i in range(rows)], dtype=object),
        "status": np.zeros(rows, np.uint8),
        "size": np.ones((rows, 2), np.int32),
        "view/base/pixels": np.full((2, rows), 2**64 - 1, np.uint64),
        "view/base/vit": embeddings(2, rows, 3),
    }
    for name, array in columns.items():
        store.commit("00000", name, array)
        assert store.read("00000", name).shape == array.shape
        assert (store.read("00000", name) == array).all()
        assert store.open_array("00000", name).attrs["rows"] == rows
        store.check("00000", name)


def test_a_recipe_names_its_columns_and_a_column_knows_what_it_is(recipe: Recipe) -> None:
    both = recipe.but(class_sets={"kinds": ClassSet(classnames=("hat", "shoe"))}, num_original_captions=4)
    assert both.text_sets == {"original": 4, "coca": 2}
    asked = {str(column): column for column in columns(both)}
    assert list(asked) == [
        *("key", "digest", "place", "status", "size", "text/original/caption", "text/coca/caption"),
        *("view/base/augment", "view/base/pixels"),
        *("text/original/vit", "text/original/conv", "text/coca/vit", "text/coca/conv"),
        *("view/base/vit", "view/base/conv"),
    ]
    assert [str(column) for column in class_columns(both)] == ["kinds/name", "kinds/vit", "kinds/conv"]
    everything = columns(both) + class_columns(both)
    assert all(Column.at(str(column)) == column for column in everything)
    embeddings = [str(column) for column in everything if column.teacher]
    assert embeddings == [path for path in map(str, everything) if path.endswith(("/vit", "/conv"))]
    num_items = {column.set: column.num_items(both) for column in columns(both) if column.row_axis == 1}
    assert num_items == {"original": 4, "coca": 2, "base": 3}
    assert {str(column) for column in everything if column.row_axis == 0} == {
        *("key", "digest", "place", "status", "size", "kinds/name", "kinds/vit", "kinds/conv")
    }
    for path in ("", "a/b/c", "view/base/vit/more"):
        with pytest.raises(ValueError, match="no column lies at"):
            Column.at(path)


def test_a_column_is_the_same_by_its_path(tmp_path: Path) -> None:
    """The rows of a class text are on the first axis: one chunk, where a view's embeddings have one for each view."""
    store = Store(str(tmp_path))
    array = embeddings(1, 4, 8)[0]
    store.commit(CLASSES, Column("class", "kinds", "vit"), array)
    assert same_bits(store.read(CLASSES, "kinds/vit"), array)
    assert store.missing(CLASSES, ["kinds/vit", "kinds/name"]) == ["kinds/name"]
    assert store.chunk_objects(CLASSES, "kinds/vit") == ["c.0.0"]
    assert store.open_array(CLASSES, "kinds/vit").attrs["rows"] == 4


def test_plain_zarr_and_tensorstore_read_the_same_bits(tmp_path: Path) -> None:
    array = embeddings(3, 7, 5)
    Store(str(tmp_path)).commit("00000", "view/base/vit", array)
    by_zarr = zarr.open_array(str(tmp_path / "00000/view/base/vit"), mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "00000/view/base/vit")}}
    by_tensorstore = tensorstore.open(spec).result()
    assert by_tensorstore.dtype.name == "bfloat16"
    assert json.loads((tmp_path / "00000/view/base/vit/zarr.json").read_text())["data_type"] == "bfloat16"
    assert same_bits(by_zarr[...], array)
    assert same_bits(by_tensorstore.read().result(), array)


def test_the_tree_can_be_walked_in_plain_zarr(tmp_path: Path) -> None:
    Store(str(tmp_path)).commit("00000", "view/base/vit", embeddings(1, 2, 3))
    group = zarr.open_group(str(tmp_path / "00000"), mode="r")
    assert [name for name, _ in group["view/base"].members()] == ["vit"]


def chunks(column: Path) -> list[list[int]]:
    """[offset, length, CRC] of each chunk, view by view."""
    found: list[list[int]] = json.loads((column / "zarr.json").read_text())["attributes"]["chunks"]
    return found


def test_one_view_reads_the_bytes_of_one_view(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/vit", embeddings(30, 50, 16))
    column = tmp_path / "00000/view/base/vit"
    data = bytearray((column / "c.0.0.0").read_bytes())
    for view, (offset, length, _) in enumerate(chunks(column)):
        if view != 7:
            data[offset : offset + length] = bytes(length)  # whoever touches another view's chunk fails
    (column / "c.0.0.0").write_bytes(data)
    assert same_bits(store.read("00000", "view/base/vit", 7), embeddings(30, 50, 16)[7])
    with pytest.raises(Corrupt):
        store.read("00000", "view/base/vit", 8)


def test_a_column_is_there_only_once_its_metadata_is(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(NotCommitted, match="00000"):
        store.read("00000", "view/base/vit")
    store.commit("00000", "view/base/vit", embeddings(2, 3, 4))
    (tmp_path / "00000/view/base/vit/zarr.json").unlink()
    assert not store.has("00000", "view/base/vit")
    with pytest.raises(NotCommitted):
        store.read("00000", "view/base/vit")


def test_a_write_that_dies_at_any_put_leaves_no_column_and_the_next_makes_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every n: die at the n-th put; nothing is visible; write again; the bytes are those of a clean write."""
    array = embeddings(4, 6, 8)
    clean = Store(str(tmp_path / "clean"))
    clean.commit("00000", "view/base/vit", array)
    wanted = tree(tmp_path / "clean")
    link, total = os.link, len(wanted)
    for fatal in range(total):
        puts = 0

        def dying(source: str, target: str, fatal: int = fatal) -> None:
            nonlocal puts
            if puts == fatal:
                raise KeyboardInterrupt
            puts += 1
            link(source, target)

        store = Store(str(tmp_path / f"n{fatal}"))
        monkeypatch.setattr(os, "link", dying)
        with pytest.raises(KeyboardInterrupt):
            store.commit("00000", "view/base/vit", array)
        monkeypatch.setattr(os, "link", link)
        assert not store.has("00000", "view/base/vit")
        assert store.commit("00000", "view/base/vit", array)
        store.objects.sweep()
        assert tree(tmp_path / f"n{fatal}") == wanted


def test_a_stray_of_another_shape_is_not_taken_for_ours(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s"))
    store.commit("00000", "view/base/vit", embeddings(5, 3, 4))
    (tmp_path / "s/00000/view/base/vit/zarr.json").unlink()
    assert store.commit("00000", "view/base/vit", embeddings(2, 3, 4))
    assert same_bits(store.read("00000", "view/base/vit"), embeddings(2, 3, 4))


def test_the_first_of_two_writers_with_other_bytes_wins_and_the_late_one_changes_nothing(tmp_path: Path) -> None:
    first, late = embeddings(4, 6, 8), embeddings(4, 6, 8, seed=1)
    store = Store(str(tmp_path))
    assert store.commit("00000", "view/base/vit", first)
    before = tree(tmp_path)
    assert not store.commit("00000", "view/base/vit", late)
    assert tree(tmp_path) == before and same_bits(store.read("00000", "view/base/vit"), first)


def test_a_writer_that_died_before_the_metadata_is_the_first_one(tmp_path: Path) -> None:
    """Its object is whole, so the next writer finishes that column; it is not mixed with its own."""
    first, second = embeddings(4, 6, 8), embeddings(4, 6, 8, seed=1)
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/vit", first)
    before = tree(tmp_path)
    (tmp_path / "00000/view/base/vit/zarr.json").unlink()
    assert not store.commit("00000", "view/base/vit", second)
    assert tree(tmp_path) == before and same_bits(store.read("00000", "view/base/vit"), first)


def test_a_damaged_stray_is_replaced(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/vit", embeddings(4, 6, 8))
    before = tree(tmp_path)
    (tmp_path / "00000/view/base/vit/zarr.json").unlink()
    damage_bit(tmp_path / "00000/view/base/vit/c.0.0.0")
    assert store.commit("00000", "view/base/vit", embeddings(4, 6, 8))
    assert tree(tmp_path) == before


def test_without_hard_links_it_works_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "no links on this file system", target)

    Store(str(tmp_path / "with")).commit("00000", "view/base/vit", embeddings(2, 3, 4))
    monkeypatch.setattr(os, "link", no_links)
    store = Store(str(tmp_path / "without"))
    assert store.commit("00000", "view/base/vit", embeddings(2, 3, 4))
    assert not store.commit("00000", "view/base/vit", embeddings(2, 3, 4, seed=1))
    assert tree(tmp_path / "without") == tree(tmp_path / "with")


def test_two_writers_of_one_column_end_in_one_whole_column(tmp_path: Path) -> None:
    array = embeddings(6, 40, 16)
    Store(str(tmp_path / "one")).commit("00000", "view/base/vit", array)
    threads = [
        threading.Thread(target=Store(str(tmp_path / "two")).commit, args=("00000", "view/base/vit", array))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Store(str(tmp_path / "two")).objects.sweep()
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_sweep_removes_what_the_dead_have_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "status", np.zeros(1, np.uint8))
    here = socket.gethostname()
    dead, unburied = subprocess.Popen(["true"]), subprocess.Popen(["true"])
    dead.wait()
    os.waitid(os.P_PID, unburied.pid, os.WEXITED | os.WNOWAIT)
    names = {
        f"{here}~{dead.pid}~a": False,
        f"{here}~{unburied.pid}~z": False,
        f"{here}~{os.getpid()}~b": True,
        "elsewhere~1~c": True,
        "elsewhere~1~d": True,
    }
    for name in names:
        (tmp_path / ".partial").mkdir(exist_ok=True)
        (tmp_path / ".partial" / name).write_bytes(b"half")
    os.utime(tmp_path / ".partial/elsewhere~1~d", (0, 0))
    store.objects.sweep()
    assert {path.name for path in (tmp_path / ".partial").iterdir()} == {f"{here}~{os.getpid()}~b", "elsewhere~1~c"}
    for path in (tmp_path / ".partial").iterdir():
        path.unlink()
    store.objects.sweep()
    assert not (tmp_path / ".partial").exists()


def test_sweeping_beside_writers_breaks_no_commit(tmp_path: Path) -> None:
    store, done = Store(str(tmp_path)), threading.Event()
    others = [Store(str(tmp_path)) for _ in range(2)]

    def sweeping() -> None:
        while not done.is_set():
            for other in others:
                other.objects.sweep()

    thread = threading.Thread(target=sweeping)
    thread.start()
    try:
        for number in range(60):
            store.commit(f"{number:05d}", "status", np.zeros(3, np.uint8))
    finally:
        done.set()
        thread.join()
    assert len(store.shards()) == 60


def test_files_and_markers_are_no_shards(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "status", np.zeros(1, np.uint8))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").mkdir()
    assert store.shards() == ["00000"]


def damage_missing(chunk: Path) -> None:
    chunk.unlink()


def damage_empty(chunk: Path) -> None:
    chunk.write_bytes(b"")


def damage_truncated(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-5])


def damage_bit(chunk: Path) -> None:
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))


def damage_other_column(chunk: Path) -> None:
    shutil.copy(chunk.parents[1] / "conv" / chunk.name, chunk)


def damage_swapped_views(chunk: Path) -> None:
    """Two chunks of equal length change places: the index, and each chunk in itself, stay right."""
    data, (one, two) = bytearray(chunk.read_bytes()), chunks(chunk.parent)[1:3]
    assert one[1] == two[1]
    a, b = (data[offset : offset + length] for offset, length, _ in (one, two))
    data[one[0] : one[0] + one[1]], data[two[0] : two[0] + two[1]] = b, a
    chunk.write_bytes(bytes(data))


DAMAGES = [damage_missing, damage_empty, damage_truncated, damage_bit, damage_other_column, damage_swapped_views]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_never_read(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = Store(str(tmp_path))
    bits = np.random.default_rng(0).integers(0, 1 << 16, (2, 3, 10, 8), np.uint16)  # they do not shrink
    store.commit("00000", "view/base/vit", bits[0].view(BF16))
    store.commit("00000", "view/base/conv", bits[1].view(BF16))
    damage(tmp_path / "00000/view/base/vit/c.0.0.0")
    with pytest.raises(Corrupt, match="00000/view/base/vit"):
        store.check("00000", "view/base/vit")
    with pytest.raises(Corrupt, match="00000/view/base/vit"):
        store.read("00000", "view/base/vit")
    views = [lambda index=index: store.read("00000", "view/base/vit", index) for index in range(3)]
    assert any(raises_corrupt(view) for view in views)


def raises_corrupt(call: Callable[[], object]) -> bool:
    try:
        call()
    except Corrupt:
        return True
    return False


@pytest.fixture
def promised(tmp_path: Path) -> Store:
    """A store with a manifest, and two shards of one column."""
    recipe = Recipe(name="r", teachers={"vit": Teacher(model="x")}, captioners={})
    store = Store(str(tmp_path / "s"))
    store.promise(Manifest.of(recipe, {"teachers": {"vit": {}}, "captioners": {}}))
    for number, name in enumerate(("00000", "00001")):
        store.commit(name, "view/base/vit", embeddings(2, 3, 4, seed=number), f"data of {name}")
    return store


def test_a_column_of_another_shard_or_place_is_refused(promised: Store, tmp_path: Path) -> None:
    column = tmp_path / "s/00000/view/base/vit"
    shutil.rmtree(column)
    shutil.copytree(tmp_path / "s/00001/view/base/vit", column)
    for call in (promised.read, promised.check, promised.attributes):
        with pytest.raises(Corrupt, match="00000/view/base/vit is another's: its shard is 00001, and should be 00000"):
            call("00000", "view/base/vit")
    assert promised.read("00001", "view/base/vit").shape == (2, 3, 4)


def test_a_column_of_a_store_that_promises_something_else_is_refused(promised: Store, tmp_path: Path) -> None:
    other = Store(str(tmp_path / "other"))
    recipe = promised.promised().parsed_recipe().but(seed=1)
    other.promise(Manifest.of(recipe, {"teachers": {"vit": {}}, "captioners": {}}))
    other.commit("00000", "view/base/vit", embeddings(2, 3, 4))
    shutil.rmtree(tmp_path / "s/00000")
    shutil.copytree(tmp_path / "other/00000", tmp_path / "s/00000")
    with pytest.raises(Corrupt, match="is another's: its promise is"):
        promised.read("00000", "view/base/vit")


def test_a_column_of_other_images_is_refused(promised: Store) -> None:
    assert promised.read("00000", "view/base/vit", None, "data of 00000").shape == (2, 3, 4)
    with pytest.raises(Corrupt, match="belongs to other images"):
        promised.read("00000", "view/base/vit", None, "data of 00001")


def test_a_teacher_more_leaves_the_promises_of_the_others(promised: Store) -> None:
    manifest = promised.promised()
    recipe = manifest.parsed_recipe()
    vit, two = {"weights_sha256": "1"}, {"vit": Teacher(model="x"), "more": Teacher(model="y")}

    def manifest_of(recipe: Recipe, **teachers: object) -> Manifest:
        return Manifest.of(recipe, {"teachers": teachers, "captioners": {}})

    first = manifest_of(recipe, vit=vit)
    more = manifest_of(recipe.but(teachers=two), vit=vit, more={"weights_sha256": "2"})
    assert all(first.promise(column) == more.promise(column) for column in first.columns())
    promises = [more.promise(column) for column in more.columns()]
    assert len(set(promises)) == len(promises)
    other = manifest_of(recipe, vit={"weights_sha256": "3"})
    changed = [str(column) for column in first.columns() if first.promise(column) != other.promise(column)]
    assert changed == ["text/original/vit", "view/base/vit"]
    seeded = manifest_of(recipe.but(seed=5), vit=vit)
    changed = [str(column) for column in first.columns() if first.promise(column) != seeded.promise(column)]
    assert changed == ["view/base/augment", "view/base/pixels", "view/base/vit"]


def test_how_captions_are_read_is_promised_only_where_it_is_not_the_usual_way(promised: Store) -> None:
    """So that stores that were written before it could be asked for are what they were."""
    usual = promised.promised()
    assert not {"caption_keys", "caption_lines"} & usual.recipe.keys()
    for changes in ({"caption_keys": ("text",)}, {"caption_lines": True}):
        recipe = usual.parsed_recipe().but(**changes)
        other = Manifest.of(recipe, usual.models)
        assert other.parsed_recipe() == recipe and other.fingerprint != usual.fingerprint
        assert all(other.promise(column) != usual.promise(column) for column in usual.columns())
        with pytest.raises(ManifestMismatch, match=f"recipe.{next(iter(changes))}: the store has"):
            usual.check_recipe(recipe, "here")


@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_metadata_with_any_byte_changed_are_an_error_or_the_same(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    """Never another exception, and never another array."""
    root = tmp_path_factory.getbasetemp() / "flipped"
    array, store = embeddings(2, 3, 4), Store(str(root))
    if not root.exists():
        store.commit("00000", "view/base/vit", array)
    path = root / "00000/view/base/vit/zarr.json"
    written = path.read_bytes()
    data = bytearray(written)
    data[place % len(data)] ^= flip
    path.write_bytes(bytes(data))
    try:
        assert same_bits(store.read("00000", "view/base/vit"), array)  # white space
    except Corrupt as error:
        assert "00000/view/base/vit/zarr.json" in str(error)
    finally:
        path.write_bytes(written)


def test_a_store_whose_manifest_is_lost_or_edited_is_not_taken_for_a_new_one(promised: Store, tmp_path: Path) -> None:
    root = tmp_path / "s/zarr.json"
    written = root.read_text()
    manifest = promised.promised()
    faults = {
        "": "damaged",
        written.replace('"seed": 0', '"seed": 9'): "not as it was written",
        "{}": "not one of this",
    }
    for data, says in faults.items():
        root.write_text(data)
        with pytest.raises(StoreError, match=says):
            Store(promised.url).manifest()
    root.unlink()
    for call in (lambda store: store.manifest(), lambda store: store.promise(manifest), lambda store: store.promised()):
        with pytest.raises(StoreError, match="holds '00000' and no zarr.json: its manifest is lost"):
            call(Store(promised.url))


def test_all_zero_chunks_are_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/pixels", np.zeros((3, 4), np.uint64))
    assert len(chunks(tmp_path / "00000/view/base/pixels")) == 3


def test_a_foreign_zarr_store_is_refused(tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path))
    with pytest.raises(StoreError, match="not one of this project"):
        Store(str(tmp_path)).manifest()


def test_what_is_no_store_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file, and a store is a folder"):
        Store(str(tmp_path / "file")).manifest()
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"zarr.json is damaged"):
        Store(str(tmp_path)).manifest()
    with pytest.raises(ConfigError, match="address of the store is empty"):
        Store("")
