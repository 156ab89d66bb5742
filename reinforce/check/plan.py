"""What a run will cost, before it is begun: samples, bytes, hours of each stage, memory of a worker.

A few samples of the first shard are reinforced into a store that is thrown away, and timed: so the figures are those of
this machine, this recipe and these images. For a card that is not here, hours come from counted FLOPs and the card's
rate alone, and what the CPU does is left out.
"""

import os
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from reinforce.config import Recipe, RunOptions
from reinforce.data import shards
from reinforce.data.captions import EXTENSIONS
from reinforce.data.shards import IMAGES, Shard
from reinforce.errors import ConfigError
from reinforce.models.flops import tflop
from reinforce.models.frozen import FrozenModel
from reinforce.run import driver
from reinforce.run.worker import Worker
from reinforce.store import arrays
from reinforce.store.columns import Column, columns
from reinforce.store.store import Store

# Dense bfloat16 matrix products, TFLOP/s, as the makers state them.
CARDS = {"A100": 312, "H100": 989, "H200": 989, "L4": 121, "L40S": 362, "RTX4090": 165}
# Of that rate, what two ViT-L/14 and a CoCa reached on an H100, from JPEG to columns (docs/results/gpu.md).
UTILISATION = 0.45
LOOKED_AT = 3  # tars whose samples are counted; the others are taken to have as many per byte
TRIAL_S = 60.0  # what reinforcing a few samples, to see what it costs, may take
MOST = 1024  # of these samples
BYTES_OF_ITEM = {"caption": 120, "pixels": 8, "augment": 80}  # of a view or a caption, about
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """`stages` has for each model the TFLOP of one sample, its share of all, and its hours. `hours` are of one worker,
    `hours_of_all` of `workers` at once, which load their models first, for `load_seconds`; the start of Ray comes on
    top. `bytes` is the store's size when all is done, `bytes_now` what is there."""

    store: str
    shards: int
    shards_todo: int
    samples_todo: int
    bytes_now: int
    bytes: int
    stages: dict[str, dict[str, float]]
    seconds_per_sample: float
    load_seconds: float
    hours: float
    workers: int
    hours_of_all: float
    memory_gib: float
    measured_on: str


def plan(patterns: str, url: str, recipe: Recipe, options: RunOptions, card: str | None = None) -> Plan:
    """`card`: one of CARDS, to reckon with in place of measuring time here.

    Raises ConfigError, ManifestMismatch as a run does; nothing is written into the store.
    """
    if card and card not in CARDS:
        raise ConfigError(f"no figures of a card '{card}'; there are those of {', '.join(CARDS)}")
    listed, store = shards.expand(patterns), Store(url)
    manifest = store.manifest()
    if manifest:
        manifest.check_recipe(recipe, url, options.extend)
    wanted = columns(recipe, manifest.format_version) if manifest else columns(recipe)
    lacking = driver.lacking(store, listed, wanted)
    todo = list(lacking)
    missing = {column for absent in lacking.values() for column in absent}
    bytes_now = store.objects.total_bytes("") if manifest else 0
    if not todo:
        return Plan(url, len(listed), 0, 0, bytes_now, bytes_now, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, "nothing to do")
    samples, largest = _num_samples(todo)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        alone = recipe.but(batch_size=1) if card else recipe  # to count FLOPs one sample is enough
        start = time.monotonic()
        worker = Worker(alone, f"{folder}/store", options.but(extend=False))
        load_s = time.monotonic() - start
        stages = tflop_by_stage(worker, missing)
        tflop = sum(of["tflop"] for of in stages.values())
        if card:
            seconds, where = tflop / (CARDS[card] * UTILISATION), f"{card}, by FLOPs at {UTILISATION:.0%} of its rate"
            of_sample, of_shard = _expected_bytes(worker, missing)
        else:
            trial = _trial(worker, todo[0], Path(folder), missing)
            seconds, where, of_sample, of_shard = trial.seconds, trial.where, trial.of_sample, trial.of_shard
        memory = _memory(worker, largest, missing, store.objects.local)
    for of in stages.values():
        of["share"] = of["tflop"] / tflop if tflop else 0.0
        of["hours"] = of["share"] * samples * seconds / 3600
    workers = max(1, min(driver.num_workers(options), len(todo)))
    return Plan(
        url,
        len(listed),
        len(todo),
        samples,
        bytes_now,
        round(bytes_now + of_sample * samples + of_shard * len(todo)),
        stages,
        seconds,
        load_s,
        samples * seconds / 3600,
        workers,
        (samples * seconds / workers + load_s) / 3600,
        memory / _GIB,
        where,
    )


def in_words(found: Plan) -> dict[str, Any]:
    """The same, to be read: sizes and times in the units that fit."""
    stages = {
        name: f"{of['share']:.0%}, {_duration(of['hours'])} ({of['tflop']:.2g} TFLOP for a sample)"
        for name, of in found.stages.items()
    }
    return {
        "store": found.store,
        "shards": f"{found.shards}, of which {found.shards_todo} are to be done",
        "samples to do": found.samples_todo,
        "store's size": f"{_size(found.bytes)}, of which {_size(found.bytes_now)} are there",
        "time of one worker": f"{_duration(found.hours)}; {_duration(found.load_seconds / 3600)} to load its models",
        "of which": stages,
        f"time of {found.workers} at once": _duration(found.hours_of_all),
        "memory of each": f"{found.memory_gib:.2f} GiB, and what pictures and activations take",
        "measured on": found.measured_on,
    }


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.3g} hours"


