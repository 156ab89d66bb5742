# ruff: noqa: N803, N806 - the letters are those of the papers; capitals are what Triton compiles a kernel for
"""Two kernels of our own, in Triton, for inference on a GPU. What they compute is written plainly elsewhere: a
depthwise convolution of mamba.py, and `ssd` of scan.py.

Neither is a product of large matrices, and libraries and compilers are slow at both: a depthwise convolution over
channels-last pixels, and a product whose mask is as large as what it masks. Here a pixel's channels stay side by side,
and the mask is made in registers, tile by tile, as attention's weights are (Dao 2023, arXiv 2307.08691).

They have no gradients, and have not run on a card yet: `scan.use_own_kernels` switches them on. Whether Triton compiles
them or, with TRITON_INTERPRET=1, interprets them on a CPU is settled when this module is imported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS = 64, 64  # of a tile of the convolution
TOKENS = 64  # of a tile of the scan, in both directions
SMALLEST = 16  # side of a product of Triton


@torch.library.custom_op("clip_train::depthwise", mutates_args=())
def depthwise(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """A 3x3 convolution of each channel alone, zero-padded: x (B, H, W, C), weight (C, 1, 3, 3) and bias (C,) ->
    (B, H, W, C), through SiLU if asked. It sums in float32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    num, height, width, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    across = min(PIXELS, triton.next_power_of_2(width))
    down = PIXELS // across
    tiles = triton.cdiv(height, down) * triton.cdiv(width, across)
    _depthwise[(num * tiles, triton.cdiv(channels, CHANNELS))](
        *(x, weight, bias, out),
        *(height, width, channels, x.stride(0), x.stride(1), x.stride(2)),
        *(silu, down, across, CHANNELS),
    )
    return out


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit  # type: ignore[untyped-decorator]
def _depthwise(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    x,
    weight,
    bias,
    out,
    height,
    width,
    channels,
    stride_image,
    stride_row,
    stride_pixel,
    SILU: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles_across = tl.cdiv(width, ACROSS)
    tiles = tiles_across * tl.cdiv(height, DOWN)
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.arange(0, DOWN * ACROSS)
    row = tile // tiles_across * DOWN + pixel // ACROSS
    column = tile % tiles_across * ACROSS + pixel % ACROSS
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    there = channel < channels
    total = tl.zeros((DOWN * ACROSS, WIDE), tl.float32)
    total += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            r, c = row + i - 1, column + j - 1
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            place = x + image * stride_image + r * stride_row + c * stride_pixel
            seen = tl.load(place[:, None] + channel[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            tap = tl.load(weight + channel * 9 + i * 3 + j, mask=there, other=0.0)
            total += seen.to(tl.float32) * tap.to(tl.float32)[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    inside = (row < height) & (column < width)
    place = out + ((image * height + row) * width + column) * channels
    tl.store(place[:, None] + channel[None, :], total.to(out.dtype.element_ty), mask=inside[:, None] & there[None, :])


@torch.library.custom_op("clip_train::ssd", mutates_args=())
def ssd(x: Tensor, dt: Tensor, until: Tensor, before: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`scan.ssd`, quadratic in L, without a mask in memory.

    x (b, L, H, P); dt (b, L, H) float32; until and before (b, H, L) float32, the sums of log-decays up to each token,
    with its own and without; B, C (b, L, N) -> (b, L, H, P). It sums in float32.
    """
    num, length, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dt, until, before = dt.contiguous(), until.contiguous(), before.contiguous()
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    states = B.shape[-1]
    _ssd[(triton.cdiv(length, TOKENS), num * heads)](
        *(x, dt, until, before, B, C, out),
        *(length, heads, x.stride(0), x.stride(1), x.stride(2)),
        *(B.stride(0), B.stride(1), C.stride(0), C.stride(1)),
        *(width, states),
        *(max(SMALLEST, triton.next_power_of_2(n)) for n in (width, states)),
        TOKENS,
    )
    return out


@ssd.register_fake
def _(x: Tensor, dt: Tensor, until: Tensor, before: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit  # type: ignore[untyped-decorator]
def _ssd(  # type: ignore[no-untyped-def]
    x,
    dt,
    until,
    before,
    b,
    c,
    out,
    length,
    heads,
    x_image,
    x_token,
    x_head,
    b_image,
    b_token,
    c_image,
    c_token,
    width,
    states,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
):
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    sums = (image * heads + head) * length
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    state, channel = tl.arange(0, STATES), tl.arange(0, WIDTH)
    asked = i < length
    known, wide = (state < states)[None, :], (channel < width)[None, :]
    place = c + image * c_image + i[:, None] * c_token + state[None, :]
    queries = tl.load(place, mask=asked[:, None] & known, other=0.0)
    until_i = tl.load(until + sums + i, mask=asked, other=0.0)
    before_i = tl.load(before + sums + i, mask=asked, other=0.0)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(0, length, TILE):
        j = start + tl.arange(0, TILE)
        there = j < length
        keys_at = b + image * b_image + j[:, None] * b_token + state[None, :]
        keys = tl.load(keys_at, mask=there[:, None] & known, other=0.0)
        until_j = tl.load(until + sums + j, mask=there, other=0.0)
        before_j = tl.load(before + sums + j, mask=there, other=0.0)
        step = tl.load(dt + (image * length + j) * heads + head, mask=there, other=0.0)
        # One exponential for both directions: scan._decays says why.
        exponent = tl.where(
            i[:, None] >= j[None, :], until_i[:, None] - until_j[None, :], before_j[None, :] - before_i[:, None]
        )
        exponent = tl.where(asked[:, None] & there[None, :], exponent, 0.0)
        weights = tl.dot(queries, tl.trans(keys), input_precision="ieee") * tl.exp(exponent)
        values_at = x + image * x_image + j[:, None] * x_token + head * x_head + channel[None, :]
        values = tl.load(values_at, mask=there[:, None] & wide, other=0.0).to(tl.float32) * step[:, None]
        kind = x.dtype.element_ty
        total += tl.dot(weights.to(kind), values.to(kind), input_precision="ieee")
    place = out + ((image * length + i[:, None]) * heads + head) * width + channel[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=asked[:, None] & wide)
