"""Runs of several writers on one store, simulated. Every operation of the store may be the last of its writer, or the
moment when another writer goes on. It may fail; or succeed, and its answer be lost; a listing may be a moment old. And
the power may fail, which takes all writers, and of the names that no folder's sync has made durable a part.

The writers are real workers: `Worker.reinforce` reads a real tar and commits through a real `Store`. Only what they
would wait for is replaced: the objects lie in memory, and models answer at once. A seed decides everything: who goes on
after each operation, who dies, which operation fails. So a run that goes wrong can be run again.
"""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from reinforce.config import Captioner, Recipe, RunOptions, Teacher, ViewSet
from reinforce.data.shards import Shard
from reinforce.errors import ReinforceError, Unwritable
from reinforce.models.ensemble import Answers
from reinforce.run.batches import Room
from reinforce.run.loaded import Loaded
from reinforce.run.worker import Worker
from reinforce.store import arrays
from reinforce.store.arrays import Encoded, Items
from reinforce.store.columns import Column
from reinforce.store.manifest import Manifest
from reinforce.store.metadata import METADATA
from reinforce.store.store import Store
from tests import tiny

RECIPE = Recipe(
    name="simulated",
    teachers={"one": Teacher(model="x"), "two": Teacher(model="y")},
    captioners={"coca": Captioner(model="z", num_captions=2)},
    view_sets={"base": ViewSet(num_views=2, view_px=8)},
    batch_size=4,
)
WIDTH = 4
DECODED: dict[Any, np.ndarray] = {}


class Killed(BaseException):
    """The writer's process is gone: nothing of it runs any more, no `finally` that writes."""