def _num_samples(todo: list[Shard]) -> tuple[int, int]:
    """Of all, and of the largest: counted in a few tars, and by their lengths in the others."""
    lengths = [shards.tar_bytes(shard.url) for shard in todo]
    looked_at = sorted({round(i * (len(todo) - 1) / max(1, LOOKED_AT - 1)) for i in range(LOOKED_AT)})
    counts = [sum(1 for _ in shards.read_parts(todo[i], ())) for i in looked_at]
    per_byte = sum(counts) / max(1, sum(lengths[i] for i in looked_at))
    return round(sum(lengths) * per_byte), max(max(counts), round(max(lengths) * per_byte))


@dataclass(frozen=True)
class _Trial:
    """Seconds and bytes of one sample, and the bytes that a shard takes besides."""

    seconds: float
    of_sample: float
    of_shard: float
    where: str


def _trial(worker: Worker, shard: Shard, folder: Path, missing: set[Column]) -> _Trial:
    """Reinforces a batch, which loads and compiles what a first batch does, and then, by the clock, as many samples of
    the shard as fit into TRIAL_S."""
    first_num, first_s, *_ = _tried(worker, shard, worker.recipe.batch_size, folder, missing)
    per_sample = first_s / max(1, first_num)
    asked = min(MOST, max(2 * worker.recipe.batch_size, int(TRIAL_S / max(per_sample, 1e-6))))
    num, seconds, chunks, metadata = _tried(worker, shard, asked, folder, missing)
    device = next(iter(worker.loaded.teachers.values())).frozen.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
    where = f"{place}, {num} samples, batches of {worker.recipe.batch_size}, one worker"
    return _Trial(seconds / max(1, num), chunks / max(1, num), metadata, where)


def _tried(worker: Worker, shard: Shard, num: int, folder: Path, missing: set[Column]) -> tuple[int, float, int, int]:
    """Of the first `num` samples of a shard: how many there are, seconds, bytes of their chunks, and of metadata."""
    tar = str(folder / f"first{num}.tar")
    shards.write(tar, islice(shards.read_parts(shard, IMAGES + EXTENSIONS), num))
    [few] = shards.expand(tar)
    if set(worker.columns) - missing:  # what is in the store already costs nothing: make it before the clock runs
        worker.reinforce(few)
        for column in missing:
            worker.store.remove(few.name, column)
    start = time.monotonic()
    report = worker.reinforce(few)
    seconds = time.monotonic() - start
    objects = worker.store.objects
    chunks = sum(worker.store.stored_bytes(few.name, column) for column in missing)
    there = sum(objects.total_bytes(f"{few.name}/{column}") for column in set(worker.columns) - missing)
    return report.read, seconds, chunks, objects.total_bytes(few.name) - there - chunks


def _expected_bytes(worker: Worker, missing: set[Column]) -> tuple[float, float]:
    """Of one sample, and of a shard besides, without having any: embeddings shrink as random directions do."""
    of_sample = 0.0
    for column in missing:
        shrunk = 1.0
        if column.teacher:
            directions = np.random.default_rng(0).normal(size=(512, worker.loaded.teachers[column.teacher].width))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            array = directions.astype(ml_dtypes.bfloat16)
            shrunk = sum(map(len, arrays.encode(array, 0, worker.recipe.embeddings).parts)) / array.nbytes
        of_sample += shrunk * _bytes_of_row(worker, column)
    return of_sample, 2000.0 * len(missing)


def tflop_by_stage(worker: Worker, missing: set[Column]) -> dict[str, dict[str, float]]:
    """For each model TFLOP per sample."""
    recipe, stages = worker.recipe, dict[str, dict[str, float]]()
    for name, teacher in worker.loaded.teachers.items():
        model = teacher.frozen.model
        if views := sum(v.num_views for s, v in recipe.view_sets.items() if Column("view", s, name) in missing):
            of_one = tflop(model.encode_image, _blank(teacher.frozen))
            stages[f"{name}, {views} views"] = {"tflop": views * of_one}
        if texts := sum(num for s, num in recipe.text_sets.items() if Column("text", s, name) in missing):
            of_one = tflop(model.encode_text, teacher.frozen.tokenize(["a"]).to(teacher.device))
            stages[f"{name}, {texts} texts"] = {"tflop": texts * of_one}
    for name, captioner in worker.loaded.captioners.items():
        if Column("text", name, "caption") in missing:
            numbers = np.zeros((1, captioner.config.num_captions, captioner.config.max_tokens))
            of_all = tflop(captioner.decoder(graphs=False).generate, _blank(captioner.frozen), numbers)
            stages[f"{name}, {captioner.config.num_captions} captions"] = {"tflop": of_all}
    return stages


def _blank(frozen: FrozenModel) -> Tensor:
    """One image, as the model takes it."""
    return frozen.normalise(torch.zeros(1, frozen.image_px, frozen.image_px, 3, dtype=torch.uint8))


def _memory(worker: Worker, rows: int, missing: set[Column], local: bool) -> float:
    """Bytes that a worker needs: its models, the answers of a shard, and the largest column as it is encoded; where the
    store is not on a local disk, that once more, as the object that is put. Decoded pictures and activations come on
    top."""
    sizes = [rows * _bytes_of_row(worker, column) for column in missing]
    held = [
        *(t.frozen for t in worker.loaded.teachers.values()),
        *(c.frozen for c in worker.loaded.captioners.values()),
    ]
    weights = sum(p.numel() * p.element_size() for frozen in held for p in frozen.model.parameters())
    return float(weights + sum(sizes) + (1 if local else 2) * max(sizes, default=0))


def _bytes_of_row(worker: Worker, column: Column) -> int:
    if column.kind == "sample":
        return 64
    items = column.num_items(worker.recipe)
    if column.teacher:
        return items * 2 * int(worker.loaded.teachers[column.teacher].width)
    return items * BYTES_OF_ITEM[column.part]
