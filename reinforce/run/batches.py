"""What the models take: a shard as batches of decoded pictures, a batch as views, made ahead of need in threads."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from reinforce.config import CaptionFiles, ViewSet
from reinforce.data import augment, images, resize, shards
from reinforce.data.notes import Notes
from reinforce.data.shards import Sample, Shard, Status
from reinforce.errors import SampleError

T = TypeVar("T")


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


@dataclass(frozen=True)
class Batch:
    """Good samples that go through the models together, and where they stand in the shard."""

    rows: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """View `index` of a batch of n samples: `params` (n, P) and, for each side in pixels, uint8 (n, side, side, 3)."""

    index: int
    params: np.ndarray
    pixels: dict[int, np.ndarray]


def batches(shard: Shard, rows: Rows, batch_size: int, files: CaptionFiles | None, pool: Executor) -> Iterator[Batch]:
    """Decodes every sample once and notes it in `rows`; yields the good ones. Composition depends on the tar alone."""
    batch = Batch()
    samples = shards.read(shard, files, rows.notes)
    while group := list(islice(samples, batch_size)):
        for sample, (status, digest, picture, detail) in zip(group, pool.map(_decode, group), strict=True):
            if status != Status.GOOD:
                rows.details.setdefault(status, detail)
            rows.keys.append(sample.key)
            rows.digests.append(digest)
            rows.places.append((sample.offset, len(sample.image)) if picture else (0, 0))
            rows.statuses.append(status)
            rows.sizes.append((picture.height, picture.width) if picture else (0, 0))
            if picture:
                batch.rows.append(len(rows.keys) - 1)
                batch.samples.append(sample)
                batch.pictures.append(picture)
            if len(batch.rows) == batch_size:
                yield batch
                batch = Batch()
    if batch.rows:
        yield batch


def views(
    batch: Batch, view_set: ViewSet, set_name: str, seed: int, sides: Iterable[int], pool: Executor
) -> Iterator[View]:
    """The views of a batch, one index after the other, each replayed at every size that a model needs."""

    sizes = [(picture.height, picture.width) for picture in batch.pictures]
    pictures = list(pool.map(resize.ready, batch.pictures))

    def make(
        sample: Sample, picture: resize.Picture, size: tuple[int, int], index: int
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        params = augment.draw(view_set, seed, set_name, sample.key, index, size)
        return params, {side: augment.replay(picture, params, size, side) for side in sides}

    for index in range(view_set.num_views):
        made = list(pool.map(make, batch.samples, pictures, sizes, [index] * len(batch.rows)))
        pixels = {side: np.stack([replayed[side] for _, replayed in made]) for side in sides}
        yield View(index, np.stack([params for params, _ in made]), pixels)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, of which `depth` are made ahead of need in a thread. Starts at once, not at the first item."""
    thread = ThreadPoolExecutor(1)
    done = object()
    pending = deque(thread.submit(next, items, done) for _ in range(depth))

    def taken() -> Iterator[T]:
        with thread:
            while (item := pending.popleft().result()) is not done:
                pending.append(thread.submit(next, items, done))
                yield item  # type: ignore[misc]

    return taken()


def _decode(sample: Sample) -> tuple[Status, int, Image.Image | None, str]:
    """Status, digest, picture, and what is wrong where something is."""
    if sample.status != Status.GOOD:
        return sample.status, 0, None, sample.detail
    try:
        return Status.GOOD, shards.image_digest(sample.image), images.decode(sample.image), ""
    except SampleError as error:
        return Status(error.status), 0, None, f"{sample.key}: {error}"
