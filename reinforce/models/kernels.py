# ruff: noqa: N803 - capitals are what Triton compiles a kernel for
"""Two kernels in Triton for the blocks of vit.py, where what they compute is written plainly.

Libraries have neither: a norm of what is read and a vector, and a product whose SiLU costs no pass over memory. Both
compute in float32 and round once. Whether Triton compiles them or, with TRITON_INTERPRET=1, interprets them on a CPU is
settled when this module is imported.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Of the product, as measured on an H100 (docs/results/gpu.md): no other of six was faster.
ROWS, COLUMNS, DEPTH = 128, 256, 64
WARPS, STAGES = 8, 4
GROUP = 8  # tiles that lie under each other are made one after the other, while the weights they share are in cache


def norm(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x (n, W), contiguous, + offset (W,) float32, as x."""
    out, width = torch.empty_like(x), x.shape[1]
    _norm[(len(x),)](x, offset, weight, bias, out, width, eps, triton.next_power_of_2(width), num_warps=4)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _norm(x, offset, weight, bias, out, width, eps, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WIDE)
    there = column < width
    value = tl.load(x + row + column, mask=there, other=0.0).to(tl.float32)
    value += tl.load(offset + column, mask=there, other=0.0)
    off = tl.where(there, value - tl.sum(value) / width, 0.0)
    unit = off * tl.rsqrt(tl.sum(off * off) / width + eps)
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + column, (unit * scale + shift).to(out.dtype.element_ty), mask=there)


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of x (n, K) times weight (W, K) plus bias (W,), (n, W). All contiguous, K and W multiples of 8."""
    (num, depth), width = x.shape, len(weight)
    out = torch.empty(num, width, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(num, ROWS) * triton.cdiv(width, COLUMNS)
    programs = processors(x.device)
    _linear_silu[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(out, [ROWS, COLUMNS // 2]),
        *(bias, num, width, depth),
        *(programs, GROUP, ROWS, COLUMNS, DEPTH),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """Each of which makes one tile after the other, so that the next one's numbers are on their way early."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit  # type: ignore[untyped-decorator]
def _linear_silu(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    bias,
    num,
    width,
    depth,
    PROGRAMS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    down, across = tl.cdiv(num, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        first = tile // (GROUP * across) * GROUP
        rows = min(down - first, GROUP)
        row = (first + tile % (GROUP * across) % rows) * ROWS
        column = tile % (GROUP * across) // rows * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total, input_precision="ieee")
        at = column + tl.arange(0, COLUMNS)
        total += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None, :]
        total = total * tl.sigmoid(total)
        # In two halves, so that their room in shared memory is small enough for another stage.
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        out.store([row, column], left.to(out.dtype))
        out.store([row, column + COLUMNS // 2], right.to(out.dtype))
