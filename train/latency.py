"""Milliseconds per call of a student's towers, by one protocol for all students.

Every student is folded, in eval mode and inference mode, warmed up, and run on random inputs that are already on the
device. Eager or compiled is one choice for all rows; each row is compiled anew for its own shape, since torch.compile
stops making graphs of code that it has compiled for several models. An eager image tower runs in both layouts of
memory, and the faster one counts (a compiler chooses its own). On CUDA a tower is captured in a CUDA graph and
replayed, so that no student is judged by how many kernels it launches; time is between two CUDA events. Elsewhere it is
the wall clock, and eager rows are timed in turns, a call of each in every round, so that what else runs on the machine
slows all alike.
Compare only rows of one call on one machine with one number of threads: more threads do not help all students alike.
The quartiles beside the median show how steady it was.
What is counted beside it: flops.py.
"""

import copy
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from train import students
from train.flops import count
from train.students import scan
from train.students.fold import fold

WARM_UP = 10  # calls
Tower = Literal["image", "text"]
Precision = Literal["fp32", "bf16"]
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One tower on one kind of input. `size` is pixels a side, or tokens; times are of a call with `batch` inputs.

    Times are None where the machine ran out of memory. `machine` names device, threads, versions and scans.
    """

    student: str
    tower: Tower
    size: int
    batch: int
    ms_median: float | None
    ms_min: float | None
    ms_quartiles: tuple[float, float] | None
    params: int
    gflops: float
    gops_pointwise: float
    repeats: int
    precision: Precision
    compiled: bool
    machine: str
    channels_last: bool = False


class _TextTower(nn.Module):
    """open_clip has two kinds of models; in one of them the text tower is no module of its own."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(tokens)
        return features


def measure(
    names: Iterable[str],
    sizes_px: Iterable[int] = (),
    batches: Iterable[int] = (1, 256),
    repeats: int = 50,
    device: str = "cpu",
    precision: Precision = "fp32",
    compiled: bool = False,
    towers: Iterable[Tower] = ("image", "text"),
) -> list[Row]:
    """Rows for every student, its image tower at every size that it takes, its text tower, and every batch.

    names: of the table, or folders. sizes_px: without any, each student's own. bf16 is weights and activations, without
    autocast. A size that a student does not take is logged and has no rows. Raises ConfigError for a name that is
    neither.
    """
    place = torch.device(device)
    jobs = _jobs(names, sizes_px, batches, repeats, place, precision, compiled, set(towers))
    in_turns = place.type != "cuda" and not compiled
    best: dict[tuple[str, str, int, int], Row] = {}
    for group in [list(jobs)] if in_turns else ([job] for job in jobs):
        for job, times in zip(group, _times(group, compiled), strict=True):
            median, fastest, quartiles = _spread(times)
            row = replace(job.row, ms_median=median, ms_min=fastest, ms_quartiles=quartiles)
            other = best.setdefault((row.student, row.tower, row.size, row.batch), row)
            if (row.ms_median or math.inf) < (other.ms_median or math.inf):
                best[row.student, row.tower, row.size, row.batch] = row
    return list(best.values())


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned columns, under a line for each machine and way of running that they come from."""
    head = ["student", "tower", "size", "batch", "ms", "min", "q1", "q3", "M params", "GFLOP", "Gop pointwise"]
    lines = []
    kinds: dict[str, list[list[str]]] = {}
    for row in rows:
        kind = f"{row.machine}; {row.precision}, {'compiled' if row.compiled else 'eager'}, {row.repeats} repeats"
        times = [row.ms_median, row.ms_min, *(row.ms_quartiles or (None, None))]
        kinds.setdefault(kind, []).append(
            [row.student, row.tower, str(row.size), str(row.batch)]
            + ["out of memory" if ms is None else f"{ms:.2f}" for ms in times]
            + [f"{row.params / 1e6:.2f}", f"{row.gflops:.3g}", f"{row.gops_pointwise:.3g}"]
        )
    for kind, cells in kinds.items():
        widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
        lines.append(kind)
        for line in [head, *cells]:
            padded = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """Device, threads, versions, and the paths of state-space scans."""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, CUDA graphs"
    else:
        where = f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
    packages = [f"{name} {_version(name)}" for name in ("torch", "timm", "open_clip_torch", "triton", "mamba_ssm")]
    return f"{where}; {', '.join(packages)}; {scan.describe(device)}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _spread(ms: list[float] | None) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Median, minimum, quartiles."""
    if ms is None:
        return None, None, None
    first, median, third = statistics.quantiles(ms, n=4, method="inclusive")
    return median, min(ms), (first, third)


