# ruff: noqa: N803, N806 - the letters are those of the papers
"""State-space scans: what they are, in plain PyTorch, and the CUDA kernels of mamba-ssm that compute the same.

Selective scan (Mamba: Gu and Dao 2023, arXiv 2312.00752, section 3): every channel has N states, each with a decay of
its own. SSD (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6): one decay per head, so that the scan is a product
with a masked matrix. An image has no first pixel, so SSD here runs in both directions with the same decays.

Letters: b batch, L sequence, D channels, H heads, P channels of a head, N states. Decays are computed in float32 at
least. `selective_scan` and `ssd` take the path that `selective_scan_path` and `ssd_path` name:

    selective scan   "kernel" on CUDA where mamba-ssm has it, otherwise "sequential" in training and, where no gradient
                     is asked for, "doubling", which an export can hold
    ssd              "product" for as many tokens as `longest_product` says; for more, "kernel" on CUDA where
                     mamba-ssm has it, otherwise "chunks". After `use_own_kernels`, where no gradient is asked for on
                     CUDA, "tiles"

mamba-ssm's kernel for SSD is Triton's and needs nothing but its source; the one for the selective scan is compiled when
mamba-ssm is built.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reinforce import process
from reinforce.errors import MissingExtra

CHUNK = 64  # tokens; one CPU core takes 256 tokens in chunks of 64 in a fifth of the time of one product of 256
KERNEL_CHUNK = 256  # as Mamba-2 has it
SELECTIVE_SCAN = "mamba_ssm.ops.selective_scan_interface:selective_scan_fn"
PLAIN_SELECTIVE_SCAN = "sequential, without gradients doubling"
CHUNK_SCAN = "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined"
own: ModuleType | None = None  # train.students.kernels, once it is asked for


@functools.cache
def kernel(where: str) -> Callable[..., Any] | None:
    """A function of mamba-ssm, given as `module:function`; None where it is not installed or not for this machine."""
    module, function = where.split(":")
    try:
        return getattr(_imported(module), function)  # type: ignore[no-any-return]
    except ImportError:
        return None


def _imported(module: str) -> ModuleType:
    """The module, or the module alone where its package as a whole cannot be imported: mamba-ssm without its compiled
    extension, which the Triton kernels do not need."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise
    with process.package_without_init(package, list(spec.submodule_search_locations)):
        return importlib.import_module(module)


def selective_scan_path(device: torch.device) -> str:
    if device.type == "cuda" and kernel(SELECTIVE_SCAN):
        return "kernel"
    return "sequential" if torch.is_grad_enabled() else "doubling"


def longest_product(device: torch.device) -> int:
    """Tokens. On a GPU 256, where attention's quadratic part is small too and few large products keep it busy."""
    return 256 if device.type == "cuda" else CHUNK


def use_own_kernels() -> None:
    """From now on, those of kernels.py where they fit. Raises MissingExtra where there is no Triton."""
    global own
    try:
        from train.students import kernels
    except ImportError as error:
        raise MissingExtra("our own kernels need Triton, which comes with torch for CUDA") from error
    own = kernels


def own_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType | None:
    """Our kernels where they fit: they have no gradients, and sum in float32."""
    return own if device.type == "cuda" and dtype != torch.float64 and not torch.is_grad_enabled() else None


def ssd_path(device: torch.device, length: int, dtype: torch.dtype = torch.float32) -> str:
    if own_kernels(device, dtype):
        return "tiles"
    if length <= longest_product(device):
        return "product"
    return "kernel" if device.type == "cuda" and kernel(CHUNK_SCAN) else "chunks"


def describe(device: torch.device) -> str:
    """The paths of a training on a device, for a log: `selective scan: kernel; ssd up to 256 tokens: product, beyond:
    kernel`, and what takes their place without gradients."""
    missing = "" if device.type != "cuda" or kernel(CHUNK_SCAN) else " (mamba-ssm is not installed)"
    longest = longest_product(device)
    with torch.no_grad():
        tiles = "; without gradients: tiles" if own_kernels(device) else ""
    return (
        f"selective scan: {'kernel' if selective_scan_path(device) == 'kernel' else PLAIN_SELECTIVE_SCAN}; "
        f"ssd up to {longest} tokens: product, beyond: {ssd_path(device, longest + 1)}{missing}{tiles}"
    )


def selective_scan(
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
    """Mamba's selective scan, y (b, D, L), with the signature of mamba-ssm's `selective_scan_fn`.

    `h_l = exp(delta_l A) h_(l-1) + delta_l u_l B_l` from h = 0, `y_l = C_l . h_l + D u_l`, times silu(z) where given;
    before that, delta gets `delta_bias` and, if asked, softplus.
    u, delta, z (b, D, L) of one dtype; A (D, N), negative, D and delta_bias (D,), float32; B, C (b, N, L).
    """
    paths = {
        "kernel": _selective_scan_kernel,
        "sequential": selective_scan_sequential,
        "doubling": selective_scan_doubling,
    }
    y: Tensor = paths[selective_scan_path(u.device)](u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _selective_scan_kernel(*args: Any) -> Tensor:
    scan = kernel(SELECTIVE_SCAN)
    assert scan is not None
    y: Tensor = scan(*(x.contiguous() if isinstance(x, Tensor) else x for x in args))
    return y


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


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Bidirectional SSD, y (b, L, H, P): `y_i = sum_j exp(A sum_k dt_k) (C_i . B_j) dt_j x_j`.

    k runs over j < k <= i where j <= i, and over i <= k < j where j > i: a forward scan and a backward one, which both
    hold the diagonal, less the diagonal.
    x (b, L, H, P); dt (b, L, H), positive, and A (H,), negative, float32; B, C (b, L, N), shared by the heads.
    """
    path = ssd_path(x.device, x.shape[1], x.dtype)
    if path == "tiles":
        return ssd_tiles(x, dt, A, B, C)
    if path == "product":
        return ssd_product(x, dt, A, B, C)
    if path == "chunks":
        return ssd_chunks(x, dt, A, B, C)
    y: Tensor = ssd_kernel(x, dt, A, B, C)
    return y


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
    return _both_ways(ssd_causal, x, dt, A, B, C)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ssd_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd` as two scans of mamba-ssm, linear in L. CUDA only."""
    scan = kernel(CHUNK_SCAN)
    assert scan is not None
    return _both_ways(
        lambda x, dt, A, B, C: scan(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), KERNEL_CHUNK),
        *(x, dt, A, B.to(x.dtype), C.to(x.dtype)),
    )


def _both_ways(scan: Callable[..., Tensor], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    backward = scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)).flip(1)
    diagonal = (B * C).sum(-1)[..., None, None] * dt.unsqueeze(-1) * x
    return scan(x, dt, A, B, C) + backward - diagonal.to(x.dtype)


