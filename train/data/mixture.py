"""The source that a training asks for: one, or several as if they were one."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from reinforce.data import shards
from reinforce.errors import ConfigError
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store
from train.config import DataConfig, TrainConfig
from train.data.order import GoodRows
from train.data.sources import MIX, Opened, PlainSource, Source, StoreSource, TeacherFacts, fingerprint, some


def source_of(config: TrainConfig) -> Source:
    """The source that a training asks for. Raises ConfigError, and StoreError where a store does not fit."""
    source: Source
    if config.data:
        source = Mixture(config)
    elif not config.shards:
        raise ConfigError("no shards: say which tars hold the images, with --shards or --data")
    elif config.store is not None:
        source = StoreSource(Store(config.store), shards.expand(config.shards), config)
    elif config.learns_from_teachers:
        raise ConfigError(
            "there are no teachers to learn from: give a --store"
            + ("" if config.comkd else ", or set distill=0 and feature_mse=0 for plain CLIP training")
        )
    else:
        source = PlainSource(shards.expand(config.shards), config)
    if config.distill and not config.comkd and not any(facts.reads_texts for facts in source.teachers.values()):
        raise ConfigError(
            "no teacher reads texts, and distill learns how alike images and texts are; set distill=0 and feature_mse=1"
        )
    what = {"num_views": f"views of an image in view set {config.view_set}", "num_captions": "captions in a text set"}
    for setting, most in source.most.items():
        if (asked := getattr(config, setting)) and 0 < most < asked:
            raise ConfigError(
                f"{setting}={asked}: the store has {most} {what[setting]}; ask for fewer, or leave it out to use all"
            )
    return source


class Mixture:
    """Several sources as one. Their shards may have the same names: each is called after its part, `0/00000`.

    Teachers are those of all parts; one that a part does not have answers NaN for its samples. Text sets are those that
    all parts have, or one drawn for each sample from those of its own part (`captions=mix`).
    """

    def __init__(self, config: TrainConfig) -> None:
        self._captions = config.captions
        stores = {part.store: Store(part.store) for part in config.data if part.store}
        manifests = {url: store.promised() for url, store in stores.items()}
        _check_teachers(config, manifests)
        self.text_sets = [MIX] if config.captions == "mix" else _common_texts(config, manifests)
        self._parts = [_source(part, config, stores, self.text_sets) for part in config.data]
        names = {name: facts for part in self._parts for name, facts in part.teachers.items()}
        self.teachers = {
            name: replace(facts, partial=any(name not in part.teachers for part in self._parts))
            for name, facts in names.items()
        }
        self.good_rows: dict[str, GoodRows] = {
            f"{number}/{shard}": replace(rows, times=asked.weight)
            for number, (asked, part) in enumerate(zip(config.data, self._parts, strict=True))
            for shard, rows in part.good_rows.items()
        }
        self.num_skipped = sum(part.num_skipped for part in self._parts)
        self.most = {setting: max(part.most[setting] for part in self._parts) for setting in self._parts[0].most}
        weights = [asked.weight for asked in config.data]
        self.fingerprint = fingerprint(f"{weights} {[part.fingerprint for part in self._parts]}", {})

    def open(self, shard: str, epoch: int) -> Opened:
        """What a part gives, with NaN for the teachers that it has not."""
        number, _, name = shard.partition("/")
        opened = self._parts[int(number)].open(name, epoch)
        absent = {name: facts for name, facts in self.teachers.items() if name not in opened.image_targets}
        unseen = {name: _unseen(len(opened.keys), facts) for name, facts in absent.items()}
        read = {name: rows for name, rows in unseen.items() if absent[name].reads_texts}
        captions, targets = opened.captions, opened.text_targets
        if self._captions == "mix":  # of tars alone there is one set, under its own name
            captions, targets = {MIX: next(iter(captions.values()))}, {MIX: next(iter(targets.values()), {})}
        return replace(
            opened,
            captions=captions,
            image_targets=opened.image_targets | unseen,
            text_targets={text_set: targets.get(text_set, {}) | read for text_set in captions},
        )


def _source(part: DataConfig, config: TrainConfig, stores: dict[str, Store], text_sets: list[str]) -> Source:
    """One part, which is asked for what it has of what is wanted."""
    if part.store is None:
        return PlainSource(shards.expand(part.shards), config.but(data=[], shards=part.shards))
    store = stores[part.store]
    recipe = store.promised().parsed_recipe()
    asked: dict[str, Any] = {
        "teachers": [name for name in config.teachers or recipe.teachers if name in recipe.teachers],
        "dist_logit_scale": {k: v for k, v in config.dist_logit_scale.items() if k in recipe.teachers},
    }
    if config.captions == "each":
        asked["text_sets"] = text_sets
    own = config.but(data=[], shards=part.shards, store=part.store, **asked)
    return StoreSource(store, shards.expand(part.shards), own)


def _check_teachers(config: TrainConfig, manifests: dict[str, Manifest]) -> None:
    """Raises ConfigError where one is asked for that no store has, or two stores call two models by one name."""
    if config.learns_from_teachers and not manifests:
        raise ConfigError("there are no teachers to learn from: give a store, or set distill=0 and feature_mse=0")
    known: dict[str, tuple[str, Any]] = {}
    for store, manifest in manifests.items():
        for name, facts in manifest.models["teachers"].items():
            first, said = known.setdefault(name, (store, facts))
            if said.get("weights_sha256") != facts.get("weights_sha256") or said["width"] != facts["width"]:
                raise ConfigError(
                    f"'{name}' is one model in {first} and another in {store}; leave it out with teachers=[..], or "
                    "write one of the stores anew with another name for it"
                )
    for wanted in (config.teachers, list(config.dist_logit_scale)):
        some(wanted, list(known), "teacher", " and ".join(manifests))


def _common_texts(config: TrainConfig, manifests: dict[str, Manifest]) -> list[str]:
    """The text sets that all parts have, or those that are asked for."""
    sets = [
        list(manifests[part.store].parsed_recipe().text_sets) if part.store else ["original"] for part in config.data
    ]
    common = [name for name in sets[0] if all(name in of for of in sets)]
    told = " and ".join(part.store or part.shards for part in config.data)
    if not common:
        raise ConfigError(f"{told} have no text set in common; set captions=mix to draw one for each sample")
    return some(config.text_sets, common, "common text set", told)


def _unseen(num_rows: int, facts: TeacherFacts) -> np.ndarray:
    """(N, D_k) of NaN, in the room of one number."""
    return np.broadcast_to(np.array(np.nan, ml_dtypes.bfloat16), (num_rows, facts.width))
