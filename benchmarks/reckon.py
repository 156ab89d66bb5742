"""What an image encoder would take on a GPU, reckoned without one.

    python -m benchmarks.reckon mamba_small mobileclip_s1 [--size 256] [--batch 256]

Each operation of the folded encoder is counted on tensors without values. It takes the longer of its arithmetic and of
its reading and writing, and a launch. `eager_ms` is the sum over all operations; `floor_ms` is that of products,
convolutions and attention alone, as if a compiler hid everything else in them. The rates are those of an H100: what was
measured of dense bf16 products and of copies (docs/results/gpu.md), and 2 us a launch within a CUDA graph. Depthwise
convolutions do no products worth the name: theirs is the time of reading and writing. It is no measurement.
"""

from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reinforce.terminal import show
from train import students
from train.students import scan
from train.students.fold import fold

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
FLOPS_PER_S, BYTES_PER_S, LAUNCH_S = 650e12, 3.0e12, 2e-6


class Reckoner(TorchDispatchMode):
    """Adds up seconds and kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eager_s = self.floor_s = 0.0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in ("empty", "empty_like", "detach", "t", "_unsafe_view"):
            return out
        tensors = [t for t in (*_flat(args), *_flat(out)) if isinstance(t, torch.Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        seconds = max(counter.get_total_flops() / FLOPS_PER_S, moved / BYTES_PER_S) + LAUNCH_S
        self.eager_s += seconds
        self.kernels += 1
        if func.overloadpacket.__name__ in PRODUCTS:
            self.floor_s += seconds
        return out


def _flat(tree: Any) -> list[Any]:
    return [leaf for part in tree for leaf in _flat(part)] if isinstance(tree, list | tuple) else [tree]


def reckoned(name: str, size_px: int, batch: int) -> dict[str, float]:
    tower = fold(students.create(name).model.visual).to("meta", torch.bfloat16)
    images = torch.empty(batch, 3, size_px, size_px, device="meta", dtype=torch.bfloat16)
    with (
        mock.patch.object(scan, "longest_product", lambda device: 256),  # as on CUDA
        torch.no_grad(),
        Reckoner() as found,
    ):
        tower(images)
    return {
        "eager_ms": round(1e3 * found.eager_s, 2),
        "floor_ms": round(1e3 * found.floor_s, 2),
        "kernels": found.kernels,
    }


def main(
    name: Annotated[list[str], typer.Argument(metavar="STUDENT", help="names of the table")],
    size: Annotated[int, typer.Option(help="pixels")] = 256,
    batch: Annotated[int, typer.Option(help="images")] = 256,
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Reckon the time of image encoders on an H100."""
    show({student: reckoned(student, size, batch) for student in name}, json_)


if __name__ == "__main__":
    typer.run(main)
