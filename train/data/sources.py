"""Where samples come from: tars with a store beside them, or tars alone. Both open a shard for one epoch. (Several
sources as one: mixture.py.)

A source has `good_rows` (of each shard, the rows that can be used), `num_skipped` (those that cannot),
`teachers` (name to width and `logit_scale`), `fingerprint` (of what it gives, wherever that lies),
`most` (how many views and captions a setting can ask for, 0 where none are counted) and `open(shard, epoch)`.
"""

import hashlib
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from reinforce.config import ORIGINAL
from reinforce.data import augment, draws, images, shards
from reinforce.data.copies import Copy, local_copy
from reinforce.data.notes import HARMLESS, Notes
from reinforce.data.shards import Place, Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, ManifestMismatch, NotCommitted, SampleError
from reinforce.progress import Progress
from reinforce.store.columns import DIGEST, KEY, PLACE, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.refused import refusal, refused
from reinforce.store.store import Store, identity
from train.config import TrainConfig
from train.data.order import GoodRows

MIX = "mix"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherFacts:
    """Width of its embeddings; the multiplier of its similarities, None where it reads no texts; what a SigLIP adds to
    them. `partial`: it has not seen all samples, and its targets of the others are NaN."""

    width: int
    logit_scale: float | None
    logit_bias: float | None = None
    partial: bool = False

    @property
    def reads_texts(self) -> bool:
        return self.logit_scale is not None


@dataclass(frozen=True)
class Opened:
    """One shard in one epoch: for each of its N rows one view, and one caption of each text set.

    `places` (N, 2) offset and length of the images in the tar, in bytes; `params` (N, P); `sizes` (N, 2) height and
    width; `digests` (N,) of the images, where they are known; `captions` N texts per set; `image_targets` (N, D_k)
    bfloat16 per teacher; `text_targets` likewise, by set and teacher.
    """

    path: str
    keys: list[str]
    places: np.ndarray
    sizes: np.ndarray
    params: np.ndarray
    captions: dict[str, list[str]]
    image_targets: dict[str, np.ndarray]
    text_targets: dict[str, dict[str, np.ndarray]]
    digests: np.ndarray | None = None
    copy: Copy | None = None  # holds what lies at `path`, if that is a copy, as long as this is used

    def place(self, row: int) -> Place:
        return Place(self.keys[row], *self.places[row].tolist())

    def digest(self, row: int) -> int | None:
        """Of an image, where it is known."""
        return None if self.digests is None else int(self.digests[row])


class Source(Protocol):
    good_rows: dict[str, GoodRows]
    num_skipped: int
    teachers: dict[str, TeacherFacts]
    text_sets: list[str]
    fingerprint: str
    most: dict[str, int]

    def open(self, shard: str, epoch: int) -> Opened: ...


