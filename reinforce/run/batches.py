"""What the models take: a shard as batches of decoded pictures, a batch as views, made ahead of need in threads.

What is decoded ahead of need is kept as long as there is room; of a picture that found none the views are made as soon
as it is decoded again. So pixels do not depend on the room, and memory hardly on how large the pictures are.
"""

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from reinforce.config import CaptionFiles, ViewSet
from reinforce.data import augment, images, resize, shards
from reinforce.data.notes import Notes
from reinforce.data.shards import Sample, Shard
from reinforce.data.status import Status
from reinforce.errors import SampleError

T = TypeVar("T")
Seen: TypeAlias = dict[str, np.ndarray]  # what captioners see of a picture, by their names
# Of each view: parameters (P,), pixels of each size, and the hash of those of the size that is hashed.
Made: TypeAlias = list[tuple[np.ndarray, dict[int, np.ndarray], int]]

ROOM_BYTES = 1 << 30  # of a worker on a CPU
ROWS_AT_ONCE = 4  # of a batch, whose views a thread makes in one go: to hand over each would cost much of a small view
LARGEST_SHARE = 16  # a picture that takes more of a room than this part of it is not kept: threads make crops of it


@dataclass
class Rows:
    """What is known of every sample of a shard, good or not, in the tar's order."""

    keys: list[str] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)  # 0 where it is not good
    places: list[tuple[int, int]] = field(default_factory=list)  # offset and length in the tar; 0, 0 where not good
    statuses: list[Status] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # height, width; 0, 0 where not decoded
    details: dict[Status, str] = field(default_factory=dict)  # of the first sample in quarantine for that reason
    notes: Notes = field(default_factory=Notes)  # what is in the tar and is not used

    @property
    def quarantined(self) -> dict[str, int]:
        """How many by reason."""
        counts = Counter(status.reason for status in self.statuses if status != Status.GOOD)
        return dict(sorted(counts.items()))

    def told(self) -> dict[str, Any]:
        """What a report says of it (run/reports.py)."""
        details = {status.reason: detail for status, detail in sorted(self.details.items())}
        return {
            "read": len(self.keys),
            "quarantined": self.quarantined,
            "noted": dict(sorted(self.notes.counts.items())),
            "first": details | dict(sorted(self.notes.first.items())),
        }

    def refusal(self, url: str, max_invalid: float) -> str:
        """Why a shard with so many bad samples, or with none at all, is not written; or nothing."""
        if not self.keys:
            found = "; ".join(self.notes.told()) or "it is empty"
            return (
                f"{url} holds no sample, that is KEY.jpg and KEY.txt side by side; repair it or leave it out: {found}"
            )
        num_bad = sum(self.quarantined.values())
        if num_bad <= max_invalid * len(self.keys):
            return ""
        reasons = "; ".join(
            f"{self.quarantined[status.reason]} are {status.reason}, as {detail}"
            for status, detail in sorted(self.details.items())
        )
        if len(self.details) == 1 and num_bad == len(self.keys):
            reasons = f"all are {reasons.partition(' are ')[2]}"
        return (
            f"{num_bad} of {len(self.keys)} samples are invalid, more than max_invalid={max_invalid:g} allows; repair "
            f"{url} or raise --max-invalid: {reasons}"
        )


