"""Columns of a store for other programs: the same numbers of the same samples."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from reinforce.__main__ import app
from reinforce.exchange.columns import export_columns
from reinforce.store.store import Store
from tests import tiny
from tests.conftest import Reinforced
from tests.processes import here

WANTED = ["view/base/vit", "text/coca/caption", "view/base/augment", "view/base/pixels", "size", "text/original/conv"]


def expected(store: str, shard: str) -> dict[str, np.ndarray]:
    opened = Store(store)
    good = np.flatnonzero(opened.read(shard, "status") == 0)
    read = {name: opened.read(shard, name) for name in ["key", *WANTED]}
    return {name: array[good] if name in ("key", "size") else array[:, good] for name, array in read.items()}


def test_arrays(reinforced: Reinforced, tmp_path: Path) -> None:
    report = export_columns(reinforced.store, WANTED, tmp_path / "out", "npy")
    assert (report.shards, report.done, report.rows, report.files, report.failed) == (3, 3, 32, 21, [])
    for shard in ("00000", "00001"):  # the second has samples in quarantine
        for name, array in expected(reinforced.store, shard).items():
            got = np.load(tmp_path / "out" / shard / f"{name.replace('/', '.')}.npy", allow_pickle=False)
            assert got.shape == array.shape
            assert (got == (array.astype(np.float32) if "vit" in name or "conv" in name else array)).all()
            assert not name.endswith("vit") or got.dtype == np.float32


def test_tables(reinforced: Reinforced, tmp_path: Path) -> None:
    report = export_columns(reinforced.store, WANTED, tmp_path / "out", "parquet")
    assert (report.done, report.rows, report.files) == (3, 32, 3)
    table: dict[str, list[Any]] = parquet.read_table(tmp_path / "out/00001.parquet").to_pydict()
    found = expected(reinforced.store, "00001")
    assert table["key"] == found["key"].tolist() and table["size"] == found["size"].tolist()
    for name in set(WANTED) - {"size"}:
        for index, item in enumerate(found[name]):
            plain = item.astype(np.float32) if item.dtype.kind not in "OTu" else item
            assert table[f"{name}/{index}"] == plain.tolist()


def test_all_columns_and_a_second_time(reinforced: Reinforced, tmp_path: Path) -> None:
    asked = ["export", "columns", reinforced.store, "*", "--out", str(tmp_path / "out"), "--json"]
    code, out, _ = here(app, *asked)
    assert code == 0 and json.loads(out)["rows"] == 32
    before = tiny.tree(tmp_path / "out")
    code, out, err = here(app, *asked)
    assert (code, out) == (2, "") and "out is there already, and nothing is written over" in err
    assert tiny.tree(tmp_path / "out") == before
    names = {path.stem for path in (tmp_path / "out/00000").iterdir()}
    assert names == {str(column).replace("/", ".") for column in Store(reinforced.store).promised().columns()}


def test_faults_are_sentences(reinforced: Reinforced, tmp_path: Path) -> None:
    def asked(*arguments: str) -> tuple[int, str, str]:
        return here(app, "export", "columns", *arguments)

    code, _, err = asked(reinforced.store, "view/base/nobody", "--out", str(tmp_path / "out"))
    assert code == 2 and "has no column 'view/base/nobody'; it has: key, digest" in err
    (tmp_path / "file").write_text("")
    code, _, err = asked(reinforced.store, "size", "--out", str(tmp_path / "file"))
    assert code == 2 and "is there already" in err
    code, _, err = asked(reinforced.store, "size", "--out", str(tmp_path / "file/out"))
    assert code == 2 and "cannot be written" in err
    assert asked(str(tmp_path / "nothing"), "size", "--out", str(tmp_path / "out"))[0] == 2


def test_a_shard_that_is_not_whole_is_told(reinforced: Reinforced, tmp_path: Path) -> None:
    store = shutil.copytree(reinforced.store, tmp_path / "s")
    (store / "00000/view/base/vit/zarr.json").unlink()
    report = export_columns(str(store), ["view/base/vit"], tmp_path / "out", "npy")
    assert report.done == 2 and len(report.failed) == 1 and report.failed[0].startswith("00000: ")


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_class_texts_are_no_column_of_samples(reinforced: Reinforced, tmp_path: Path, form: str) -> None:
    code, _, err = here(
        app, "export", "columns", reinforced.store, "kinds/vit", "--out", str(tmp_path), "--format", form
    )
    assert code == 2 and "has no column 'kinds/vit'" in err
