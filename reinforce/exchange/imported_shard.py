"""One shard in the making, of records that others made of its images."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from reinforce.config import ORIGINAL, Recipe
from reinforce.data import augment
from reinforce.data.resize import Picture
from reinforce.data.shards import Sample, Shard
from reinforce.data.status import Status
from reinforce.errors import ReplayError
from reinforce.exchange.datacompdr import Record
from reinforce.run.batches import Batch, Rows
from reinforce.store.columns import DIGEST, KEY, PLACE, SIZE, STATUS, Column

_LEAST_REACH = 0.9  # of thirty crops one nearly always comes to the right and lower edge

# Of a sample whose image has this (height, width): its record, or None.
RecordOf: TypeAlias = Callable[[Sample, tuple[int, int]], Record | None]


class ImportedShard:
    """The columns of one shard, filled batch by batch of its images."""

    def __init__(self, recipe: Recipe, widths: dict[str, int], record_of: RecordOf, absent: str) -> None:
        self.recipe, self.widths, self.record_of, self.absent = recipe, widths, record_of, absent
        self.rows = Rows()
        self.found: dict[int, tuple[Record, list[str], np.ndarray]] = {}  # by row, with captions and pixel hashes
        self.reaches: list[float] = []

    def take(self, batch: Batch, pool: Executor) -> None:
        """The good samples of a batch, of which those without a fitting record are none."""
        [view_set] = self.recipe.view_sets.values()

        def hashes(index: int, record: Record | None) -> np.ndarray | None:
            if record is None:
                return None

            def of_views(picture: Picture) -> np.ndarray:
                views = (augment.replay(picture, p, batch.sizes[index], view_set.view_px) for p in record.params)
                return np.array([augment.pixel_hash(view) for view in views], np.uint64)

            try:
                return batch.use(index, of_views)
            except ReplayError:
                return None

        records = [self._record(sample, row) for sample, row in zip(batch.samples, batch.rows, strict=True)]
        hashed = pool.map(hashes, range(len(batch.rows)), records)
        for row, sample, record, pixels in zip(batch.rows, batch.samples, records, hashed, strict=True):
            if record is None or pixels is None:
                self._leave_out(row, Status.OTHER_SIZE if record else Status.NO_RECORD, sample.key)
                continue
            self.found[row] = (record, sample.repeated(self.recipe.num_original_captions), pixels)
            ends = (record.params[:, :2] + record.params[:, 2:4]).max(0) / self.rows.sizes[row]
            self.reaches.append(float(ends.min()))

    def enlarged(self, shard: Shard) -> str:
        """Why these cannot be the images that were reinforced, or nothing: crops stay far from their edges."""
        if len(self.reaches) < 20 or np.median(self.reaches) > _LEAST_REACH:
            return ""
        return (
            f"the crops reach over {np.median(self.reaches):.0%} of the images of {shard.url} only: they are larger "
            "than those that were reinforced; give the images in their original size"
        )

    def arrays(self) -> dict[Column, np.ndarray]:
        """Rows that are left out hold NaN, 0 or an empty text."""
        recipe, rows, good = self.recipe, self.rows, sorted(self.found)
        found = [self.found[row] for row in good]
        num = len(rows.keys)

        def spread(values: list[Any], empty: np.ndarray) -> np.ndarray:
            """Of the good rows as (items, good, ..), among all."""
            if values:
                empty[:, good] = np.stack(values, axis=1)
            return empty

        [(view_name, view_set)] = recipe.view_sets.items()
        views, fields = view_set.num_views, len(augment.fields(view_set))
        arrays = {
            KEY: np.array(rows.keys, dtype=object),
            DIGEST: np.array(rows.digests, np.uint64),
            PLACE: np.array(rows.places, np.int64).reshape(-1, 2),
            STATUS: np.array(rows.statuses, np.uint8),
            SIZE: np.array(rows.sizes, np.int32).reshape(-1, 2),
            Column("view", view_name, "augment"): spread(
                [record.params for record, _, _ in found], np.full((views, num, fields), np.nan, np.float32)
            ),
            Column("view", view_name, "pixels"): spread(
                [pixels for _, _, pixels in found], np.zeros((views, num), np.uint64)
            ),
        }
        for name, count in recipe.text_sets.items():
            texts = [np.array(own if name == ORIGINAL else record.captions[name], object) for record, own, _ in found]
            arrays[Column("text", name, "caption")] = spread(texts, np.full((count, num), "", dtype=object))
        start = 0
        for teacher, width in self.widths.items():
            part = slice(start, start + width)
            start += width
            empty = np.full((views, num, width), np.nan, ml_dtypes.bfloat16)
            arrays[Column("view", view_name, teacher)] = spread([r.image[:, part] for r, _, _ in found], empty)
            for name, count in recipe.text_sets.items():
                empty = np.full((count, num, width), np.nan, ml_dtypes.bfloat16)
                values = [record.texts[name][:, part] for record, _, _ in found]
                arrays[Column("text", name, teacher)] = spread(values, empty)
        return arrays

    def _record(self, sample: Sample, row: int) -> Record | None:
        """That of an image, where there is one as large as the store's first."""
        record = self.record_of(sample, self.rows.sizes[row])
        return record if record and self._fits(record) else None

    def _fits(self, record: Record) -> bool:
        [view_set] = self.recipe.view_sets.values()
        return (
            record.params.shape == (view_set.num_views, len(augment.fields(view_set)))
            and record.image.shape[1] == sum(self.widths.values())
            and {name: len(texts) for name, texts in record.texts.items()} == self.recipe.text_sets
            and all(texts.shape[1] == record.image.shape[1] for texts in record.texts.values())
        )

    def _leave_out(self, row: int, status: Status, key: str) -> None:
        rows = self.rows
        why = "a crop is not within it" if status == Status.OTHER_SIZE else self.absent
        rows.details.setdefault(status, f"{key}: {why}")
        rows.statuses[row], rows.digests[row], rows.places[row] = status, 0, (0, 0)
