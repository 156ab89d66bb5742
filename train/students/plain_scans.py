# ruff: noqa: N803, N806 - the letters are those of the papers
"""State-space scans: what they are, in plain PyTorch.

Selective scan (Mamba: Gu and Dao 2023, arXiv 2312.00752, section 3): every channel has N states, each with a decay of
its own. SSD (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6): one decay per head, so that the scan is a product
with a masked matrix. An image has no first pixel, so SSD here runs in both directions with the same decays.

Letters: b batch, L sequence, D channels, H heads, P channels of a head, N states. Decays are computed in float32 at
least. It stands alone: an export takes it along (standalone.py).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens; one CPU core takes 256 tokens in chunks of 64 in a fifth of the time of one product of 256


def selective_scan_sequential(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Any) -> Tensor:
    """`selective_scan`, step by step: its definition. It holds b L D N numbers."""
    return _selective_scan(_step_by_step, u, delta, A, B, C, *more)


def selective_scan_doubling(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Any) -> Tensor:
    """`selective_scan` in log2(L) sweeps over all steps at once (Hillis and Steele 1986), without a loop over L.

    After a sweep each step has what the 1, 3, 7, .. steps before it add. Products of decays only shrink.
    """
    return _selective_scan(_by_doubling, u, delta, A, B, C, *more)


def _selective_scan(
    states_of: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    wide = _wide(u.dtype)
    steps = delta.to(wide)
    if delta_bias is not None:
        steps = steps + delta_bias.unsqueeze(-1)
    if delta_softplus:
        steps = F.softplus(steps)
    steps = steps.transpose(1, 2)  # (b, L, D)
    decays = (steps.unsqueeze(-1) * A).exp()  # (b, L, D, N)
    inputs = (steps * u.to(wide).transpose(1, 2)).unsqueeze(-1) * B.to(wide).transpose(1, 2).unsqueeze(2)
    y = torch.einsum("bldn,bnl->bdl", states_of(decays, inputs), C.to(wide))
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    if z is not None:
        y = y * F.silu(z)
    return y.to(u.dtype)


def _step_by_step(decays: Tensor, inputs: Tensor) -> Tensor:
    states = [inputs[:, 0]]
    for decay, new in zip(decays.unbind(1)[1:], inputs.unbind(1)[1:], strict=True):
        states.append(torch.addcmul(new, decay, states[-1]))
    return torch.stack(states, 1)


def _by_doubling(decays: Tensor, inputs: Tensor) -> Tensor:
    length, shift = inputs.shape[1], 1
    while shift < length:
        earlier, later = slice(None, length - shift), slice(shift, None)
        reached = inputs[:, later] + decays[:, later] * inputs[:, earlier]
        decays = torch.cat([decays[:, :shift], decays[:, later] * decays[:, earlier]], 1)
        inputs = torch.cat([inputs[:, :shift], reached], 1)
        shift *= 2
    return inputs


def ssd_causal(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The forward scan of `ssd`, step by step: `h_i = exp(dt_i A) h_(i-1) + dt_i x_i B_i^T`, `y_i = h_i C_i`."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    out = []
    for i in range(x.shape[1]):
        decay = (dt[:, i] * A).exp()[..., None, None]
        new = torch.einsum("bhp,bn->bhpn", x[:, i] * dt[:, i, :, None], B[:, i])
        state = decay * state + new
        out.append(torch.einsum("bhpn,bn->bhp", state, C[:, i]))
    return torch.stack(out, 1)


def ssd_sequential(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd` as two scans: its definition."""
    return both_ways(ssd_causal, x, dt, A, B, C)


def both_ways(scan: Callable[..., Tensor], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    backward = scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)).flip(1)
    diagonal = (B * C).sum(-1)[..., None, None] * dt.unsqueeze(-1) * x
    return scan(x, dt, A, B, C) + backward - diagonal.to(x.dtype)


