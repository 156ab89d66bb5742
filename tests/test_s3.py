"""Shards and store on S3: the real protocol, spoken by moto's server."""

import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from reinforce.check.info import info
from reinforce.check.verify import verify
from reinforce.config import Recipe, RunOptions, Teacher
from reinforce.data.shards import expand
from reinforce.errors import Corrupt, ManifestMismatch
from reinforce.run import driver
from reinforce.store.columns import columns
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store
from tests import tiny
from train.config import TrainConfig
from train.data.mixture import source_of

OPTIONS = RunOptions(workers="0", device="cpu")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # another test's has another server
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    yield fs
    fs.rm("bucket", recursive=True)  # moto keeps its buckets when a server stops
    server.stop()


def test_from_s3_to_s3_and_back(bucket, recipe: Recipe, tmp_path: Path) -> None:
    """The same objects as on a local disk; a lost chunk is found there too."""
    tars = [tiny.tar(tmp_path / f"{i:05d}.tar", 5 + i, i, seed=i) for i in range(2)]
    for tar in tars:
        bucket.put_file(tar, f"bucket/shards/{Path(tar).name}")
    remote, options = "s3://bucket/shards/{00000..00001}.tar", RunOptions(workers="0", device="cpu", max_invalid=0.5)
    report = driver.run(remote, "s3://bucket/store.zarr", recipe, options)
    assert (report.done, report.failed) == (2, [])
    driver.run("::".join(tars), str(tmp_path / "local"), recipe, options)
    objects = {
        path.removeprefix("bucket/store.zarr/"): bucket.cat_file(path) for path in bucket.find("bucket/store.zarr")
    }
    assert objects == tiny.tree(tmp_path / "local")

    assert driver.run(remote, "s3://bucket/store.zarr", recipe, options).already_there == 2
    assert info("s3://bucket/store.zarr") == info(str(tmp_path / "local"))
    doubt = verify("s3://bucket/store.zarr", remote, 5, "cpu")
    assert doubt.sound and doubt.replay and doubt.replay["pixel_equal"] == 5
    bucket.rm_file("bucket/store.zarr/00001/view/base/vit/c.0.0.0")
    assert [fault.split(":")[0] for fault in verify("s3://bucket/store.zarr", None, 0).corrupt] == [
        "00001/view/base/vit"
    ]
    with pytest.raises(Corrupt):
        Store("s3://bucket/store.zarr").read("00001", "view/base/vit", 1)


def test_two_writers_with_other_bytes_over_s3(bucket: Any) -> None:
    """The first one wins, object by object: puts are conditional."""
    store = Store("s3://bucket/s.zarr")
    first, late = (np.full((2, 3, 4), value, ml_dtypes.bfloat16) for value in (1, 2))
    assert store.commit("0", "view/base/vit", first)
    before = {path: bucket.cat_file(path) for path in bucket.find("bucket/s.zarr")}
    assert not store.commit("0", "view/base/vit", late)
    bucket.rm_file("bucket/s.zarr/0/view/base/vit/zarr.json")
    assert not store.commit("0", "view/base/vit", late)  # the object of the one that died is whole: it was the first
    assert {path: bucket.cat_file(path) for path in bucket.find("bucket/s.zarr")} == before
    assert (store.read("0", "view/base/vit") == first).all()
    assert not Store("s3://bucket/s.zarr").objects.create("0/zarr.json", b"other")


def test_two_recipes_that_start_at_once(bucket: Any) -> None:
    """Both find no store; the first manifest stays, and the other run is refused."""
    recipe = Recipe(name="r", teachers={"vit": Teacher(model="x")}, captioners={})
    models: dict[str, dict[str, Any]] = {"teachers": {"vit": {}}, "captioners": {}}
    first, second = (Store("s3://bucket/s.zarr") for _ in range(2))
    assert first.manifest() is None and second.manifest() is None
    first.promise(Manifest.of(recipe, models))
    with pytest.raises(ManifestMismatch, match="recipe.seed: the store has 0"):
        second.promise(Manifest.of(recipe.but(seed=1), models))
    assert Store("s3://bucket/s.zarr").promised().recipe["seed"] == 0


def test_how_often_a_server_is_asked(
    bucket: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many shards each costs a run two requests at most, besides its tar's length, and a training's start one."""
    num, tar = 12, tiny.tar(tmp_path / "t.tar", 3)
    for i in range(num):
        bucket.put_file(tar, f"bucket/shards/{i:05d}.tar")
    remote, store = "s3://bucket/shards/{00000..00011}.tar", "s3://bucket/store.zarr"
    driver.run(remote, store, recipe, OPTIONS)
    asked: list[str] = []
    call = S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)

    def requests(of: Callable[[], Any]) -> Counter[str]:
        asked.clear()
        of()
        return Counter(asked)

    whole = requests(lambda: driver.run(remote, store, recipe, OPTIONS))
    config = TrainConfig(student="vit_tiny", shards=remote, store=store, global_batch_size=8, workers=0)
    start = requests(lambda: source_of(config))
    listed, wanted = expand("s3://bucket/others/{a,b}{00000..00011}.tar"), columns(recipe)
    absent = requests(lambda: driver.lacking(Store(store), listed, wanted))
    few = 8  # for what there is one of, whatever the number of shards
    assert whole["head_object"] <= num + few and whole.total() <= 3 * num + few, whole
    assert start.total() <= num + few, start
    assert absent.total() <= few, absent


def test_a_marker_of_a_folder_is_no_shard(bucket: Any) -> None:
    store = Store("s3://bucket/s.zarr")
    store.commit("0", "status", np.zeros(2, np.uint8))
    bucket.pipe_file("bucket/s.zarr/", b"")
    bucket.pipe_file("bucket/s.zarr/notes.txt", b"mine")
    assert store.shards() == ["0"] and store.missing("0", ["status", "key"]) == ["key"]