@dataclass
class Disk:
    """The objects that all writers see. `committed`: columns whose metadata have been there, with what they were;
    `promised`: those of which a writer has been told so. `fresh`: objects whose names a power cut may take."""

    objects: dict[str, bytes] = field(default_factory=dict)
    committed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    promised: set[str] = field(default_factory=set)
    fresh: set[str] = field(default_factory=set)
    before: list[list[str]] = field(default_factory=lambda: [[]])  # the paths after each of the latest changes
    faults: list[str] = field(default_factory=list)

    def put(self, path: str, data: bytes) -> bool:
        if path in self.objects:
            return False
        self.objects[path] = data
        self.fresh.add(path)
        self._changed()
        folder, _, name = path.rpartition("/")
        if name == METADATA and folder.count("/") != 0 and b'"array"' in data:
            self.committed[folder] = self.column(folder)
        return True

    def remove(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if folder in self.committed:
            self.faults.append(f"{path} of a committed column was removed")
        self.objects.pop(path, None)
        self._changed()

    def sync(self, folder: str) -> None:
        """The names in a folder and in those above it."""
        folders = {str(PurePosixPath(folder)), *map(str, PurePosixPath(folder).parents)}
        self.fresh = {path for path in self.fresh if str(PurePosixPath(path).parent) not in folders}

    def power_cut(self, rng: random.Random) -> None:
        for path in sorted(self.fresh):
            if path in self.objects and rng.random() < 0.5:
                del self.objects[path]
        for folder in [folder for folder in self.committed if f"{folder}/{METADATA}" not in self.objects]:
            del self.committed[folder]
            if folder in self.promised:
                self.faults.append(f"{folder} was said to be committed, and the power cut took it")
        self._changed()

    def _changed(self) -> None:
        self.before = [*self.before[-3:], list(self.objects)]

    def check(self) -> None:
        for folder, was in self.committed.items():
            if self.column(folder) != was:
                self.faults.append(f"{folder} was changed after it had been committed")

    def column(self, folder: str) -> dict[str, bytes]:
        return {path: data for path, data in self.objects.items() if path.rpartition("/")[0] == folder}


class Objects:
    """The interface of `reinforce.store.objects.Objects`, over a Disk; before and after each operation of a writer the
    scheduler is asked. `age` says how many changes ago a listing was made."""

    local = False

    def __init__(self, disk: Disk, pause: Callable[[str], None], age: Callable[[], int] = lambda: 0) -> None:
        self.url = self.root = "simulated"
        self.disk, self._pause, self._age = disk, pause, age

    def get(self, path: str) -> bytes:
        self._pause(f"get {path}")
        if path not in self.disk.objects:
            raise FileNotFoundError(path)
        return self.disk.objects[path]

    def exists(self, path: str) -> bool:
        self._pause(f"exists {path}")
        return path in self.disk.objects

    def files(self, folder: str) -> list[str]:
        return [name for name in self.tree(folder) if "/" not in name]

    def folders(self, folder: str = "") -> list[str]:
        return sorted({path.partition("/")[0] for path in self.tree(folder) if "/" in path})

    def tree(self, folder: str) -> list[str]:
        self._pause(f"list {folder}")
        prefix = f"{folder}/" if folder else ""
        listed = self.disk.before[-1 - min(self._age(), len(self.disk.before) - 1)]
        return sorted(path.removeprefix(prefix) for path in listed if path.startswith(prefix))

    def there(self, folder: str, paths: Iterable[str]) -> set[str]:
        return set(self.tree(folder)).intersection(paths)

    def create(self, path: str, *parts: bytes) -> bool:
        self._pause(f"before create {path}")
        created = self.disk.put(path, b"".join(parts))
        self._pause(f"after create {path}")
        return created

    def remove(self, path: str) -> None:
        self._pause(f"before remove {path}")
        self.disk.remove(path)
        self._pause(f"after remove {path}")

    def sync(self, folder: str) -> None:
        self._pause(f"before sync {folder}")
        self.disk.sync(folder)


class FakeTeacher:
    """Embeddings that tell what they are of. `kind` is the device: it moves the last bit of one number."""

    image_px, width = 8, WIDTH

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def encode_images(self, views: np.ndarray) -> np.ndarray:
        return self._of([view.tobytes() for view in views])

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return self._of([text.encode() for text in texts])

    def _of(self, things: list[bytes]) -> np.ndarray:
        rows = [np.random.default_rng(list(thing[:64]) + [1]).normal(size=WIDTH - 1) for thing in things]
        return np.array([[*row, self.kind] for row in rows]).astype(ml_dtypes.bfloat16)


class FakeEnsemble:
    def __init__(self, teachers: dict[str, FakeTeacher]) -> None:
        self.teachers = teachers

    def encode_images(self, names: Iterable[str], views: dict[int, np.ndarray]) -> Answers:
        return lambda: {name: self.teachers[name].encode_images(views[FakeTeacher.image_px]) for name in names}

    def tokens(self, names: Iterable[str], texts: list[str]) -> list[str]:
        return texts

    def encode_tokens(self, names: Iterable[str], tokens: list[str], num: int) -> Answers:
        return lambda: {name: self.teachers[name].encode_texts(tokens) for name in names}


class FakeCaptioner:
    def __init__(self, kind: int) -> None:
        self.kind = kind

    def preprocess(self, picture: Any) -> np.ndarray:
        return np.zeros(1, np.uint8)

    def caption(self, inputs: Any, seed: int, set_name: str, keys: list[str]) -> list[list[str]]:
        return [[f"{key} {index} as seen by {self.kind}" for key in keys] for index in range(2)]


class SimulatedStore(Store):
    """A Store over objects in memory."""

    def __init__(self, objects: Objects) -> None:
        super().__init__("memory://simulated")
        self.objects, self._disk = objects, objects.disk  # type: ignore[assignment]

    def commit(self, shard: str, column: Column | str, items: np.ndarray | Items, data: str = "", **more: Any) -> bool:
        ours = super().commit(shard, column, items, data, **more)
        self._disk.promised.add(f"{shard}/{column}")
        return ours

    def read(self, shard: str, column: Column | str, index: int | None = None, data: str | None = None) -> np.ndarray:
        """Of the same objects the same array: decoding them takes most of the time of a simulation."""
        promise = self.promised().fingerprint  # what a column is compared with, besides its own objects
        key = promise, index, data, *sorted(self._disk.column(f"{shard}/{column}").items())
        if key in DECODED:
            self.objects.get(f"{shard}/{column}/{METADATA}")
        else:
            DECODED[key] = super().read(shard, column, index, data)
        return DECODED[key]

    def _zarr(self) -> MemoryStore:
        buffer = default_buffer_prototype().buffer
        there = {path: buffer.from_bytes(data) for path, data in self._disk.objects.items()}
        return MemoryStore(there, read_only=True)


def encode(items: np.ndarray | Items, row_axis: int, packing: str = "bf16") -> Encoded:
    """`arrays.encode`, which gives the same for the same array, and takes most of the time of a simulation."""
    array = np.array(list(items))
    data = "".join(f"{text}\0" for text in array.ravel()).encode() if array.dtype.kind in "UO" else array.tobytes()
    key = data, array.dtype.kind, array.shape, row_axis
    if key not in ENCODED:
        ENCODED[key] = ENCODE(array, row_axis)
    return ENCODED[key]


ENCODE = arrays.encode
ENCODED: dict[Any, Encoded] = {}


@lru_cache(1)
def tars(folder: str) -> list[Shard]:
    return [Shard(f"{i:05d}", tiny.tar(Path(folder) / f"{i:05d}.tar", 3, seed=i)) for i in range(2)]


def worker(objects: Objects, kind: int) -> Worker:
    """A real one but for its models, on a device of that kind."""
    made = Worker.__new__(Worker)
    made.recipe, made.options = RECIPE, RunOptions(device="cpu")
    made.store = SimulatedStore(objects)
    teachers = {name: FakeTeacher(kind) for name in RECIPE.teachers}
    loaded: Any = Loaded.__new__(Loaded)
    loaded.recipe, loaded.threads, loaded.views_ahead = RECIPE, 1, 2
    loaded.teachers, loaded.ensemble = teachers, FakeEnsemble(teachers)
    loaded.captioners, loaded.room = {"coca": FakeCaptioner(kind)}, Room(1 << 30)
    made.loaded = loaded
    made._models, made.samples = threading.Lock(), 0
    models: dict[str, dict[str, Any]] = {"teachers": {"one": {}, "two": {}}, "captioners": {"coca": {}}}
    made.manifest = Manifest.of(RECIPE, models)
    made.columns = made.manifest.columns()
    return made


class Scheduler:
    """One writer runs at a time. After each operation the seed says which goes on, and what befalls it."""

    def __init__(self, rng: random.Random, disk: Disk) -> None:
        self.rng, self.disk, self.turn = rng, disk, threading.Condition()
        self.dark = False
        self.alive: list[int] = []
        self.now = -1
        self.log: list[str] = []

    def pause(self, writer: int, operation: str) -> None:
        with self.turn:
            self.log.append(f"writer {writer}: {operation}")
            if self.dark:
                raise Killed
            fate = self.rng.random()
            if fate < 0.001:
                self.log.append("the power fails")
                self.dark = True
                self.disk.power_cut(self.rng)
                raise Killed
            if fate < 0.005:
                self.log.append(f"writer {writer} is killed")
                raise Killed
            if fate < 0.013:
                self.log.append(f"writer {writer}: an error, or no answer")
                # The one is tried again, the other ends the run.
                number = self.rng.choice((errno.EIO, errno.ENOSPC))
                raise OSError(number, os.strerror(number))
            if self.rng.random() < 0.4:
                self._pass_on()
            while self.now != writer:
                self.turn.wait()

    def leave(self, writer: int) -> None:
        with self.turn:
            self.alive.remove(writer)
            self._pass_on()

    def begin(self, writer: int) -> None:
        with self.turn:
            while self.now != writer:
                self.turn.wait()

    def _pass_on(self) -> None:
        self.now = self.rng.choice(self.alive) if self.alive else -1
        self.turn.notify_all()


def simulate(seed: int, folder: str) -> tuple[list[str], list[str]]:
    """Faults, and what happened before them."""
    rng = random.Random(seed)
    disk = Disk()
    scheduler = Scheduler(rng, disk)
    kinds = [rng.randrange(2) for _ in range(rng.choice((1, 2, 3)))]
    scheduler.alive = list(range(len(kinds)))

    def age() -> int:
        return rng.randrange(4) if rng.random() < 0.2 else 0

    def write(number: int) -> None:
        scheduler.begin(number)
        try:
            objects = Objects(disk, lambda operation: scheduler.pause(number, operation), age)
            made = worker(objects, kinds[number])
            for shard in rng.sample(tars(folder), 2):
                for _ in range(3):  # as the driver does
                    try:
                        made.reinforce(shard)
                        break
                    except OSError:
                        continue
        except (Killed, OSError, Unwritable):
            pass
        except Exception as error:  # a fault of ours, whatever it is: it is told with its seed
            disk.faults.append(f"writer {number}: {type(error).__name__}: {error}")
        finally:
            scheduler.leave(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in scheduler.alive]
    for thread in threads:
        thread.start()
    with scheduler.turn:
        scheduler._pass_on()
    for thread in threads:
        thread.join(60)
        if thread.is_alive():
            return [f"seed {seed}: a writer hangs"], scheduler.log
    calm = worker(Objects(disk, lambda operation: None), rng.randrange(2))
    try:
        disk.faults += [error for shard in tars(folder) if (error := calm.reinforce(shard).error)]
        disk.faults += wrong(calm.store, tars(folder))
    except ReinforceError as error:
        disk.faults.append(f"the run after all: {type(error).__name__}: {error}")
    disk.check()
    return [f"seed {seed}: {fault}" for fault in disk.faults], scheduler.log


def wrong(store: Store, listed: list[Shard]) -> Iterator[str]:
    """What is not as one writer alone would have left it."""
    for shard in listed:
        columns = store.promised().columns()
        if absent := store.missing(shard.name, columns):
            yield f"{shard.name}: {absent} are lost"
            continue
        data = store.identity(shard.name)
        read = {str(column): store.read(shard.name, column, None, data) for column in columns}
        captions = read["text/coca/caption"]
        for name in RECIPE.teachers:
            for path, expected in (
                (f"text/coca/{name}", [FakeTeacher(0).encode_texts(row.tolist()) for row in captions]),
                (
                    f"text/original/{name}",
                    [FakeTeacher(0).encode_texts(r.tolist()) for r in read["text/original/caption"]],
                ),
            ):
                if not np.array_equal(read[path][..., :-1], np.array(expected)[..., :-1]):
                    yield f"{shard.name}/{path}: embeddings of other texts than those stored"
        for path, array in read.items():
            kinds = set(array[..., -1].astype(float).ravel()) if path.endswith(("/one", "/two")) else {0.0}
            if path == "text/coca/caption":
                kinds = {float(text[-1]) for text in array.ravel()}
            if len(kinds) != 1:
                yield f"{shard.name}/{path}: rows of two writers"