def ssd_product(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd` as one masked product, `((C B^T) o decays) (dt x)`: quadratic in L, without a scan."""
    log_decays = log_decays_of(dt, A).transpose(1, 2)  # (b, H, L)
    until = running_sum(log_decays)  # with itself
    weights = (C @ B.mT).unsqueeze(1) * _decays(until, until - log_decays)  # (b, H, L, L)
    inputs = (x * dt.unsqueeze(-1)).transpose(1, 2)  # (b, H, L, P)
    return (weights.to(x.dtype) @ inputs.to(x.dtype)).transpose(1, 2)


def ssd_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = CHUNK) -> Tensor:
    """`ssd` for long sequences, linear in L: a product within each chunk, states carried from chunk to chunk.

    What is carried forwards and what is carried backwards are states of N numbers for each channel.
    """
    length = x.shape[1]
    x, dt, B, C = (_chunked(t, -length % chunk, chunk) for t in (x, dt, B, C))  # (b, chunks, chunk, ..)
    log_decays = log_decays_of(dt, A).transpose(2, 3)  # (b, chunks, H, chunk)
    until = running_sum(log_decays)  # with itself
    before, total = until - log_decays, until[..., -1:]
    inputs = (x * dt.unsqueeze(-1)).transpose(2, 3).contiguous()  # (b, chunks, H, chunk, P)
    B, C = B.unsqueeze(2), C.unsqueeze(2)  # for all heads
    near = ((C @ B.mT) * _decays(until, before)).to(x.dtype)
    y = near.flatten(0, 2) @ inputs.to(x.dtype).flatten(0, 2)  # (b chunks H, chunk, P)
    for into, out, backwards in ((total - until, until, False), (before, total - before, True)):
        handed_on = (B * into.exp().unsqueeze(-1)).to(inputs.dtype).mT @ inputs  # (b, chunks, H, N, P)
        carried = _carried(handed_on, total.exp().unsqueeze(-1), backwards)
        y = _add_product(y, (C * out.exp().unsqueeze(-1)).to(carried.dtype).flatten(0, 2), carried.flatten(0, 2))
    return y.view(inputs.shape).transpose(2, 3).flatten(1, 2)[:, :length]


def _decays(until: Tensor, before: Tensor) -> Tensor:
    """(.., L, L): what is left at i of what came at j, on both sides of the diagonal. `until` and `before` (.., L) are
    sums of the log-decays up to each place, with its own and without.

    Forwards the exponent is the sum of log-decays over j < k <= i, backwards over i <= k < j. A pair lies on one side
    of the diagonal, so both are one exponential; on the other side each of the two is positive, and would overflow.
    """
    forwards = until.unsqueeze(-1) - until.unsqueeze(-2)
    backwards = before.unsqueeze(-2) - before.unsqueeze(-1)
    past = torch.ones(forwards.shape[-2:], dtype=until.dtype, device=until.device).tril()
    return torch.lerp(backwards, forwards, past).exp_()  # `where` gives the same, and takes longer on a CPU


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y + a @ b`, written over y where all are of one type."""
    return y.baddbmm_(a, b) if a.dtype == y.dtype else y + (a @ b).to(y.dtype)


def _chunked(t: Tensor, missing: int, chunk: int) -> Tensor:
    """Steps of 0 are added, which neither add nor decay."""
    padded = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else t
    return padded.reshape(t.shape[0], padded.shape[1] // chunk, chunk, *t.shape[2:])


def _carried(states: Tensor, decays: Tensor, backwards: bool) -> Tensor:
    """What reaches each chunk from those before it, or backwards from those behind it, of what they hand on."""
    order = range(states.shape[1])[:: -1 if backwards else 1]
    carried = [torch.zeros_like(states[:, 0])]
    for i in order[:-1]:
        carried.append(torch.addcmul(states[:, i], decays[:, i], carried[-1]))
    return torch.stack([carried[i] for i in order], 1)


def running_sum(x: Tensor) -> Tensor:
    """`x.cumsum(-1)`. The compiler of torch 2.11 fails on that one on CUDA (`SplitScan`: docs/results/gpu-h200.md)."""
    if x.is_cuda and torch.compiler.is_compiling():
        return running_sum_by_doubling(x, -1)
    return x.cumsum(-1)


def running_sum_by_doubling(x: Tensor, dim: int) -> Tensor:
    """`x.cumsum(dim)` in log2(L) additions (Hillis and Steele 1986)."""
    length, shift = x.shape[dim], 1
    while shift < length:
        reached = x.narrow(dim, shift, length - shift) + x.narrow(dim, 0, length - shift)
        x = torch.cat([x.narrow(dim, 0, shift), reached], dim)
        shift *= 2
    return x


def log_decays_of(dt: Tensor, A: Tensor) -> Tensor:
    return (dt * A).to(_wide(dt.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
