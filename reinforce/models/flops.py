"""Counting what a call computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def tflop(function: Callable[..., Any], *inputs: Any) -> float:
    """Multiplications and additions, in 10^12, of the matrix products, convolutions and attention of a call without
    gradients. It is made, on whatever device its inputs are; what a CUDA graph replays is not seen."""
    # The counter knows matrix products, not the fused attentions that hide them, nor the products of vit.py, which the
    # same switch turns off.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return float(counter.get_total_flops()) / 1e12
