"""Promise 1: a column exists exactly when its zarr.json exists, whole. Promise 2: a doubled writer does no harm."""

import json
import os
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from reinforce.config import ClassSet, Recipe
from reinforce.errors import ConfigError, Corrupt, NotCommitted, StoreError
from reinforce.store.columns import CLASSES, Column, class_columns, columns
from reinforce.store.store import CHUNK_ROWS, Store
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
        *("key", "status", "size", "text/original/caption", "text/coca/caption"),
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
        *("key", "status", "size", "kinds/name", "kinds/vit", "kinds/conv")
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
    assert store.objects(CLASSES, "kinds/vit") == ["c.0.0"]
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


def test_one_view_reads_the_bytes_of_one_view(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/vit", embeddings(30, 50, 16))
    column = tmp_path / "00000/view/base/vit"
    for chunk in column.glob("c.*"):
        if not chunk.name.startswith("c.7."):
            chunk.write_bytes(b"")  # whoever touches another view's chunk fails
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
    replace, total = os.replace, len(wanted)
    for fatal in range(total):
        puts = 0

        def dying(source: str, target: str, fatal: int = fatal) -> None:
            nonlocal puts
            if puts == fatal:
                raise KeyboardInterrupt
            puts += 1
            replace(source, target)

        store = Store(str(tmp_path / f"n{fatal}"))
        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            store.commit("00000", "view/base/vit", array)
        monkeypatch.setattr(os, "replace", replace)
        assert not store.has("00000", "view/base/vit")
        store.commit("00000", "view/base/vit", array)
        store.sweep({"00000"})
        assert tree(tmp_path / f"n{fatal}") == wanted


def test_chunks_of_a_dead_run_that_do_not_belong_are_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s"))
    store.commit("00000", "view/base/vit", embeddings(5, 3, 4))
    (tmp_path / "s/00000/view/base/vit/zarr.json").unlink()
    store.commit("00000", "view/base/vit", embeddings(2, 3, 4))
    assert store.objects("00000", "view/base/vit") == ["c.0.0.0", "c.1.0.0"]


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
    Store(str(tmp_path / "two")).sweep({"00000"})
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_sweep_leaves_the_writes_of_other_shards_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "status", np.zeros(1, np.uint8))
    for name in ("00000~a", "00001~b", "~c"):
        (tmp_path / ".partial" / name).write_bytes(b"half")
    store.sweep({"00000"})
    assert [path.name for path in (tmp_path / ".partial").iterdir()] == ["00001~b"]
    store.sweep({"00001"})
    assert not (tmp_path / ".partial").exists()


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


def damage_other_view(chunk: Path) -> None:
    shutil.copy(chunk.with_name("c.2.0.0"), chunk)


@pytest.mark.parametrize("damage", [damage_missing, damage_empty, damage_truncated, damage_bit, damage_other_view])
def test_every_damage_is_found(tmp_path: Path, damage) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/vit", embeddings(3, 10, 8))
    damage(tmp_path / "00000/view/base/vit/c.1.0.0")
    with pytest.raises(Corrupt, match="00000/view/base/vit"):
        store.check("00000", "view/base/vit")
    if damage is not damage_other_view:  # its own checksum is right: only the column's knows
        with pytest.raises(Corrupt):
            store.read("00000", "view/base/vit")
    assert store.read("00000", "view/base/vit", 0).shape == (10, 8)


def test_all_zero_chunks_are_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.commit("00000", "view/base/pixels", np.zeros((3, 4), np.uint64))
    assert len(store.objects("00000", "view/base/pixels")) == 3


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
