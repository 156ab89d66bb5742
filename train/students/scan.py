# ruff: noqa: N803 - the letters are those of the papers
"""State-space scans: what they are, in plain PyTorch, and the CUDA kernels of mamba-ssm that compute the same.

Selective scan (Mamba: Gu and Dao 2023, arXiv 2312.00752, section 3.3): every channel has N states, each with a decay of
its own. SSD (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6): one decay per head, so that the scan is a product
with a masked matrix. An image has no first pixel: its SSD runs in both directions, with the same decays.

Here b batch, L sequence, D channels, H heads, P channels of a head, N states. Decays are computed in float32 at least.
"""

import torch
from torch import Tensor

CHUNK = 256  # tokens; a sequence up to this long is one masked product


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def ssd_matmul(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Bidirectional SSD as one masked product: `((C B^T) o (M_forward + M_backward - I)) (dt x)`, quadratic in L.

    Every pair (i, j) lies on one side of the diagonal, so one exponential of a sum of log-decays, which is never
    positive, gives both masks: over j < k <= i where j <= i, over i <= k < j where j > i.
    """
    log_decay = (dt * A).to(_wide(dt.dtype)).transpose(1, 2)  # (b, H, L)
    until = log_decay.cumsum(-1)  # with itself
    before = until - log_decay
    length = x.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    log_mask = torch.where(past, until.unsqueeze(-1) - until.unsqueeze(-2), before.unsqueeze(-2) - before.unsqueeze(-1))
    weights = (C @ B.mT).unsqueeze(1) * log_mask.exp()  # (b, H, L, L)
    inputs = (x * dt.unsqueeze(-1)).transpose(1, 2)  # (b, H, L, P)
    return (weights.to(x.dtype) @ inputs.to(x.dtype)).transpose(1, 2)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Bidirectional SSD, y (b, L, H, P): `y_i = sum_j exp(sum of dt_k A between i and j) (C_i . B_j) dt_j x_j`.

    x (b, L, H, P), dt (b, L, H) positive, A (H,) negative, B and C (b, L, N), shared by the heads.
    """
    return ssd_matmul(x, dt, A, B, C)
