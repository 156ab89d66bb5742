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

CHUNK = 64  # tokens; one CPU core takes 256 tokens in chunks of 64 in less than half of the time of one product of 256
# Factors of ssd below exp(FLOOR), 1e-26, count as that: no sum in float32 sees them, and products of smaller ones are
# denormal numbers, with which a CPU is up to a hundred times slower.
FLOOR = -60.0
LEAST_STEP = 1e-30  # of ssd; a smaller one counts as that, and has no gradient


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


def ssd_sequential(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ssd` as two scans: its definition."""
    return both_ways(ssd_causal, x, dt, A, B, C, D)


def both_ways(scan: Callable[..., Tensor], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    backward = scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)).flip(1)
    diagonal = (B * C).sum(-1)[..., None, None] * dt.unsqueeze(-1)
    return scan(x, dt, A, B, C) + backward + ((D.unsqueeze(-1) - diagonal) * x).to(x.dtype)


def ssd_product(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ssd` as one masked product, `((C B^T) o decays o dt + D) x`: quadratic in L, without a scan."""
    return ssd_chunks(x, dt, A, B, C, D, max(x.shape[1], 1))


def ssd_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int = CHUNK) -> Tensor:
    """`ssd` for long sequences: a product within each chunk, states carried from chunk to chunk.

    What is carried forwards and what is carried backwards are states of N numbers for each channel, summed up by a
    product over all pairs of chunks. That is quadratic in their number, and less than the rest up to 200 of them.
    Steps stand in the exponents, as logarithms, where to multiply by them costs nothing.
    """
    batch, length, heads, width = x.shape
    num = -(-length // chunk)
    x, dt, B, C = (_padded(t, num * chunk - length) for t in (x, dt, B, C))
    x = x.transpose(1, 2).contiguous().view(-1, chunk, width)  # (b H chunks, chunk, P)
    B, C = (t.reshape(batch, 1, num, chunk, t.shape[-1]) for t in (B, C))  # for all heads
    dt = dt.to(_wide(dt.dtype)).mT.reshape(batch, heads, num, chunk)
    log_steps, log_decays = dt.clamp_min(LEAST_STEP).log(), dt * A[:, None, None]
    until = running_sum(log_decays)  # with itself
    before, total = until - log_decays, until[..., -1:]

    decays = _decays(until, before, log_steps)
    skip = D[:, None, None, None] * torch.eye(chunk, dtype=D.dtype, device=D.device)
    near = torch.addcmul(skip, decays, C @ B.mT, out=None if torch.is_grad_enabled() else decays)
    y = near.to(x.dtype).flatten(0, 2) @ x
    if num > 1:
        across = _decays_across(total.squeeze(-1)).to(x.dtype).flatten(0, 1)  # from a chunk to a later one
        to_end, to_start = total - until + log_steps, before + log_steps
        for to_edge, from_edge, others in ((to_end, until, across.mT), (to_start, total - before, across)):
            handed_on = (B * _exp(to_edge).unsqueeze(-1)).to(x.dtype).flatten(0, 2).mT @ x  # (b H chunks, N, P)
            carried = (others @ handed_on.view(batch * heads, num, B.shape[-1] * width)).view(handed_on.shape)
            y = _add_product(y, (C * _exp(from_edge).unsqueeze(-1)).to(x.dtype).flatten(0, 2), carried)
    return y.view(batch, heads, num * chunk, width).transpose(1, 2)[:, :length]


def _decays(until: Tensor, before: Tensor, log_steps: Tensor) -> Tensor:
    """(.., L, L): what is left at i of what came at j, on both sides of the diagonal, times the step at j. `until` and
    `before` (.., L) are sums of the log-decays up to each place, with its own and without.

    Forwards the exponent is the sum of log-decays over j < k <= i, backwards over i <= k < j. A pair lies on one side
    of the diagonal, so both are one exponential; on the other side each of the two is positive, and would overflow.
    """
    forwards = until.unsqueeze(-1) - (until - log_steps).unsqueeze(-2)
    backwards = (before + log_steps).unsqueeze(-2) - before.unsqueeze(-1)
    if not torch.is_grad_enabled():
        return torch.minimum(forwards, backwards, out=forwards).clamp_min_(FLOOR).exp_()
    # Where both are 0, a gradient has to know its side. `where` gives the same as `lerp`, and takes longer on a CPU.
    past = torch.ones(forwards.shape[-2:], dtype=until.dtype, device=until.device).tril()
    return torch.lerp(backwards, forwards, past).clamp_min_(FLOOR).exp_()


def _decays_across(totals: Tensor) -> Tensor:
    """(.., chunks, chunks): at j, i > j the decay over all chunks between them, of their sums of log-decays; else 0."""
    num = totals.shape[-1]
    shifted = F.pad(totals, (1, -1)).unsqueeze(-2).expand(*totals.shape, num)
    return _exp(running_sum(shifted.triu(2))).triu(1)


def _exp(x: Tensor) -> Tensor:
    return x.clamp_min(FLOOR).exp_()


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y + a @ b`, written over y where all are of one type."""
    return y.baddbmm_(a, b) if a.dtype == b.dtype == y.dtype else y + (a @ b).to(y.dtype)


def _padded(t: Tensor, missing: int) -> Tensor:
    """Steps of 0 are added, which neither add nor decay."""
    return F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else t


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
