"""Do mamba-ssm's CUDA kernels compute what the definitions in `train.students.scan` say, and how much faster are they.

    python -m benchmarks.kernels            # CUDA where there is one
    python -m benchmarks.kernels --device cpu

Compared are values and gradients, each with the definition run in float64 on the same inputs; the error is the largest
difference, of the largest value. Tolerances: 1e-9 in float64; 1e-4 in float32, where sums of log-decays lose digits,
and 5e-3 on a GPU, where Triton's products may round to TF32; 5e-2 in bfloat16, whose own step is 8e-3.
Times are of one forward and backward call, median of `--repeats`. Writes one JSON object to stdout; exit 1 where a form
is beyond its tolerance. A form that is not on this machine is named under "absent": a run without a GPU says nothing of
the kernels.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from train.latency import machine
from train.students import plain_scans, scan

Form = Callable[..., Tensor]
CHANNELS, HEADS, HEAD_WIDTH, STATES = 256, 8, 32, 16
SELECTIVE_STATES = 8


def ssd_inputs(batch: int, length: int) -> list[Tensor]:
    """x, dt, A, B, C, D in Mamba's own range of steps and decays."""
    x = torch.randn(batch, length, HEADS, HEAD_WIDTH)
    dt = torch.rand(batch, length, HEADS) * 0.1 + 1e-3
    a = -(torch.rand(HEADS) * 15 + 1)
    b, c = torch.randn(2, batch, length, STATES)
    return [x, dt, a, b, c, torch.ones(HEADS)]


def selective_inputs(batch: int, length: int) -> list[Tensor]:
    """u, delta, A, B, C, D as MambaVision gives them."""
    u = torch.randn(batch, CHANNELS, length)
    delta = torch.rand(batch, CHANNELS, length) * 0.1 + 1e-3
    a = -torch.arange(1.0, SELECTIVE_STATES + 1).repeat(CHANNELS, 1)
    b, c = torch.randn(2, batch, SELECTIVE_STATES, length)
    return [u, delta, a, b, c, torch.ones(CHANNELS)]


# What stays float32 when the others are narrow: dt, A and D of SSD, A and D of the selective scan.
FAMILIES: dict[str, tuple[Callable[[int, int], list[Tensor]], Form, dict[str, Form], set[int]]] = {
    "ssd": (
        ssd_inputs,
        plain_scans.ssd_sequential,
        {"product": plain_scans.ssd_product, "chunks": plain_scans.ssd_chunks, "kernel": scan.ssd_kernel},
        {1, 2, 5},
    ),
    "selective scan": (
        selective_inputs,
        plain_scans.selective_scan_sequential,
        {
            "sequential": plain_scans.selective_scan_sequential,
            "doubling": plain_scans.selective_scan_doubling,
            "kernel": scan.selective_scan,
        },
        {2, 5},
    ),
}


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float64:
        return 1e-9
    if dtype == torch.float32:
        return 5e-3 if device.type == "cuda" else 1e-4
    return 5e-2


def run(form: Form, inputs: list[Tensor]) -> list[Tensor]:
    """The value and the gradient by every input, of a fixed weighting of the values."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = form(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    ratios = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
    return max(ratios)


def milliseconds(form: Form, inputs: list[Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):  # two to warm up
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(form, inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
    lengths: Annotated[str, typer.Option(help="Tokens, 2 or more, with commas.")] = "64,200,256,1024,4096",
    batch: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """Compares and times every form of both scans."""
    place = torch.device(device)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    absent = set()
    installed = {"ssd": scan.CHUNK_SCAN, "selective scan": scan.SELECTIVE_SCAN}
    dtypes = [torch.float32, torch.bfloat16] if place.type == "cuda" else [torch.float64, torch.float32]
    for length in map(int, lengths.split(",")):
        for family, (make, definition, forms, wide) in FAMILIES.items():
            inputs = [t.to(place) for t in make(batch, length)]
            expected = run(definition, [t.double() for t in inputs])
            for name, form in forms.items():
                if name == "kernel" and (place.type != "cuda" or not scan.kernel(installed[family])):
                    absent.add(
                        f"{family} kernel: {'no CUDA' if place.type != 'cuda' else 'mamba-ssm is not installed'}"
                    )
                    continue
                for dtype in dtypes:
                    narrow = [
                        t.to(torch.float32 if i in wide and dtype == torch.bfloat16 else dtype)
                        for i, t in enumerate(inputs)
                    ]
                    off, allowed = error(run(form, narrow), expected), tolerance(dtype, place)
                    rows.append(
                        {"scan": family, "form": name, "length": length, "batch": batch, "dtype": str(dtype)[6:]}
                        | {"error": off, "tolerance": allowed, "ok": off <= allowed}
                        | {"ms": milliseconds(form, narrow, repeats)}
                    )
    print(json.dumps({"machine": machine(place), "absent": sorted(absent), "rows": rows}, indent=1))
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
