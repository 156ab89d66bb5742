"""What a step from a store costs over a step of plain CLIP training: the same student, images and number of texts.

    python -m benchmarks.price [--shards TARS --store STORE --student NAME] [--steps 20] [--json]

Plain training sees the same tars, draws its own views, and has as many texts: none of what teachers know. Both are
timed in turn, step by step, in one process; of the ratios of neighbouring steps the quartiles are given. Loading, which
is part of a step here, is also timed alone. Then each loads whole epochs, and bytes are what the process asked the
kernel for meanwhile (/proc/self/io, Linux), per sample.
"""

import json
import statistics
import time
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any

import torch
import typer

from benchmarks.slab import read_so_far
from train import students
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.mixture import source_of
from train.data.sources import PlainSource
from train.objective import ClipTrainee, backward

WHAT = ("load_ms", "compute_ms", "step_ms")


class Side:
    """One of the two trainings."""

    def __init__(self, config: TrainConfig, num_texts: int, device: torch.device) -> None:
        self.source = source_of(config)
        self.num_texts, self.device = num_texts, device
        student = students.create(config.student)
        self.trainee = ClipTrainee(student, self.source.teachers, config).train().to(device)
        self.loader = Loader(
            self.source, student.image_px, student.tokenizer, config.global_batch_size, config.streams, 0
        )
        self.batches = self.loader.batches(0, 10**9)
        self.optimizer = torch.optim.AdamW(self.trainee.parameters(), lr=1e-4)

    def load(self) -> Batch:
        (batch,) = islice(self.batches, 1)
        if isinstance(self.source, PlainSource):  # one text set: as many texts as the other side has
            tokens = {f"{i}": next(iter(batch.tokens.values())) for i in range(self.num_texts)}
            batch = replace(batch, tokens=tokens, text_targets={name: {} for name in tokens})
        return batch

    def bytes_per_sample(self, epochs: int) -> float:
        """What loading reads, a shard's index and columns included, over whole epochs."""
        num = epochs * self.loader.steps_per_epoch
        before = read_so_far()
        samples = sum(len(batch.keys) for batch in self.loader.batches(0, num))
        return (read_so_far() - before) / samples

    def step(self, batch: Batch, number: int) -> None:
        batch = batch.map(lambda x: x.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        backward(self.trainee, [batch], self.trainee.loss, number)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(
    shards: str = "samples/train/{00000..00003}.tar",
    store: str = "stores/samples.zarr",
    student: str = "mamba_tiny",
    batch_size: int = 128,
    steps: int = 20,
    epochs: int = 4,
    device: str = "cpu",
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time both in turn."""
    config = TrainConfig(shards=shards, store=store, student=student, global_batch_size=batch_size, precision="fp32")
    result = measure(config, steps, epochs, torch.device(device))
    print(json.dumps(result) if json_ else "\n".join(f"{name}: {value}" for name, value in result.items()))


def measure(config: TrainConfig, steps: int, epochs: int, device: torch.device) -> dict[str, Any]:
    """`epochs` of loading alone for the bytes; 0 for none."""
    reinforced = Side(config, 0, device)
    num_texts = len(reinforced.source.text_sets)
    view = {"fresh_views": config.fresh_views.but(view_px=reinforced.trainee.student.image_px)}
    plain = Side(config.but(store=None, distill=0.0, **view), num_texts, device)
    sides = {"reinforced": reinforced, "plain": plain}
    told: dict[str, list[float]] = {f"{name}_{what}": [] for name in sides for what in WHAT}
    for number in range(steps + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            batch = sides[name].load()
            loaded = time.perf_counter()
            sides[name].step(batch, number)
            if number:  # the first one warms up
                told[f"{name}_load_ms"].append(1e3 * (loaded - start))
                told[f"{name}_step_ms"].append(1e3 * (time.perf_counter() - start))
                told[f"{name}_compute_ms"].append(1e3 * (time.perf_counter() - loaded))
    result: dict[str, Any] = {
        "student": config.student,
        "batch_size": config.global_batch_size,
        "precision": config.precision,
        "texts": num_texts,
        "steps": steps,
    }
    result |= {name: round(statistics.median(values), 1) for name, values in told.items()}
    for what in WHAT:
        ratios = [a / b for a, b in zip(told[f"reinforced_{what}"], told[f"plain_{what}"], strict=True)]
        result[f"{what.removesuffix('_ms')}_ratio_quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    if epochs:
        result |= {f"{name}_bytes_per_sample": round(side.bytes_per_sample(epochs)) for name, side in sides.items()}
    return result


if __name__ == "__main__":
    typer.run(main)