def ssd_product(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd` as one masked product, `((C B^T) o decays) (dt x)`: quadratic in L, without a scan."""
    log_decays = _log_decays(dt, A).transpose(1, 2)  # (b, H, L)
    until = _running_sum(log_decays)  # with itself
    weights = (C @ B.mT).unsqueeze(1) * _decays(until, until - log_decays)  # (b, H, L, L)
    inputs = (x * dt.unsqueeze(-1)).transpose(1, 2)  # (b, H, L, P)
    return (weights.to(x.dtype) @ inputs.to(x.dtype)).transpose(1, 2)


def ssd_tiles(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd` as the product, whose mask is never written: our own kernel."""
    assert own is not None
    log_decays = _log_decays(dt, A).transpose(1, 2)
    until = _running_sum(log_decays)
    y: Tensor = own.ssd(x, dt.float(), until, until - log_decays, B.to(x.dtype), C.to(x.dtype))
    return y


def ssd_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = CHUNK) -> Tensor:
    """`ssd` for long sequences, linear in L: a product within each chunk, states carried from chunk to chunk.

    What is carried forwards and what is carried backwards are one state of 2 N numbers for each channel.
    """
    length, num_states = x.shape[1], B.shape[-1]
    x, dt, B, C = (_chunked(t, -length % chunk, chunk) for t in (x, dt, B, C))  # (b, chunks, chunk, ..)
    log_decays = _log_decays(dt, A).transpose(2, 3)  # (b, chunks, H, chunk)
    until = _running_sum(log_decays)  # with itself
    before, total = until - log_decays, until[..., -1:]
    inputs = (x * dt.unsqueeze(-1)).transpose(2, 3).contiguous()  # (b, chunks, H, chunk, P)
    B, C = B.unsqueeze(2), C.unsqueeze(2)  # for all heads
    near = ((C @ B.mT) * _decays(until, before)).to(x.dtype) @ inputs.to(x.dtype)
    into = _both(B, total - until, before)
    handed_on = inputs.mT @ into.to(inputs.dtype)  # (b, chunks, H, P, 2 N)
    whole = total.exp().unsqueeze(-1)
    ahead = _carried(handed_on[..., :num_states], whole)
    back = _carried(handed_on[..., num_states:].flip(1), whole.flip(1)).flip(1)
    carried = torch.cat([ahead, back], -1)
    y = near + (_both(C, until, total - before).to(carried.dtype) @ carried.mT).to(x.dtype)
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def _decays(until: Tensor, before: Tensor) -> Tensor:
    """(.., L, L): what is left at i of what came at j, on both sides of the diagonal. `until` and `before` (.., L) are
    sums of the log-decays up to each place, with its own and without.

    Forwards the exponent is the sum of log-decays over j < k <= i, backwards over i <= k < j. A pair lies on one side
    of the diagonal, so both are one exponential; on the other side each of the two is positive, and would overflow.
    """
    forwards = until.unsqueeze(-1) - until.unsqueeze(-2)
    backwards = before.unsqueeze(-2) - before.unsqueeze(-1)
    past = torch.ones(forwards.shape[-2:], dtype=torch.bool, device=until.device).tril()
    return torch.where(past, forwards, backwards).exp()


def _both(t: Tensor, forwards: Tensor, backwards: Tensor) -> Tensor:
    """B or C, (b, chunks, 1, chunk, N), decayed by the exponentials of (b, chunks, H, chunk): 2 N, side by side."""
    decays = torch.stack([forwards, backwards], -1).exp()
    return (t.unsqueeze(-2) * decays.unsqueeze(-1)).flatten(-2)


def _chunked(t: Tensor, missing: int, chunk: int) -> Tensor:
    """Steps of 0 are added, which neither add nor decay."""
    padded = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else t
    return padded.reshape(t.shape[0], -1, chunk, *t.shape[2:])


def _carried(states: Tensor, decays: Tensor) -> Tensor:
    """What reaches each chunk from those before it, of what they hand on."""
    carried = [torch.zeros_like(states[:, 0])]
    for i in range(states.shape[1] - 1):
        carried.append(torch.addcmul(states[:, i], decays[:, i], carried[-1]))
    return torch.stack(carried, 1)


def _running_sum(x: Tensor) -> Tensor:
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


def _log_decays(dt: Tensor, A: Tensor) -> Tensor:
    return (dt * A).to(_wide(dt.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