@dataclass(frozen=True)
class _Job:
    """A tower that is to be timed, in one layout of memory."""

    row: Row
    tower: nn.Module
    inputs: Tensor


def _jobs(
    names: Iterable[str],
    sizes_px: Iterable[int],
    batches: Iterable[int],
    repeats: int,
    place: torch.device,
    precision: Precision,
    compiled: bool,
    towers: set[Tower],
) -> Iterator[_Job]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for name in names:
        student = students.create(name)
        model = fold(student.model)
        num_image = _num_params(model.visual)
        num_text = _num_params(model) - num_image - model.logit_scale.numel()
        tokens = student.tokenizer(["a photo of a dog"])
        inputs: list[tuple[Tower, int, nn.Module, int, Tensor]] = [
            ("image", size, model.visual, num_image, torch.rand(1, 3, size, size))
            for size in sizes_px or [student.image_px]
        ]
        inputs.append(("text", tokens.shape[1], _TextTower(model), num_text, tokens))
        for kind, size, tower, params, one in inputs:
            if kind not in towers:
                continue
            try:
                gflops, gops = count(tower, one)
            except (AssertionError, RuntimeError, ValueError) as error:  # what towers of timm, open_clip and ours raise
                log.warning("%s takes no images of %d px: %s", name, size, error)
                continue
            work = (params, gflops, gops, repeats, precision, compiled, machine(place))
            ready = copy.deepcopy(tower).to(place, dtype).eval()
            for batch in batches:
                many = one.expand(batch, *one.shape[1:]).contiguous().to(place, dtype if kind == "image" else None)
                row = Row(name, kind, size, batch, None, None, None, *work)
                yield _Job(row, ready, many)
                if kind == "image" and not compiled:
                    turned: Any = copy.deepcopy(ready)
                    turned = turned.to(memory_format=torch.channels_last)
                    many = many.to(memory_format=torch.channels_last)
                    yield _Job(replace(row, channels_last=True), turned, many)


def _times(group: list[_Job], compiled: bool) -> list[list[float] | None]:
    """Of each job the milliseconds of each of its repeats; None where memory does not suffice. On CUDA, and compiled,
    a group is one job."""
    if compiled:
        torch.compiler.reset()
    calls = [partial(torch.compile(job.tower, dynamic=False) if compiled else job.tower, job.inputs) for job in group]
    repeats = group[0].row.repeats if group else 0
    with torch.inference_mode():
        if any(job.inputs.is_cuda for job in group):
            return [_unless_memory_is_full(partial(_cuda_times, call, repeats)) for call in calls]
        return _wall_times(calls, repeats)


def _unless_memory_is_full(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except RuntimeError as error:  # CUDA's error has a type of its own, a CPU's has not
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            return None
        raise


def _wall_times(calls: Sequence[Callable[[], Any]], repeats: int) -> list[list[float] | None]:
    """In turns, those that memory suffices for."""

    def warmed_up(call: Callable[[], Any]) -> bool:
        for _ in range(WARM_UP):
            call()
        return True

    fits = [bool(_unless_memory_is_full(partial(warmed_up, call))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, its, fit in zip(calls, times, fits, strict=True):
            if fit:
                start = time.perf_counter()
                call()
                its.append(1000 * (time.perf_counter() - start))
    return [its or None for its in times]


def _cuda_times(call: Callable[[], Any], repeats: int) -> list[float]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as capturing asks for: kernels are chosen and compiled before it
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(WARM_UP):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times
