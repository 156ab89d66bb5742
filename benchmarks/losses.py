"""What the losses of a batch cost, forwards and backwards, against the same written out with whole matrices.

    python -m benchmarks.losses [--batch 8192] [--width 512] [--teachers 2] [--teacher-width 768] [--device cpu]

One student text set. The plain way holds the similarities of student and teachers, their softmax and what autograd
keeps of them; ours computes a block of rows with its gradient and lets go of it. Timed in turns, CPU seconds on a CPU;
peak memory is that of the process, which Linux tells, and on a GPU CUDA's.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from reinforce.terminal import show
from train.losses import TeacherPairs, pair_losses

WEIGHT = 0.75
Loss = Callable[[Tensor, Tensor, Tensor, list[TeacherPairs]], Tensor]
Shape: TypeAlias = tuple[int, int, int, int, str]  # batch, width, teachers, their width, device


def ours(image: Tensor, text: Tensor, scale: Tensor, teachers: list[TeacherPairs]) -> Tensor:
    return pair_losses(image, text, scale, teachers, WEIGHT).loss


def plain(image: Tensor, text: Tensor, scale: Tensor, teachers: list[TeacherPairs]) -> Tensor:
    """As it is published: both directions from matrix products of their own."""
    total = torch.zeros((), device=image.device)
    for side in (0, 1):
        x, y = (image, text) if side == 0 else (text, image)
        log_p = (scale * x @ y.T).log_softmax(-1)
        total = total - (1 - WEIGHT) * log_p.diagonal().sum()
        with torch.no_grad():
            sides = [(t.image, t.text) if side == 0 else (t.text, t.image) for t in teachers]
            targets = [(t.logit_scale * u @ v.T).softmax(-1) for t, (u, v) in zip(teachers, sides, strict=True)]
            target = torch.stack(targets).mean(0)
        total = total - WEIGHT * (target * log_p).sum()
    return total / (2 * len(image))


WAYS: dict[str, Loss] = {"ours": ours, "plain": plain}


def inputs(
    batch: int, width: int, num_teachers: int, teacher_width: int, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor], list[TeacherPairs]]:
    torch.manual_seed(0)

    def units(size: int) -> Tensor:
        return F.normalize(torch.randn(batch, size, device=device), dim=-1)

    teachers = [TeacherPairs(units(teacher_width), units(teacher_width), 100.0) for _ in range(num_teachers)]
    image, text, scale = units(width), units(width), torch.tensor(50.0, device=device)
    return (image.requires_grad_(), text.requires_grad_(), scale.requires_grad_()), teachers


def run(way: str, *shape: *Shape) -> list[Tensor]:
    leaves, teachers = inputs(*shape)
    loss = WAYS[way](*leaves, teachers)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def seconds(way: str, *shape: *Shape) -> float:
    leaves, teachers = inputs(*shape)
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter() if leaves[0].is_cuda else time.process_time()
    torch.autograd.grad(WAYS[way](*leaves, teachers), leaves)
    if leaves[0].is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter() - start
    return time.process_time() - start


def peak_bytes(way: str, *shape: *Shape) -> int:
    """Over what inputs and libraries take."""
    if shape[-1] == "cuda":
        leaves, teachers = inputs(*shape)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(WAYS[way](*leaves, teachers), leaves)
        return torch.cuda.max_memory_allocated() - before
    leaves, teachers = inputs(*shape)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    torch.autograd.grad(WAYS[way](*leaves, teachers), leaves)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def main(
    batch: int = 8192,
    width: int = 512,
    num_teachers: Annotated[int, typer.Option("--teachers", min=1)] = 2,
    teacher_width: int = 768,
    repeats: int = 3,
    device: str = "cpu",
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare our losses with whole matrices."""
    show(compare((batch, width, num_teachers, teacher_width, device), repeats), json_)


def compare(shape: Shape, repeats: int) -> dict[str, float | int | str]:
    """Seconds and peak memory of both ways, and how far apart loss and gradients are."""
    expected, got = run("plain", *shape), run("ours", *shape)
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
    del expected, got
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, times in taken.items():
            times.append(seconds(way, *shape))
    peaks = {way: peak_bytes(way, *shape) for way in WAYS}
    told: dict[str, float | int | str] = dict(
        zip(("batch", "width", "teachers", "teacher_width", "device"), shape, strict=True)
    )
    ratio = statistics.median(a / b for a, b in zip(taken["ours"], taken["plain"], strict=True))
    told |= {f"{way}_s": round(statistics.median(times), 4) for way, times in taken.items()}
    told |= {f"{way}_peak_mb": round(peak / 1e6) for way, peak in peaks.items()}
    told |= {"time_over_plain": round(ratio, 3), "memory_over_plain": round(peaks["ours"] / max(1, peaks["plain"]), 3)}
    return told | {"largest_difference": off}


if __name__ == "__main__":
    typer.run(main)
