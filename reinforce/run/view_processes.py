"""Views made in processes, for a GPU that threads could not feed.

By Pillow a view is a dozen calls, and between any two of them a thread needs Python's lock: threads together make
hardly more views than one alone, however many cores there are. With numba they need it far less, and on two cores make
as many as processes (`python -m benchmarks.augment --at-once 8`); on the many of a GPU's host that was not measured.

Each process decodes its share of a batch once and keeps it while the batch's views are made. Pixels come back through
memory that all share. Processes are forked, so that they begin with all that is loaded; none of them touches a GPU.
"""

import mmap
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeAlias

import numpy as np
from PIL import Image

from reinforce.config import ViewSet
from reinforce.data import augment, images, resize
from reinforce.errors import DeviceLost
from reinforce.run.batches import ROOM_BYTES, Batch, Room, View

SLOTS = 3  # views that are being made at a time, so that no process waits for the slowest
ORPHANED_S = 2.0  # how often a process looks whether its worker is still there


@dataclass(frozen=True)
class _Share:
    """What one process makes of a batch: rows `first`, `first + step`, .. They are the same of every batch, so that no
    process ever writes where another does."""

    view_set: ViewSet
    set_name: str
    seed: int
    first: int
    step: int
    sides: set[int]
    keys: list[str]
    encoded: list[bytes]


class ViewProcesses:
    """`num` processes, which end with this one."""

    def __init__(self, num: int, batch_size: int, sides: Mapping[str, set[int]], num_bytes: int = ROOM_BYTES) -> None:
        """`sides`: for each view set the sizes in pixels in which its views may be asked for. `num_bytes`: what the
        pictures that they keep may take together."""
        resize.has_numba()  # loaded here, it is loaded in all of them
        self._slots = {name: [_Slot(batch_size, of_set) for _ in range(SLOTS)] for name, of_set in sides.items()}
        self._processes = [
            ProcessPoolExecutor(1, get_context("fork"), _begin, (os.getpid(), self._slots, num_bytes // num))
            for _ in range(num)
        ]
        for process in self._processes:  # which is started when it is first asked for something
            process.submit(os.getpid)

    def views(self, batch: Batch, view_set: ViewSet, set_name: str, seed: int, sides: set[int]) -> Iterator[View]:
        """As `batches.views`, the same to the bit. Raises DeviceLost where a process has died."""
        try:
            yield from self._views(batch, view_set, set_name, seed, sides)
        except BrokenProcessPool as error:
            raise DeviceLost(
                "a process that makes views has died, perhaps for want of memory; use fewer of them (--view-processes)"
            ) from error

    def _views(self, batch: Batch, view_set: ViewSet, set_name: str, seed: int, sides: set[int]) -> Iterator[View]:
        num, step = len(batch.rows), len(self._processes)
        asked = self._processes[:num]
        held: list[Future[None]] = []
        for first, process in enumerate(asked):
            samples = batch.samples[first::step]
            keys, encoded = [sample.key for sample in samples], [sample.image for sample in samples]
            held.append(process.submit(_hold, _Share(view_set, set_name, seed, first, step, sides, keys, encoded)))
        pending: deque[list[Future[np.ndarray]]] = deque()
        for index in range(view_set.num_views + SLOTS):
            done = index - SLOTS
            if done >= 0:
                for share in held:
                    share.result()  # of one that failed, the views would only say that nothing is held
                parts = [future.result() for future in pending.popleft()]
                params = np.empty((num, parts[0].shape[1]), parts[0].dtype)
                for first, part in enumerate(parts):
                    params[first::step] = part
                pixels = self._slots[set_name][done % SLOTS].pixels
                yield View(done, params, {side: pixels[side][:num].copy() for side in sides})  # so the slot is free
            if index < view_set.num_views:
                pending.append([process.submit(_make, set_name, index % SLOTS) for process in asked])


class _Slot:
    """Room for the pixels of one view of a whole batch, in memory that is shared with processes forked from now on."""

    def __init__(self, batch_size: int, sides: set[int]) -> None:
        ends = np.cumsum([0, *(batch_size * side * side * 3 for side in sorted(sides))]).tolist()
        memory = np.frombuffer(mmap.mmap(-1, max(1, ends[-1])), np.uint8)
        self.pixels = {
            side: memory[start:end].reshape(batch_size, side, side, 3)
            for side, start, end in zip(sorted(sides), ends, ends[1:], strict=False)
        }


# -- in a process ------------------------------------------------------------------------------------------------------

_Views: TypeAlias = Iterator[tuple[np.ndarray, dict[int, np.ndarray]]]  # parameters (P,), and pixels of each size

_slots: dict[str, list[_Slot]] = {}
_held: dict[str, tuple[_Share, list[_Views]]] = {}  # of each view set, the last
_room = Room(0)


def _begin(worker: int, slots: dict[str, list[_Slot]], num_bytes: int) -> None:
    """Ctrl-C is for the worker, which ends this process; a worker that was killed cannot."""
    global _room
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(worker,), daemon=True).start()
    _slots.update(slots)
    _room = Room(num_bytes, largest_share=1)


def _end_with(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(ORPHANED_S)
    os._exit(1)


def _hold(share: _Share) -> None:
    _held.pop(share.set_name, None)  # of the batch before, whose memory is needed
    _held[share.set_name] = share, [_views(share, *of) for of in zip(share.keys, share.encoded, strict=True)]


def _views(share: _Share, key: str, encoded: bytes) -> _Views:
    """The views of one picture, one after the other: made when they are asked for if there is room for the picture,
    otherwise now."""

    def made(picture: Image.Image) -> _Views:
        size = (picture.height, picture.width)
        kept = _room.keep(picture)
        if kept is not None:
            return _made(share, key, size, kept)
        return iter(list(_made(share, key, size, resize.ready(picture))))

    return images.decode_for(made, encoded)


def _made(share: _Share, key: str, size: tuple[int, int], picture: resize.Picture) -> _Views:
    for index in range(share.view_set.num_views):
        params = augment.draw(share.view_set, share.seed, share.set_name, key, index, size)
        yield params, {side: augment.replay(picture, params, size, side) for side in share.sides}


def _make(set_name: str, slot: int) -> np.ndarray:
    """The parameters (n, P) of the next view of what is held; its pixels go to the slot."""
    share, views = _held[set_name]
    pixels, drawn = _slots[set_name][slot].pixels, []
    for i, (params, of_sides) in enumerate(map(next, views)):
        drawn.append(params)
        for side, view in of_sides.items():
            pixels[side][share.first + i * share.step] = view
    return np.stack(drawn)