class Room:
    """Bytes that the pictures of a worker and their files may take, all its shards together. What is in it gives its
    bytes back when it is let go of."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self._free, self._largest = num_bytes, num_bytes, num_bytes // LARGEST_SHARE
        self._changes = threading.RLock()  # a thread that takes may be made to collect what gives back

    def __bool__(self) -> bool:
        """Whether there is some left."""
        return self._free > self._largest

    def keep(self, picture: Image.Image) -> resize.Picture | None:
        """The picture as `resize.ready` makes it, where there is room for it."""
        num = 4 * picture.width * picture.height
        with self._changes:
            if num > min(self._free, self._largest):
                return None
            self._free -= num
        kept = resize.ready(picture)
        weakref.finalize(kept, self._give, num)
        return kept

    def charge(self, sample: Sample) -> None:
        """Its file is there already, whether there is room or not."""
        self._give(-len(sample.image))
        weakref.finalize(sample, self._give, len(sample.image))

    def _give(self, num: int) -> None:
        with self._changes:
            self._free += num


@dataclass(frozen=True)
class Batch:
    """Good samples that go through the models together, and where they stand in the shard. Of each the size (height,
    width) in pixels; what captioners see of it; and the picture as `resize.ready` makes it, where there was room."""

    rows: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    pictures: list[resize.Picture | None] = field(default_factory=list)

    def use(self, index: int, use: Callable[[resize.Picture], T]) -> T:
        """What `use` makes of the picture of one sample, which is decoded again where it was not kept."""
        kept = self.pictures[index]
        if kept is not None:
            return use(kept)
        return images.decode_for(lambda picture: use(resize.ready(picture)), self.samples[index].image)


@dataclass(frozen=True)
class View:
    """View `index` of a batch of n samples: `params` (n, P); for each side in pixels uint8 (n, side, side, 3); and
    `hashes` (n,) uint64 of the pixels of one side, or 0."""

    index: int
    params: np.ndarray
    pixels: dict[int, np.ndarray]
    hashes: np.ndarray


def batches(
    shard: Shard,
    rows: Rows,
    batch_size: int,
    files: CaptionFiles | None,
    pool: Executor,
    room: Room,
    see: Callable[[Image.Image], Seen] = lambda picture: {},
) -> Iterator[Batch]:
    """Decodes every sample once and notes it in `rows`; yields the good ones. Composition depends on the tar alone.

    Pictures are kept as long as there is `room`. `see`: asked once of each good one.
    """

    def decode(sample: Sample) -> _Decoded:
        room.charge(sample)
        return _decoded(sample, room.keep, see)

    batch = Batch()
    samples = shards.read(shard, files, rows.notes)
    while group := list(islice(samples, batch_size)):
        for sample, found in zip(group, pool.map(decode, group), strict=True):
            if found.status != Status.GOOD:
                rows.details.setdefault(found.status, found.detail)
            good = found.status == Status.GOOD
            rows.keys.append(sample.key)
            rows.digests.append(found.digest)
            rows.places.append((sample.offset, len(sample.image)) if good else (0, 0))
            rows.statuses.append(found.status)
            rows.sizes.append(found.size)
            if good:
                batch.rows.append(len(rows.keys) - 1)
                batch.samples.append(sample)
                batch.sizes.append(found.size)
                batch.seen.append(found.seen)
                batch.pictures.append(found.picture)
            if len(batch.rows) == batch_size:
                yield batch
                batch = Batch()
    if batch.rows:
        yield batch


def views(
    batch: Batch,
    view_set: ViewSet,
    set_name: str,
    seed: int,
    sides: Iterable[int],
    pool: Executor,
    num_bytes: int,
    hashed: int | None = None,
) -> Iterator[View]:
    """The views of a batch, one index after the other, each replayed at every size that a model needs. `hashed`: the
    side, one of `sides`, at which their pixels are hashed.

    Where a picture of the batch was not kept, as many views are made at a time as take `num_bytes`, and at least one.
    """
    sides = list(sides)

    def make(row: int, indices: range) -> Made:
        size, key = batch.sizes[row], batch.samples[row].key
        params = [augment.draw(view_set, seed, set_name, key, index, size) for index in indices]

        def replayed(picture: resize.Picture) -> Made:
            made = []
            for p in params:
                pixels = {side: augment.replay(picture, p, size, side) for side in sides}
                made.append((p, pixels, 0 if hashed is None else augment.pixel_hash(pixels[hashed])))
            return made

        return batch.use(row, replayed)

    def several(indices: range, rows: range) -> list[Made]:
        return [make(row, indices) for row in rows]

    num, at_once = len(batch.rows), 1
    if any(picture is None for picture in batch.pictures):
        at_once = max(1, num_bytes // max(1, sum(3 * num * side * side for side in sides)))
    for first in range(0, view_set.num_views, at_once):
        indices = range(first, min(first + at_once, view_set.num_views))
        groups = [range(row, min(row + ROWS_AT_ONCE, num)) for row in range(0, num, ROWS_AT_ONCE)]
        made = [of_sample for group in pool.map(partial(several, indices), groups) for of_sample in group]
        for place, index in enumerate(indices):
            of_all = [of_sample[place] for of_sample in made]
            pixels = {side: np.stack([replayed[side] for _, replayed, _ in of_all]) for side in sides}
            params, hashes = [params for params, _, _ in of_all], [proof for _, _, proof in of_all]
            yield View(index, np.stack(params), pixels, np.array(hashes, np.uint64))
        del made  # before the next are made


def ahead(items: Iterator[T], depth: int, room: Room | None = None) -> Iterator[T]:
    """The same items, of which `depth` are made ahead of need in a thread; where there is no `room` left, only the
    next. Starts at once, not at the first item."""
    thread = ThreadPoolExecutor(1)
    done = object()
    pending = deque(thread.submit(next, items, done) for _ in range(depth if room is None else 1))

    def taken() -> Iterator[T]:
        with thread:
            while (item := pending.popleft().result()) is not done:
                while not pending or (len(pending) < depth and (room is None or room)):
                    pending.append(thread.submit(next, items, done))
                yield item  # type: ignore[misc]
                del item  # its pictures go before the next are waited for

    return taken()


@dataclass(frozen=True)
class _Decoded:
    """What there is to know of a sample; of a bad one, what is wrong."""

    status: Status
    detail: str = ""
    digest: int = 0
    size: tuple[int, int] = (0, 0)
    seen: Seen = field(default_factory=dict)
    picture: resize.Picture | None = None


def _decoded(
    sample: Sample, keep: Callable[[Image.Image], resize.Picture | None], see: Callable[[Image.Image], Seen]
) -> _Decoded:
    if sample.status != Status.GOOD:
        return _Decoded(sample.status, sample.detail)

    def used(picture: Image.Image) -> _Decoded:
        size = (picture.height, picture.width)
        return _Decoded(Status.GOOD, "", shards.image_digest(sample.image), size, see(picture), keep(picture))

    try:
        return images.decode_for(used, sample.image)
    except SampleError as error:
        return _Decoded(Status(error.status), f"{sample.key}: {error}")
