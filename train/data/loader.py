"""Batches: the samples that `order` names, decoded and replayed in worker processes, teachers' embeddings beside them.

Columns of a store are read here, one slab per shard and epoch, ahead of need in a thread. A worker gets a sample's
place in its tar and the parameters of its view, and gives pixels and tokens: it knows neither Zarr nor a model. Batches
come in the order in which they were asked for, so they are the same for any number of workers.
"""

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reinforce import process
from reinforce.data.shards import Place
from reinforce.data.views import replayed
from reinforce.errors import ReinforceError
from train.data.order import Order, Piece
from train.data.sources import Opened, Source

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Batch:
    """B samples. `images` uint8 (B, image_px, image_px, 3); `tokens` int64 (B, T) per text set; `image_targets`
    bfloat16 (B, D_k) per teacher; `text_targets` likewise, by set and teacher."""

    keys: list[str]
    images: Tensor
    tokens: dict[str, Tensor]
    image_targets: dict[str, Tensor]
    text_targets: dict[str, dict[str, Tensor]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same samples, with every tensor through `function`."""
        return type(self)(self.keys, *(_each(function, part) for part in self._tensors))

    @classmethod
    def cat(cls, pieces: Sequence[Self]) -> Self:
        """Pieces, one after the other, as one batch."""
        parts = zip(*(piece._tensors for piece in pieces), strict=True)
        keys = [key for piece in pieces for key in piece.keys]
        return cls(keys, *(_each(lambda *tensors: torch.cat(tensors), *part) for part in parts))

    @property
    def _tensors(self) -> tuple[Any, ...]:
        return self.images, self.tokens, self.image_targets, self.text_targets


def _each(function: Callable[..., Any], *trees: Any) -> Any:
    """Arrays, or dicts of them: what `function` makes of those that have the same names in every tree."""
    if isinstance(trees[0], dict):
        return {name: _each(function, *(tree[name] for tree in trees)) for name in trees[0]}
    return function(*trees)


@dataclass(frozen=True)
class _Row:
    shard: Opened
    row: int


@dataclass(frozen=True)
class _Work:
    """What a worker needs to make a batch: for each sample its tar, its place there, size, parameters, and digest."""

    samples: list[tuple[str, Place, tuple[int, int], np.ndarray, int | None]]
    captions: dict[str, list[str]]


class Loader:
    """The batches of one rank. `batch_size` is that of all ranks together; each step comes in `accum_freq` pieces."""

    def __init__(
        self,
        source: Source,
        image_px: int,
        tokenizer: Tokenizer,
        batch_size: int,
        streams: int,
        seed: int,
        accum_freq: int = 1,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order = Order(source.good_rows, batch_size, streams, seed)
        self._source, self._workers, self._pieces = source, workers, accum_freq
        self._streams = range(rank * streams // world_size, (rank + 1) * streams // world_size)
        self._piece_size = batch_size // world_size // accum_freq
        self._views = _Views(image_px, tokenizer)
        # Not of a generator's own: one that is dropped is closed in whatever thread collects it, and if that is the one
        # Zarr reads in, waiting there for a read would be for ever.
        self._pool = ThreadPoolExecutor(2)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, step: int, last_step: int) -> Generator[Batch, None, None]:
        """The pieces of steps `step` to `last_step`, which is not among them.

        Raises ShardError, ReplayError, ManifestMismatch, NotCommitted, Corrupt, each naming the sample or the shard.
        """
        asked: deque[list[_Row]] = deque()
        failed: list[Exception] = []

        def works() -> Iterator[_Work]:
            try:
                for rows in islice(self._rows(step), (last_step - step) * self._pieces):
                    asked.append(rows)
                    yield _work(rows)
            except Exception as error:  # torch, which asks ahead, would leave its workers behind
                failed.append(error)

        loader = DataLoader(
            self._views,
            sampler=None,
            batch_sampler=_Asked(works),  # type: ignore[arg-type]
            num_workers=self._workers,
            collate_fn=_whole,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_without_signals,
        )
        iterator = iter(loader)
        try:
            for made in iterator:
                if isinstance(made, ReinforceError):
                    raise made
                yield _batch(asked.popleft(), *made)
            if failed:
                raise failed[0]
        finally:
            process.end_loader_workers(iterator)

    def _rows(self, step: int) -> Iterator[list[_Row]]:
        """The rows of one piece after the other."""
        opened: WeakValueDictionary[tuple[int, str], Future[Opened]] = WeakValueDictionary()

        def open_(piece: Piece) -> Future[Opened]:
            name = (piece.epoch, piece.shard)
            future = opened.get(name)  # two streams may be in one shard
            if future is None:
                opened[name] = future = self._pool.submit(self._source.open, piece.shard, piece.epoch)
            return future

        streams = [_rows_of(self.order.stream(stream, step), open_) for stream in self._streams]
        while True:
            share = [row for stream in streams for row in islice(stream, self.order.stream_batch)]
            yield from (share[i : i + self._piece_size] for i in range(0, len(share), self._piece_size))


def _rows_of(pieces: Iterator[Piece], open_: Callable[[Piece], "Future[Opened]"]) -> Iterator[_Row]:
    """The rows of a stream; while one piece is being taken, the next is being opened."""
    piece = next(pieces)
    future = open_(piece)
    while True:
        following = next(pieces)
        following_future = open_(following)
        shard = future.result()
        for row in piece.rows.tolist():
            yield _Row(shard, row)
        piece, future = following, following_future


def _work(rows: list[_Row]) -> _Work:
    samples = []
    for item in rows:
        place = item.shard.place(item.row)
        height, width = item.shard.sizes[item.row].tolist()
        params = item.shard.params[item.row]
        samples.append((item.shard.path, place, (height, width), params, item.shard.digest(item.row)))
    sets = rows[0].shard.captions
    return _Work(samples, {name: [item.shard.captions[name][item.row] for item in rows] for name in sets})


def _batch(rows: list[_Row], keys: list[str], pixels: Tensor, tokens: dict[str, Tensor]) -> Batch:
    def stacked(*columns: np.ndarray) -> Tensor:
        """One row of each bfloat16 column, as a tensor."""
        taken = np.stack([column[item.row] for column, item in zip(columns, rows, strict=True)])
        return torch.from_numpy(taken.astype(ml_dtypes.bfloat16, copy=False).view(np.int16)).view(torch.bfloat16)

    image_targets = _each(stacked, *(item.shard.image_targets for item in rows))
    text_targets = _each(stacked, *(item.shard.text_targets for item in rows))
    return Batch(keys, pixels, tokens, image_targets, text_targets)


class _Asked:
    """A batch sampler that yields works in the place of lists of indices."""

    def __init__(self, works: Callable[[], Iterator[_Work]]) -> None:
        self._works = works

    def __iter__(self) -> Iterator[_Work]:
        return self._works()


class _Views(Dataset):
    """What runs in a worker process."""

    def __init__(self, image_px: int, tokenizer: Tokenizer) -> None:
        self.image_px, self.tokenizer = image_px, tokenizer

    def __getitems__(self, work: _Work) -> tuple[list[str], Tensor, dict[str, Tensor]] | ReinforceError:
        """Keys, pixels and tokens; or what is wrong, since an exception would come out of a worker without its type."""
        try:
            views = np.stack([self._view(*sample) for sample in work.samples])
        except ReinforceError as error:
            return error
        keys = [place.key for _, place, *_ in work.samples]
        return keys, torch.from_numpy(views), {name: self.tokenizer(texts) for name, texts in work.captions.items()}

    def _view(
        self, path: str, place: Place, size: tuple[int, int], params: np.ndarray, digest: int | None
    ) -> np.ndarray:
        return replayed(path, place, params, size, self.image_px, digest)


def _without_signals(worker: int) -> None:
    """A terminal or a scheduler signals all processes of a group: only the trainer answers, and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _whole(made: object) -> object:
    return made
