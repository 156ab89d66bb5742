"""What pictures may take of a process's memory: as docs/reinforcing.md says, and the same pixels."""

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reinforce.config import CAPTION_FILES, Recipe, RunOptions, ViewSet
from reinforce.data import images, resize, shards
from reinforce.data.images import WORKING
from reinforce.data.shards import Shard
from reinforce.run.batches import Room, Rows, View, ahead, batches, views
from reinforce.run.worker import Worker
from reinforce.store.store import Store
from tests import tiny
from tests.odd import encode, gradient

MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SET = ViewSet(num_views=5, view_px=64)


def peak(work: Callable[[], object]) -> int:
    """Bytes by which a process grows at most while it does some work."""

    def resident(name: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) << 10

    def child() -> None:
        # Not into holes that earlier tests left: those are given back, and large blocks come from the system.
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, MIB)
        glibc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
        work()
        told.put(resident("VmHWM") - before)

    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    process = fork.Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return int(told.get())


def shard_of(folder: Path, pictures: list[bytes]) -> Shard:
    folder.mkdir(exist_ok=True)
    shards.write(str(folder / "0.tar"), [(f"{i}", {"jpg": data, "txt": b"x"}) for i, data in enumerate(pictures)])
    return Shard("0", str(folder / "0.tar"))


def made(shard: Shard, room: Room, batch_size: int) -> list[View]:
    found = []
    with ThreadPoolExecutor(2) as pool:
        for batch in ahead(batches(shard, Rows(), batch_size, CAPTION_FILES, pool, room), 2, room):
            found += [*views(batch, SET, "base", 0, {24, 64}, pool, room.num_bytes)]
            del batch
    return found


def test_a_worker_takes_no_more_than_is_said(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve pictures of 18 MB in batches of four. With all bounds at an eighth, one is decoded at a time and none is
    kept; with a large room all are."""
    side = 2100
    monkeypatch.setattr(images, "_gate", images._Gate(images.AT_ONCE // 8))
    many = shard_of(tmp_path / "many", 12 * [encode(Image.new("RGB", (side, side), (200, 30, 40)), "JPEG")])
    few = shard_of(tmp_path / "few", [tiny.picture(0)])
    recipe = recipe.but(captioners={}, teachers={"vit": recipe.teachers["vit"]})
    grown = []
    for room in (4 * MIB, 1 << 30):
        worker = Worker(recipe, str(tmp_path / str(room)), RunOptions(device="cpu", decode_bytes=room))
        worker.reinforce(few)  # what is loaded and compiled here, is so in the child
        worker.store = Store(str(tmp_path / f"{room}-again"))
        grown.append(peak(lambda worker=worker: worker.reinforce(many)))  # type: ignore[misc]
    assert grown[0] < images.AT_ONCE // 8 + 3 * 4 * MIB < grown[1]


@pytest.mark.parametrize("num_bytes", [1 << 30, 16 * 4 * 3000, 100])
def test_views_do_not_depend_on_the_room(tmp_path: Path, num_bytes: int) -> None:
    """All pictures are kept, those that are small enough, none."""
    shard = shard_of(tmp_path, [tiny.picture(i) for i in range(11)])
    room = Room(num_bytes)
    for got, expected in zip(made(shard, room, 4), made(shard, Room(1 << 30), 4), strict=True):
        assert got.index == expected.index and got.params.tobytes() == expected.params.tobytes()
        assert all(np.array_equal(got.pixels[side], expected.pixels[side]) for side in (24, 64))
    gc.collect()
    assert room._free == num_bytes  # all was given back


def test_a_room_that_is_full_keeps_the_first(tmp_path: Path) -> None:
    room = Room(16 * 4 * 64 * 64)
    with ThreadPoolExecutor(1) as pool:
        shard = shard_of(tmp_path, [encode(gradient(64, 64), "JPEG")] * 20)
        [batch] = batches(shard, Rows(), 20, CAPTION_FILES, pool, room)
        kept = [picture is not None for picture in batch.pictures]
        assert not room and kept == sorted(kept, reverse=True) and 10 < sum(kept) < 16
        del batch
    assert room


def test_a_shard_whose_batches_fill_the_room_is_read_one_batch_ahead() -> None:
    taken = []

    def items():
        for number in range(5):
            taken.append(number)
            yield number

    for room, most in ((Room(1 << 20), 2), (Room(0), 1)):
        taken.clear()
        found = ahead(items(), 2, room)
        first = next(found)
        deadline = threading.Event()
        deadline.wait(0.1)
        assert (first, taken) == (0, [*range(1 + most)])
        assert list(found) == [1, 2, 3, 4]


def test_a_store_has_the_same_bytes_for_any_room(recipe: Recipe, tmp_path: Path) -> None:
    """Among small pictures some of 0.6 MB, which a room of 1 MiB does not keep."""
    large = encode(gradient(400, 350), "JPEG")
    shard = shard_of(tmp_path, [large if i % 3 else tiny.picture(i) for i in range(9)])
    for name, options in (
        ("plain", RunOptions(device="cpu")),
        ("bounded", RunOptions(device="cpu", decode_bytes=1 << 20)),
    ):
        assert Worker(recipe, str(tmp_path / name), options).reinforce(shard).error == ""
    assert tiny.tree(tmp_path / "plain") == tiny.tree(tmp_path / "bounded")


def test_decoding_takes_no_more_than_is_said() -> None:
    """The worst that is known, by format: a WebP with transparency that has to be turned."""
    side = 2100
    flat = Image.new("RGBA", (side, side), (200, 30, 40, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "webp": encode(flat, "WEBP", lossless=True, method=0, exif=exif),
        "png": encode(flat, "PNG", compress_level=1, exif=exif),
        "jpeg": encode(flat.convert("CMYK"), "JPEG", progressive=True, exif=exif),
    }

    def work(image: bytes) -> None:
        images.decode_for(resize.ready, image)

    resize.has_numba()
    for name, image in kinds.items():
        assert peak(lambda image=image: work(image)) < WORKING * side * side + 4 * MIB, name  # type: ignore[misc]


def test_pictures_that_are_decoded_at_once_share_a_bound() -> None:
    gate, at_once, most, lock = images._Gate(10), 0, 0, threading.Lock()

    def pass_through(num: int) -> None:
        nonlocal at_once, most
        with gate.passed(num):
            with lock:
                at_once += num
                most = max(most, at_once)
            threading.Event().wait(0.002)
            with lock:
                at_once -= num

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pass_through, [3, 4, 1, 9, 2, 5] * 8))
        assert 5 < most <= 10
        list(pool.map(pass_through, [25, 3]))  # one that is larger is let in alone
    assert most == 25


def test_a_header_that_lies_takes_no_memory_for_the_pixels_that_it_claims() -> None:
    """libjpeg would fill them up, and the picture be good."""
    for jpg in (encode(gradient(), "JPEG"), encode(gradient(), "JPEG", progressive=True)):
        sof = max(jpg.find(b"\xff\xc0"), jpg.find(b"\xff\xc2"))
        lies = jpg[: sof + 5] + b"\x24\x54\x24\x54" + jpg[sof + 9 :]  # 9300 x 9300

        def work(lies: bytes = lies) -> None:
            with pytest.raises(images.SampleError, match="86490000 pixels, and .* bytes cannot hold so many"):
                images.decode(lies)

        assert peak(work) < 8 * MIB


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "subsampling": 2, "quality": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_fewest_bytes_that_pixels_take_are_enough(mode: str, options: dict) -> None:
    assert images.decode(encode(Image.new(mode, (1600, 1600)), "JPEG", **options)).size == (1600, 1600)
