# ruff: noqa: N803 - the letters are those of the papers
"""State-space scans as encoders ask for them: by what is written plainly in plain_scans.py, or by CUDA kernels that
compute the same. The letters are those of that module.

`selective_scan` and `ssd` take the path that `selective_scan_path` and `ssd_path` name:

    selective scan   "kernel" on CUDA where mamba-ssm has it, otherwise "sequential" in training and, where no gradient
                     is asked for, "doubling", which an export can hold
    ssd              "product" for as many tokens as `longest_product` says; for more, "kernel" on CUDA where
                     mamba-ssm has it, otherwise "chunks"

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
from torch import Tensor

from reinforce import process
from train.students.plain_scans import (
    CHUNK,
    both_ways,
    selective_scan_doubling,
    selective_scan_sequential,
    ssd_chunks,
    ssd_product,
)

KERNEL_CHUNK = 256  # as Mamba-2 has it
SELECTIVE_SCAN = "mamba_ssm.ops.selective_scan_interface:selective_scan_fn"
PLAIN_SELECTIVE_SCAN = "sequential, without gradients doubling"
CHUNK_SCAN = "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined"


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


def ssd_path(device: torch.device, length: int) -> str:
    if length <= longest_product(device):
        return "product"
    return "kernel" if device.type == "cuda" and kernel(CHUNK_SCAN) else "chunks"


def describe(device: torch.device) -> str:
    """The paths of a training on a device, for a log: `selective scan: kernel; ssd up to 256 tokens: product, beyond:
    kernel`."""
    missing = "" if device.type != "cuda" or kernel(CHUNK_SCAN) else " (mamba-ssm is not installed)"
    longest = longest_product(device)
    return (
        f"selective scan: {'kernel' if selective_scan_path(device) == 'kernel' else PLAIN_SELECTIVE_SCAN}; "
        f"ssd up to {longest} tokens: product, beyond: {ssd_path(device, longest + 1)}{missing}"
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


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Bidirectional SSD, y (b, L, H, P): `y_i = sum_j exp(A sum_k dt_k) (C_i . B_j) dt_j x_j + D x_i`.

    k runs over j < k <= i where j <= i, and over i <= k < j where j > i: a forward scan and a backward one, which both
    hold the diagonal, less the diagonal.
    x (b, L, H, P); dt (b, L, H), positive, and A (H,), negative, and D (H,), float32; B, C (b, L, N), shared by the
    heads.
    """
    path = ssd_path(x.device, x.shape[1])
    if path == "product":
        return ssd_product(x, dt, A, B, C, D)
    if path == "chunks":
        return ssd_chunks(x, dt, A, B, C, D)
    y: Tensor = ssd_kernel(x, dt, A, B, C, D)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ssd_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`ssd` as two scans of mamba-ssm, linear in L. CUDA only."""
    scan = kernel(CHUNK_SCAN)
    assert scan is not None
    return both_ways(
        lambda x, dt, A, B, C: scan(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), KERNEL_CHUNK),
        *(x, dt, A, B.to(x.dtype), C.to(x.dtype), D),
    )
