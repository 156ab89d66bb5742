"""A store opened for reading: shards by name, samples by row, their views and captions as numpy arrays.

Names that the store does not have are errors that list those it has. Nothing here writes. `Store` reads whole columns
and knows Zarr; this is what one would type to look at a store.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from reinforce.config import Recipe
from reinforce.data import augment, shards
from reinforce.data.shards import Place
from reinforce.data.status import Status
from reinforce.data.views import replayed
from reinforce.errors import ConfigError, ManifestMismatch, NotCommitted, ReplayError
from reinforce.store.store import Store, pixel_hash_of

_NAMED = 8  # names that an error lists, of possibly many


@dataclass(frozen=True)
class View:
    """One view of one sample.

    `params` (P,) float32 are its parameters; the manifest's `augment_fields` name them and their units. `size` is
    (height, width) in pixels of the image that they were drawn for, and `view_px` the side of the view, in pixels, at
    which `pixel_hash` was taken, by `hash_kind`. `embeddings` has for each teacher the unit embedding (D,), float32,
    which holds the stored bfloat16 exactly.
    """

    key: str
    row: int
    params: np.ndarray
    size: tuple[int, int]
    view_px: int
    pixel_hash: int
    hash_kind: str
    embeddings: dict[str, np.ndarray]

    def pixels(self, tar: str, px: int | None = None) -> np.ndarray:
        """The view (px, px, 3) uint8, made again from the tar of its shard, a local path; `view_px` if `px` is None.

        At whatever size, the view is first made at `view_px` and compared with the hash in the store.
        Raises ManifestMismatch where the tar is another one, ReplayError where the image is not the one that was
        reinforced, ShardError where it cannot be read.
        """
        places = _places(tar, os.path.getmtime(tar) if os.path.exists(tar) else 0.0)
        found = places[self.row].key if self.row < len(places) else "nothing"
        if found != self.key:
            raise ManifestMismatch(
                f"{tar}: row {self.row} is '{self.key}' in the store and '{found}' in the tar; "
                "give the tar that the store was made from"
            )
        place = places[self.row]
        drawn = replayed(tar, place, self.params, self.size, self.view_px)
        if augment.pixel_hash(drawn, self.hash_kind) != self.pixel_hash:
            raise ReplayError(
                f"{tar}: {self.key}: its view has other pixels than when it was stored: the image was altered, or this "
                "version of Pillow decodes it differently; `clip-reinforce verify --replay` says how many views differ"
            )
        return drawn if px in (None, self.view_px) else replayed(tar, place, self.params, self.size, px)


class ShardReader:
    """The group of one shard: N rows, in the order of its tar."""

    def __init__(self, store: Store, name: str, recipe: Recipe) -> None:
        self.name = name
        self._store, self._recipe = store, recipe
        self._kept: dict[str, tuple[int | None, np.ndarray]] = {}
        self._hash_kinds: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def keys(self) -> list[str]:
        """N keys of samples."""
        return [str(key) for key in self.array("key")]

    @cached_property
    def _data(self) -> str | None:
        return self._store.identity(self.name)

    @cached_property
    def status(self) -> np.ndarray:
        """(N,) uint8: 0 is good; otherwise why the sample is in quarantine (reinforce.data.status.Status)."""
        return self.array("status")

    @cached_property
    def size(self) -> np.ndarray:
        """(N, 2) int32: height and width of the image in pixels."""
        return self.array("size")

    @property
    def columns(self) -> list[str]:
        """The columns that are written; those of a run that is not finished are fewer than the recipe's."""
        wanted = self._wanted
        absent = set(self._store.missing(self.name, wanted))
        return [column for column in wanted if column not in absent]

    def array(self, column: str, index: int | None = None) -> np.ndarray:
        """A whole column as it is stored, or view (caption) `index` of it, which reads that much only.

        Embeddings are bfloat16 of ml_dtypes: `.astype(np.float32)` is exact. Raises ConfigError where the recipe has no
        such column, NotCommitted where it is not written yet, Corrupt where it is damaged.
        """
        _one_of(column, self._wanted, "column", self._where)
        if index is not None:
            shape = self._store.open_array(self.name, column).shape
            if len(shape) < 2 or not 0 <= index < shape[0]:
                raise ConfigError(f"{self._where}/{column}: no index {index} in an array of shape {shape}")
        return self._store.read(self.name, column, index, None if column in ("key", "digest") else self._data)

    def view(self, view_set: str, row: int, index: int) -> View:
        """View `index` of a good sample. Reads that view of the whole shard once and keeps it for the next rows.

        Raises ConfigError for a set, row or index that is not there and for a row in quarantine; NotCommitted, Corrupt.
        """
        _one_of(view_set, self._recipe.view_sets, "view set", self._where)
        self._check_good(row)

        def of(part: str) -> np.ndarray:
            values: np.ndarray = self._latest(f"view/{view_set}/{part}", index)[row]
            return values

        return View(
            self.keys[row],
            row,
            of("augment").copy(),
            (int(self.size[row, 0]), int(self.size[row, 1])),
            self._recipe.view_sets[view_set].view_px,
            int(of("pixels")),
            self._hash_kind(view_set),
            {teacher: of(teacher).astype(np.float32) for teacher in self._recipe.teachers},
        )

    def captions(self, text_set: str, row: int) -> list[str]:
        """The C captions of a good sample: of `original`, those that came with it; of a captioner, those it wrote.

        Raises ConfigError for a set or row that is not there and for a row in quarantine; NotCommitted, Corrupt.
        """
        _one_of(text_set, self._recipe.text_sets, "text set", self._where)
        self._check_good(row)
        return [str(text) for text in self._latest(f"text/{text_set}/caption", None)[:, row]]

    def quarantine(self) -> dict[int, str]:
        """Row and reason of every sample that is not used."""
        return {int(row): Status(int(self.status[row])).reason for row in np.flatnonzero(self.status)}

    def _hash_kind(self, view_set: str) -> str:
        if view_set not in self._hash_kinds:
            attributes = self._store.attributes(self.name, f"view/{view_set}/pixels")
            self._hash_kinds[view_set] = pixel_hash_of(attributes)
        return self._hash_kinds[view_set]

    @property
    def _wanted(self) -> list[str]:
        return [str(column) for column in self._store.promised().columns()]

    @property
    def _where(self) -> str:
        return f"{self._store.url}/{self.name}"

    def _check_good(self, row: int) -> None:
        if not 0 <= row < len(self):
            raise ConfigError(f"{self._where} has no row {row}; it has {len(self)}, from 0")
        if self.status[row]:
            reason = Status(int(self.status[row])).reason
            raise ConfigError(f"{self._where}: row {row} ({self.keys[row]}) is in quarantine: {reason}")

    def _latest(self, column: str, index: int | None) -> np.ndarray:
        """`array`, the last one of each column kept: rows are asked for one after the other."""
        if column not in self._kept or self._kept[column][0] != index:
            self._kept[column] = index, self.array(column, index)
        return self._kept[column][1]


class StoreReader:
    """A store, read-only: `store["00000017"]` is one shard, `for name in store` goes through their names.

    `manifest` says how every byte was made, `recipe` is that of its run, `shards` are the names there were on opening.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store = Store(url)
        self.manifest = self._store.promised()
        self.recipe = self.manifest.parsed_recipe()
        self.shards = self._store.shards()
        self._opened: dict[str, ShardReader] = {}  # each keeps the views it was last asked for

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __getitem__(self, name: str) -> ShardReader:
        if name not in self.shards:
            raise NotCommitted(f"{self.url} has no shard '{name}'; it has {_listed(self.shards)}")
        return self._opened.setdefault(name, ShardReader(self._store, name, self.recipe))


@lru_cache(8)
def _places(tar: str, modified: float) -> list[Place]:
    """Views are asked for one after the other: a tar is gone through once, and again when it has changed."""
    return shards.locate(tar)


def _one_of(name: str, there: Iterable[str], what: str, where: str) -> None:
    if name not in there:
        raise ConfigError(f"{where} has no {what} '{name}'; it has {_listed(list(there))}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "") or "none"