class StoreSource:
    """Tars and what a store knows of them. Of each column one view or caption is read for an epoch, and not all."""

    def __init__(self, store: Store, listed: list[Shard], config: TrainConfig) -> None:
        self._store, self._config = store, config
        self._shards = {shard.name: shard for shard in listed}
        manifest = store.promised()
        self._has_digests = DIGEST in manifest.columns()
        recipe = manifest.parsed_recipe()
        view_sets = some(config.view_set.split("+"), list(recipe.view_sets), "view set", store.url)
        views = [(name, index) for name in view_sets for index in range(recipe.view_sets[name].num_views)]
        self._views = views[: config.num_views]
        self._num_captions = {name: min(num, config.num_captions or num) for name, num in recipe.text_sets.items()}
        asked_texts = [] if config.comkd else config.text_sets
        self.text_sets = some(asked_texts, list(self._num_captions), "text set", store.url)
        if not self.text_sets and not config.comkd:
            raise ConfigError(f"{store.url} holds no captions, and CLIP training needs some; only comkd does without")
        counts = [recipe.text_sets[name] for name in self.text_sets]
        self.most = {"num_views": len(views), "num_captions": max(counts, default=0)}
        names = some(config.teachers, list(recipe.teachers), "teacher", store.url)
        facts_of = {name: manifest.models["teachers"][name] for name in names}
        some(list(config.dist_logit_scale), names, "teacher", store.url)
        self.teachers = {
            name: TeacherFacts(
                facts["width"],
                config.dist_logit_scale.get(name, facts.get("logit_scale")),
                facts.get("logit_bias"),
            )
            for name, facts in facts_of.items()
            if config.feature_mse or (config.learns_from_teachers and "logit_scale" in facts)
        }
        self._readers = [name for name, facts in self.teachers.items() if facts.reads_texts]
        with ThreadPoolExecutor(32) as pool:
            good = pool.map(self._good_rows, listed)
            self.good_rows = {shard.name: rows for shard, rows in zip(listed, good, strict=True)}
        self.num_skipped = sum(rows.num_rows - len(rows) for rows in self.good_rows.values())
        self.fingerprint = fingerprint(self._promises(manifest, view_sets, names), self.good_rows)

    def open(self, shard: str, epoch: int) -> Opened:
        """Raises ManifestMismatch where the tar is not the one that was reinforced, NotCommitted, Corrupt."""
        copy = local_copy(self._shards[shard].url, self._config.cache_dir, self._config.cache_bytes)
        path = copy.path
        keys = self._store.read(shard, "key").tolist()
        digests = self._store.read(shard, "digest") if self._has_digests else None
        data = None if digests is None else identity(keys, digests)
        read = partial(self._store.read, shard, data=data)
        if self._has_digests and self._store.attributes(shard, PLACE)["tar"] == shards.stamp(path):
            places = read(str(PLACE))
        else:  # packed anew, or a store of format 1: the tar has to be gone through
            places = self._located(shard, path, keys)
        number = self._index(f"view/{self._config.view_set}", shard, epoch, len(self._views))
        view_set, view_index = self._views[number]
        view = f"view/{view_set}"
        captions, text_targets = {}, {}
        for name in self.text_sets:
            index = self._index(f"text/{name}", shard, epoch, self._num_captions[name])
            captions[name] = read(f"text/{name}/caption", index).tolist()
            text_targets[name] = {t: read(f"text/{name}/{t}", index) for t in self._readers}
        if self._config.captions == "mix":
            captions, text_targets = self._mixed(shard, epoch, captions, text_targets)
        sizes, params = read("size"), read(f"{view}/augment", view_index)
        image_targets = {t: read(f"{view}/{t}", view_index) for t in self.teachers}
        return Opened(path, keys, places, sizes, params, captions, image_targets, text_targets, digests, copy)

    def _located(self, shard: str, path: str, keys: list[str]) -> np.ndarray:
        located = shards.locate(path)
        if keys != [place.key for place in located]:
            raise ManifestMismatch(
                f"{self._shards[shard].url} and {self._store.url}/{shard} do not belong together: "
                f"{_first_difference(keys, located)}; give the tars that the store was made from"
            )
        return _places(located)

    def _good_rows(self, shard: Shard) -> GoodRows:
        """Where all samples are good, the column need not be read: its metadata say so."""
        try:
            about = self._store.attributes(shard.name, STATUS)
        except NotCommitted:
            if shard.name not in refused(self._store.objects):
                raise
            why = refusal(self._store.objects, shard.name)["why"]
            raise NotCommitted(
                f"{self._store.url} lacks {shard.name}, which was refused; leave it out: {why}"
            ) from None
        if "num_good" in about and about["num_good"] == about["rows"]:
            return GoodRows(about["rows"])
        return GoodRows.of(self._store.read(shard.name, STATUS) == Status.GOOD)

    def _promises(self, manifest: Manifest, view_sets: list[str], teachers: list[str]) -> str:
        """Of the columns that are learned from, so that a store may grow while a training rests."""
        if manifest.format_version == 1:
            return manifest.fingerprint
        readers = [name for name in teachers if name in manifest.parsed_recipe().text_teachers]
        columns = [Column("view", name, part) for name in view_sets for part in ("augment", *teachers)]
        columns += [Column("text", name, part) for name in self.text_sets for part in ("caption", *readers)]
        return " ".join(manifest.promise(column) for column in [KEY, DIGEST, STATUS, *columns])

    def _index(self, set_name: str, shard: str, epoch: int, num: int) -> int:
        if self._config.view_order == "sequential":
            return epoch % num
        return int(draws.uniforms(self._config.seed, f"train/{set_name}", shard, epoch, 1)[0] * num)

    def _mixed(
        self, shard: str, epoch: int, captions: dict[str, list[str]], targets: dict[str, dict[str, np.ndarray]]
    ) -> tuple[dict[str, list[str]], dict[str, dict[str, np.ndarray]]]:
        names = self.text_sets
        num_rows = len(captions[names[0]])
        drawn = draws.uniforms(self._config.seed, "train/mix", f"{epoch}/{shard}", 0, num_rows)
        chosen = (drawn * len(names)).astype(int)
        rows = np.arange(num_rows)
        texts = [captions[names[which]][row] for row, which in enumerate(chosen)]
        mixed = {t: np.stack([targets[name][t] for name in names])[chosen, rows] for t in self._readers}
        return {MIX: texts}, {MIX: mixed}


