"""What a tower does for one input, counted on the plain definitions of the scans:

  gflops           matrix products, convolutions and attention, two for a multiplication with its addition
  gops_pointwise   numbers written by elementwise operations, copies among them, and running sums: activations, scales,
                   and the recurrences of state spaces, which gflops does not see. Norms and softmax are in neither.

The tower is copied to the meta device, so that nothing is computed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


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


def count(tower: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """(gflops, gops_pointwise) of a call, without running it: on the meta device, the scans by their definitions."""
    nowhere = copy.deepcopy(tower).to("meta")
    with torch.enable_grad(), _PointwiseCounter() as pointwise, FlopCounterMode(display=False) as flops:
        nowhere(inputs.to("meta"))
    return flops.get_total_flops() / 1e9, pointwise.total / 1e9
