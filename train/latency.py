"""Milliseconds per call of a student's towers, by one protocol for all students.

Every student is folded, in eval mode and inference mode, warmed up, and run on random inputs that are already on the
device. Eager or compiled is one choice for all rows; each row is compiled anew for its own shape, since torch.compile
stops making graphs of code that it has compiled for several models. On CUDA a tower is captured in a CUDA graph and
replayed, so that no student is judged by how many kernels it launches; time is between two CUDA events; an eager image
tower runs in both layouts of memory, and the faster one counts (a compiler chooses its own). Elsewhere time is the wall
clock, and the layout NCHW.
Compare only rows of one call on one machine; the quartiles beside the median show how steady it was.

What is counted for one input, on the plain definitions of the scans:
  gflops           matrix products, convolutions and attention, two for a multiplication with its addition
  gops_pointwise   numbers written by elementwise operations, copies among them, and running sums: activations, scales,
                   and the recurrences of state spaces, which gflops does not see. Norms and softmax are in neither.
"""

import copy
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from train import students
from train.students import scan
from train.students.fold import fold

WARM_UP = 10  # calls
Tower = Literal["image", "text"]
Precision = Literal["fp32", "bf16"]
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


class _PointwiseCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers that elementwise operations write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags or func is torch.ops.aten.cumsum.default:
            self.total += out.numel()
        return out


class _TextTower(nn.Module):
    """open_clip has two kinds of models; in one of them the text tower is no module of its own."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(tokens)
        return features


def count(tower: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """(gflops, gops_pointwise) of a call, without running it: on the meta device, the scans by their definitions."""
    nowhere = copy.deepcopy(tower).to("meta")
    with torch.enable_grad(), _PointwiseCounter() as pointwise, FlopCounterMode(display=False) as flops:
        nowhere(inputs.to("meta"))
    return flops.get_total_flops() / 1e9, pointwise.total / 1e9


def measure(
    names: Iterable[str],
    sizes_px: Iterable[int] = (256,),
    batches: Iterable[int] = (1, 256),
    repeats: int = 50,
    device: str = "cpu",
    precision: Precision = "fp32",
    compiled: bool = False,
    towers: Iterable[Tower] = ("image", "text"),
) -> list[Row]:
    """Rows for every student, its image tower at every size that it takes, its text tower, and every batch.

    names: of the table, or folders. bf16 is weights and activations, without autocast. A size that a student does not
    take is logged and has no rows. Raises ConfigError for a name that is neither.
    """
    place = torch.device(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    settings: dict[str, Any] = {"precision": precision, "compiled": compiled, "machine": machine(place)}
    rows = []
    for name in names:
        student = students.create(name)
        model = fold(student.model)
        num_image = _num_params(model.visual)
        num_text = _num_params(model) - num_image - model.logit_scale.numel()
        tokens = student.tokenizer(["a photo of a dog"])
        inputs: list[tuple[Tower, int, nn.Module, int, Tensor]] = [
            ("image", size, model.visual, num_image, torch.rand(1, 3, size, size)) for size in sizes_px
        ]
        inputs.append(("text", tokens.shape[1], _TextTower(model), num_text, tokens))
        for kind, size, tower, params, one in inputs:
            if kind not in towers:
                continue
            try:
                gflops, gops = count(tower, one)
            except (AssertionError, RuntimeError, ValueError) as error:  # what towers of timm, open_clip and ours raise
                log.warning("%s takes no images of %d px: %s", student.name, size, error)
                continue
            ready = copy.deepcopy(tower).to(place, dtype).eval()
            for batch in batches:
                many = one.expand(batch, *one.shape[1:]).contiguous().to(place, dtype if kind == "image" else None)
                spread = _spread(_times(ready, many, repeats, compiled))
                row = Row(student.name, kind, size, batch, *spread, params, gflops, gops, repeats, **settings)
                if place.type == "cuda" and kind == "image" and not compiled:
                    row = _or_channels_last(row, ready, many)
                rows.append(row)
    return rows


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


def _or_channels_last(row: Row, tower: nn.Module, images: Tensor) -> Row:
    """The row, or that of the same calls in the other layout of memory, where they are faster."""
    turned: Any = copy.deepcopy(tower)
    turned = turned.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    median, fastest, quartiles = _spread(_times(turned, images, row.repeats, row.compiled))
    if median is None or (row.ms_median is not None and row.ms_median <= median):
        return row
    return replace(row, ms_median=median, ms_min=fastest, ms_quartiles=quartiles, channels_last=True)


def _times(tower: nn.Module, inputs: Tensor, repeats: int, compiled: bool) -> list[float] | None:
    """Milliseconds of each of `repeats` calls, which are at least 2; None where memory does not suffice."""
    if compiled:
        torch.compiler.reset()
    call = partial(torch.compile(tower, dynamic=False) if compiled else tower, inputs)
    try:
        with torch.inference_mode():
            return _cuda_times(call, repeats) if inputs.is_cuda else _wall_times(call, repeats)
    except torch.OutOfMemoryError:
        return None


def _wall_times(call: Callable[[], Any], repeats: int) -> list[float]:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


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