class PlainSource:
    """Tars alone: views are drawn anew in every epoch. All tars are read and decoded once at the start, to know which
    samples can be used."""

    def __init__(self, listed: list[Shard], config: TrainConfig) -> None:
        self._config = config
        self._shards = {shard.name: shard for shard in listed}
        self.teachers: dict[str, TeacherFacts] = {}
        self.text_sets = [ORIGINAL]
        self.most = {"num_views": 0, "num_captions": 0}
        self.good_rows, self._sizes, self._captions = {}, {}, {}
        self.num_skipped, skipped, first, notes = 0, Counter[str](), dict[str, str](), Notes()
        at = listed[0]
        with (
            Progress(len(listed), "shard", title="looking at the tars", waits_for=lambda: at.url) as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for shard in listed:
                at = shard
                samples = list(pool.map(_looked_at, shards.read(shard, config.caption_files, notes)))
                sizes = np.array([size for size, *_ in samples], dtype=np.int32).reshape(-1, 2)
                self._sizes[shard.name] = sizes
                self._captions[shard.name] = [captions for _, captions, _ in samples]
                for reason, detail in (fault for *_, fault in samples if fault):
                    skipped[reason] += 1
                    first.setdefault(reason, detail)
                self.good_rows[shard.name] = GoodRows.of(sizes[:, 0] > 0)
                self.num_skipped += len(sizes) - len(self.good_rows[shard.name])
                progress.add()
        told = "; ".join(
            [f"{num} {reason}, as {first[reason]}" for reason, num in sorted(skipped.items())] + notes.told()
        )
        if not any(map(len, self.good_rows.values())):
            raise ConfigError(f"{config.shards}: of {self.num_skipped} samples none can be used: {told}")
        if skipped or notes.counts.keys() - HARMLESS:
            log.warning("%s: not all is used: %s", config.shards, told)
        self.fingerprint = fingerprint("tars alone", self.good_rows)

    def open(self, shard: str, epoch: int) -> Opened:
        copy = local_copy(self._shards[shard].url, self._config.cache_dir, self._config.cache_bytes)
        path = copy.path
        located, sizes, views = shards.locate(path), self._sizes[shard], self._config.fresh_views
        keys = [place.key for place in located]
        params = np.full((len(keys), len(augment.fields(views))), np.nan, np.float32)
        for row in self.good_rows[shard].rows:
            size = (int(sizes[row, 0]), int(sizes[row, 1]))
            params[row] = augment.draw(views, self._config.seed, "train", keys[row], epoch, size)
        texts = [captions[epoch % len(captions)] if captions else "" for captions in self._captions[shard]]
        return Opened(path, keys, _places(located), sizes, params, {ORIGINAL: texts}, {}, {}, copy=copy)


def _places(located: list[Place]) -> np.ndarray:
    return np.array([(place.offset, place.length) for place in located], np.int64).reshape(-1, 2)


def fingerprint(whole: str, good_rows: dict[str, GoodRows]) -> str:
    digest = hashlib.sha256(whole.encode())
    for shard, rows in good_rows.items():
        digest.update(f";{shard};".encode() + rows.rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _looked_at(sample: shards.Sample) -> tuple[tuple[int, int], tuple[str, ...], tuple[str, str] | None]:
    """Height and width, 0 where it cannot be used; captions; reason and detail where it cannot."""
    if sample.status != Status.GOOD:
        return (0, 0), (), (sample.status.reason, sample.detail)
    try:
        picture = images.decode(sample.image)
    except SampleError as error:
        return (0, 0), (), (Status(error.status).reason, f"{sample.key}: {error}")
    return (picture.height, picture.width), sample.captions, None


def some(wanted: list[str] | None, there: list[str], what: str, url: str) -> list[str]:
    """What is wanted of what is there; all, where nothing is said. Raises ConfigError for what is not there."""
    absent = [name for name in wanted or [] if name not in there]
    if absent:
        raise ConfigError(f"{url} has no {what} '{absent[0]}' to learn from; it has {', '.join(there)}")
    return there if wanted is None else wanted


def _first_difference(keys: list[str], places: list[Place]) -> str:
    if len(keys) != len(places):
        return f"{len(keys)} samples in the store, {len(places)} in the tar"
    row = next(i for i, (key, place) in enumerate(zip(keys, places, strict=True)) if key != place.key)
    return f"row {row} is '{keys[row]}' in the store and '{places[row].key}' in the tar"
