"""A store as a torch dataset, for a training loop that is not ours.

It gives whole batches, so that they do not depend on the number of workers: the same samples, views and captions that
our own loader gives for the same seed. Every worker process reads its part of the store itself; nothing is shared.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from reinforce.config import parse
from reinforce.data.views import replayed
from reinforce.errors import ConfigError
from reinforce.models.pixels import Normaliser
from train.config import TrainConfig
from train.data.loader import Tokenizer
from train.data.mixture import source_of
from train.data.order import Order
from train.data.sources import Opened


class ReinforcedBatch(NamedTuple):
    """B samples: one view and one caption of each, and what the teachers say of these two.

    `images` float32 (B, 3, image_px, image_px), normalised; `texts` int64 (B, T) tokens; `image_features` and
    `text_features` float32 (B, D_k) by teacher, of unit norm but for the rounding to bfloat16; `keys` B names.
    """

    images: Tensor
    texts: Tensor
    image_features: dict[str, Tensor]
    text_features: dict[str, Tensor]
    keys: list[str]


class ReinforcedDataset(IterableDataset[ReinforcedBatch]):
    """The batches of one rank and one epoch: `DataLoader(dataset, batch_size=None, num_workers=..)`.

    batch_size: samples per rank, as open_clip counts them. What does not fill a batch of all ranks is not seen in this
        epoch; the next one, `set_epoch(epoch)`, has another order and the next view and caption of each sample.
    image_px, mean, std: side of the pictures in pixels, and pixel / 255 less `mean`, over `std`, by channel; a model of
        open_clip has them as `model.visual.image_size` (a number or a square), `.image_mean` and `.image_std`.
    tokenizer: list of N texts in, int64 (N, T) out.
    teachers, text_sets: names of the store; all, if None. A caption is of one text set, drawn for each sample.
    rank, world_size: those of torch.distributed, or 0 of 1, if None.
    streams: places of the epoch's order that are read at once, of all ranks together; a batch mixes so many shards.
    cache_dir, cache_bytes: where remote tars are copied to, and what these copies may take (reinforce/data/copies.py).

    `logit_scales` has each teacher's multiplier of similarities.
    Raises ConfigError and StoreError when made; ManifestMismatch, ReplayError and ShardError, when iterated, where a
    tar is not the one that was reinforced.
    """

    def __init__(
        self,
        shards: str,
        store: str | PathLike[str],
        *,
        batch_size: int,
        image_px: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        tokenizer: Tokenizer,
        teachers: list[str] | None = None,
        view_set: str = "base",
        text_sets: list[str] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        streams: int = 8,
        cache_dir: str | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if is_distributed else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if is_distributed else 1
        if streams % self.world_size:
            raise ConfigError(f"streams {streams} has to be a multiple of the {self.world_size} ranks")
        if batch_size * self.world_size < 2:
            raise ConfigError(f"batch_size {batch_size}: give 2 or more")
        asked = {
            "shards": shards,
            "store": fspath(store),
            "teachers": teachers,
            "view_set": view_set,
            "text_sets": text_sets,
            "captions": "mix",
            "seed": seed,
            "global_batch_size": batch_size * self.world_size,
            "streams": streams,
            "cache_dir": cache_dir,
            "cache_bytes": cache_bytes,
        }
        if batch_size * self.world_size % streams:
            raise ConfigError(
                f"batch_size {batch_size} x {self.world_size} ranks has to be a multiple of streams {streams}; "
                f"streams={math.gcd(batch_size * self.world_size, streams)} fits"
            )
        config = parse(TrainConfig, asked, "ReinforcedDataset")
        self._source = source_of(config)
        self._share = streams // self.world_size
        self._order = Order(self._source.good_rows, config.global_batch_size, streams, seed)
        self.batch_size, self.tokenizer = batch_size, tokenizer
        sides = {image_px} if isinstance(image_px, int) else set(image_px)
        if len(sides) != 1:
            raise ConfigError(f"image_px {image_px}: views are square; give one number of pixels")
        (self.image_px,) = sides
        if self.image_px < 1:
            raise ConfigError(f"image_px {self.image_px}: a view has at least one pixel")
        if len(mean) != 3 or len(std) != 3 or not all(math.isfinite(m) for m in mean) or not all(s > 0 for s in std):
            raise ConfigError(f"mean {mean} and std {std}: give three numbers each, from 0 to 1, and no std of 0")
        self.logit_scales = {name: facts.logit_scale for name, facts in self._source.teachers.items()}
        self._normalise = Normaliser({"mean": list(mean), "std": list(std)})
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that live on see it change

    def __len__(self) -> int:
        """Batches of this rank per epoch: the same for every rank."""
        return self._order.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Call before each epoch, as a DistributedSampler's; else every epoch is the first."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[ReinforcedBatch]:
        worker = get_worker_info()
        first = int(self._epoch) * len(self)
        streams = [self._rows(self.rank * self._share + i, first) for i in range(self._share)]
        open_ = lru_cache(self._share + 1)(self._source.open)
        for step in range(len(self)):
            rows = [row for stream in streams for row in islice(stream, self._order.stream_batch)]
            if worker is None or step % worker.num_workers == worker.id:
                yield self._batch([(open_(shard, epoch), row) for shard, epoch, row in rows])

    def _rows(self, stream: int, first: int) -> Iterator[tuple[str, int, int]]:
        for piece in self._order.stream(stream, first):
            for row in piece.rows.tolist():
                yield piece.shard, piece.epoch, row

    def _batch(self, rows: list[tuple[Opened, int]]) -> ReinforcedBatch:
        pixels = np.stack([self._pixels(shard, row) for shard, row in rows])
        (text_set,) = rows[0][0].captions

        def stacked(features: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(features).astype(np.float32))

        return ReinforcedBatch(
            self._normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous(),
            self.tokenizer([shard.captions[text_set][row] for shard, row in rows]),
            {name: stacked([s.image_targets[name][row] for s, row in rows]) for name in self.logit_scales},
            {name: stacked([s.text_targets[text_set][name][row] for s, row in rows]) for name in self.logit_scales},
            [shard.keys[row] for shard, row in rows],
        )

    def _pixels(self, shard: Opened, row: int) -> np.ndarray:
        height, width = shard.sizes[row].tolist()
        return replayed(
            shard.path, shard.place(row), shard.params[row], (height, width), self.image_px, shard.digest(row)
        )


class StoredTeacher(nn.Module):
    """What open_clip's training loop calls `dist_model`, with the store in the place of a model.

    The loop asks it for a teacher's features of the batch at hand; they came with that batch, so nothing is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Any] = {}

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Any]:
        return {name: value.to(images.device) for name, value in self.features.items()}


class OpenClipData:
    """What open_clip's training loop calls `data["train"]`: batches of images and tokens.

    What `teacher` says of each batch is put into `dist_model` before the batch is handed out.
    """

    def __init__(self, dataset: ReinforcedDataset, teacher: str, workers: int = 0) -> None:
        if teacher not in dataset.logit_scales:
            raise ConfigError(f"the store has no teacher '{teacher}'; it has {', '.join(dataset.logit_scales)}")
        self.dataset, self.teacher, self.dist_model = dataset, teacher, StoredTeacher()
        self.dataloader = self
        self.num_batches = len(dataset)
        self.num_samples = len(dataset) * dataset.batch_size * dataset.world_size
        self.set_epoch = dataset.set_epoch
        self._loader: DataLoader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            self.dist_model.features = {
                "image_features": batch.image_features[self.teacher],
                "text_features": batch.text_features[self.teacher],
                "logit_scale": torch.tensor(self.dataset.logit_scales[self.teacher]),
            }
            yield batch.images, batch.texts
