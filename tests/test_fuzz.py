"""Mutated tars, images and metadata of a store: nothing but our own errors, no hang, counts that balance, memory within
the stated bound.

`make fuzz FUZZ_ROUNDS=100000`. A round is made of its number alone: `FUZZ_SEED=17 FUZZ_ROUNDS=1 make fuzz` runs one.
"""

import json
import os
import random
import resource
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from reinforce.check.info import info, quarantine
from reinforce.check.verify import verify
from reinforce.config import CAPTION_FILES, Recipe, RunOptions, ViewSet
from reinforce.data import images, shards
from reinforce.data.shards import Shard
from reinforce.data.status import Status
from reinforce.errors import ReinforceError, SampleError, ShardError
from reinforce.run import driver
from reinforce.run.batches import Room, Rows, batches, views
from reinforce.store.metadata import METADATA, sealed
from reinforce.store.reader import StoreReader
from tests import broken, odd, tiny

ROUNDS, SEED = int(os.environ.get("FUZZ_ROUNDS", 2000)), int(os.environ.get("FUZZ_SEED", 0))
PARTS = 4  # tests that share the rounds
LIMIT_S = 60  # of a round, on a machine that does other things, too
ROOM = 1 << 20
NUMBERS = [0, 1, 7, 8, 255, 511, 512, 513, 9300, 65535, 1 << 20, (1 << 31) - 1, 1 << 33, (1 << 63) - 1, -1]
VALUES: list[Any] = [None, True, -1, 0, 1 << 40, 0.5, float("nan"), "", "x", "\x1b[2K", "9" * 5000]
VALUES += [[], [None], {}, {"a": []}]
# Of a header: where a field begins, its length, and what is put there; a size is made of NUMBERS.
NAMES = [b"x.jpg", b"../../a.txt", b"a\x1b[2K\n.jpg", "\u202e.jpg".encode(), b"", b"a" * 99, b"b.jpg/", b"1.2.3.png"]
SIZE, TYPE = (124, 12), (156, 1)
FIELDS = [(0, 100), SIZE, SIZE, TYPE, TYPE, (157, 100), (257, 8), (345, 155)]


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut out, doubled, moved, or put in."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start = rng.randrange(len(out) + 1)
        end = min(len(out), start + rng.choice([1, 1, 2, 4, 16, 512, 4096]))
        kind = rng.randrange(7)
        if kind == 0 and start < len(out):
            out[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[start:end] = rng.randbytes(end - start)
        elif kind == 2:
            out[start:end] = bytes(end - start)
        elif kind == 3:
            del out[start:end]
        elif kind == 4:
            out[start:start] = out[start:end] * rng.choice([1, 1, 50])
        elif kind == 5:
            size = rng.choice([1, 2, 4])
            number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
            out[start : start + size] = number.to_bytes(size, rng.choice(["big", "little"]))
        elif rng.random() < 0.3:
            del out[start:]
    return bytes(out)


def mutated_image(image: bytes, rng: random.Random) -> bytes:
    """Now and then a size in the header, or a PNG whose checksums are right again, so that more of it is read."""
    if image.startswith(b"\x89PNG") and rng.random() < 0.5:
        chunks, at = [], 8
        while at + 12 <= len(image):
            length = int.from_bytes(image[at : at + 4], "big")
            chunks.append((image[at + 4 : at + 8], image[at + 8 : at + 8 + length]))
            at += 12 + length
        i = rng.randrange(len(chunks))
        chunks[i] = chunks[i][0], mutated(chunks[i][1], rng)
        return image[:8] + b"".join(odd.chunk(*chunk) for chunk in chunks)
    sof = image.find(rng.choice([b"\xff\xc0", b"\xff\xc2"]))
    if image.startswith(b"\xff\xd8") and sof > 0 and rng.random() < 0.3:
        image = image[: sof + 5] + rng.randbytes(4) + image[sof + 9 :]
    return mutated(image, rng)


def mutated_tar(tar: bytes, rng: random.Random) -> bytes:
    """Now and then a header whose checksum is right again."""
    headers = [at for at in range(0, len(tar) - 511, 512) if tar[at + 257 : at + 262] == b"ustar"]
    if headers and rng.random() < 0.6:
        at = rng.choice(headers)
        header = bytearray(tar[at : at + 512])
        field = start, length = rng.choice(FIELDS)
        told = rng.choice(NAMES)
        if field == SIZE:
            octal = b"%011o\0" % (rng.choice(NUMBERS) % (1 << 33))
            told = rng.choice([octal, b"\x80" + rng.randbytes(11), b"-1", b"\xff" * 12])
        elif field == TYPE:
            told = rng.choice([b"0", b"1", b"2", b"5", b"S", b"x", b"g", b"L", b"K", b"V", b"7", b"\0", b"z"])
        header[start : start + length] = told[:length].ljust(length, b"\0")
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]  # type: ignore[attr-defined]
        tar = tar[:at] + bytes(header) + tar[at + 512 :]
        if rng.random() < 0.7:
            return tar
    return mutated(tar, rng)


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """JSON with one node of it another."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        new = tree.copy()
        if rng.random() < 0.1:
            del new[key]
        else:
            new[key] = mutated_tree(tree[key], rng)
        return new
    if isinstance(tree, int) and rng.random() < 0.5:
        return rng.choice(NUMBERS)
    return rng.choice(VALUES)


# -- rounds ------------------------------------------------------------------------------------------------------------


@cache
def base_images() -> list[bytes]:
    return [*(image for image, _ in odd.odd_images().values() if image), *map(tiny.picture, range(6))]


@cache
def base_tars() -> list[bytes]:
    few = [m for i in range(4) for m in broken.members(f"{i}", jpg=tiny.picture(i), txt=b"a picture", json=b'["b"]')]
    more = [data for name, (data, _) in broken.all_tars().items() if name not in ("images.tar", "captions.tar")]
    of_captions = [
        broken.tar(*broken.members(key, jpg=odd.ARITHMETIC_JPEG, **parts))
        for key, (parts, _, _) in odd.odd_captions().items()
        if sum(map(len, parts.values())) < 10_000
    ]
    formats = [broken.tar(*few, format=kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
    return [*formats * 20, *(data for data in more if len(data) < 1 << 20), *of_captions]


def round_of_an_image(rng: random.Random, store: Path, folder: Path) -> str:
    try:
        picture = images.decode(mutated_image(rng.choice(base_images()), rng))
    except SampleError as error:
        assert str(error) and error.status != Status.GOOD
        return Status(error.status).reason
    assert picture.mode == "RGB" and 0 < picture.width * picture.height <= images.MAX_PIXELS
    return "good"


def round_of_a_tar(rng: random.Random, store: Path, folder: Path) -> str:
    """As a worker reads it: batches, and views of each."""
    path = folder / "0.tar"
    path.write_bytes(mutated_tar(rng.choice(base_tars()), rng))
    shard, rows, room, good = Shard("0", str(path)), Rows(), Room(ROOM), []
    try:
        with ThreadPoolExecutor(1) as pool:
            for batch in batches(shard, rows, 4, CAPTION_FILES, pool, room):
                good += batch.rows
                for view in views(batch, ViewSet(num_views=2), "base", 0, {8}, pool, ROOM):
                    assert len(view.params) == len(batch.rows) == len(view.pixels[8])
    except ShardError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
        return "refused"
    bad = rows.quarantined
    assert len(rows.keys) == len(good) + sum(bad.values()), "counts do not balance"
    assert {len(column) for column in (rows.digests, rows.places, rows.statuses, rows.sizes)} == {len(rows.keys)}
    assert {*good} == {row for row, status in enumerate(rows.statuses) if status == Status.GOOD}
    assert all(rows.details[Status[reason.upper()]] for reason in bad)
    places = shards.locate(str(path))
    assert [place.key for place in places] == rows.keys
    assert all((places[row].offset, places[row].length) == rows.places[row] for row in good)
    return "quarantined" if bad else "good"


def round_of_metadata(rng: random.Random, store: Path, folder: Path) -> str:
    """An object of the store is another: bytes, or sound JSON under a checksum that is right."""
    objects = sorted(path for path in store.rglob("*") if path.is_file())
    metadata = [path for path in objects if path.suffix == ".json"]
    path = rng.choice(metadata) if rng.random() < 0.8 else rng.choice(objects)
    data = path.read_bytes()
    new = mutated(data, rng)
    if path.suffix == ".json" and rng.random() < 0.8:
        tree = mutated_tree(json.loads(data), rng)
        right = path.name == METADATA and isinstance(tree, dict) and isinstance(tree.get("attributes"), dict)
        new = sealed(tree) if right and rng.random() < 0.8 else json.dumps(tree, indent=2).encode()
    path.write_bytes(new)
    found = "sound" if new == data else "not seen"
    try:
        for use in (_look, _read, _verify):
            try:
                found = use(str(store)) or found
            except ReinforceError as error:
                assert str(error)
                found = type(error).__name__
    finally:
        path.write_bytes(data)
    return found


def _look(store: str) -> str:
    return str(info(store) and list(quarantine(store)) and "")


def _read(store: str) -> str:
    reader = StoreReader(store)
    for name in reader:
        shard = reader[name]
        for column in shard.columns:
            shard.array(column)
    return ""


def _verify(store: str) -> str:
    report = verify(store, None, 0)
    return "" if report.sound else "found by verify"


KINDS: list[tuple[Callable[[random.Random, Path, Path], str], int]] = [
    (round_of_an_image, 24),
    (round_of_a_tar, 15),
    (round_of_metadata, 1),
]


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tar = tiny.tar(folder / "00000.tar", 3, 1)
    few = recipe.but(captioners={}, teachers={"vit": recipe.teachers["vit"]})
    driver.run(tar, str(folder / "s"), few, RunOptions(workers="0", device="cpu", max_invalid=1))
    return folder / "s"


def run_round(number: int, store: Path, folder: Path) -> str:
    rng = random.Random(number)
    [kind] = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
    try:
        signal.alarm(LIMIT_S)
        return f"{kind.__name__.rpartition('_')[2]}: {kind(rng, store, folder)}"
    except BaseException as error:
        raise AssertionError(f"FUZZ_SEED={number} FUZZ_ROUNDS=1 make fuzz: {kind.__name__}: {error!r}") from error
    finally:
        signal.alarm(0)


@pytest.mark.timeout(0)  # each round has its own
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_but_our_own_errors(part: int, store: Path, tmp_path: Path) -> None:
    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    try:
        found = Counter(run_round(number, store, tmp_path) for number in range(SEED + part, SEED + ROUNDS, PARTS))
    finally:
        signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - started
    print(f"{sum(found.values())} rounds, {grown >> 20} MiB more than before: {dict(found)}")
    assert grown < 2 * ROOM + images.WORKING * images.MAX_PIXELS
    assert ROUNDS < 1000 or len(found) > 9  # mutations reach deep
