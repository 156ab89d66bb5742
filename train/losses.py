"""The losses of reinforced CLIP training; tensors in, scalars out.

Sources: CLIP (Radford et al. 2021, arXiv 2103.00020), MobileCLIP's distillation (Vasu et al. 2024, arXiv 2311.17049,
section 3), feature distillation (CLIP-KD, arXiv 2307.12732). Similarities are computed in float32 whatever the
autocast, in blocks of rows that are computed again in the backward pass, so that memory grows with the batch and not
with its square.

Letters: B samples of this rank, G of all ranks, D width of the student, D_k of teacher k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

BLOCK_ROWS = 1024  # of similarities held at once: at G = 65,536 they are 256 MiB of float32


@dataclass(frozen=True)
class TeacherPairs:
    """What one teacher says of B pairs: `image` and `text` (B, D_k), unit norm, and its own `logit_scale`."""

    image: Tensor
    text: Tensor
    logit_scale: float


@dataclass(frozen=True)
class PairLosses:
    """Means over the pairs and over both directions. `distill` is 0 where there is no teacher."""

    contrastive: Tensor
    distill: Tensor


def pair_losses(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teachers: Sequence[TeacherPairs] = (),
    block_rows: int = BLOCK_ROWS,
) -> PairLosses:
    """Contrastive and distillation loss of B pairs: `image`, `text` (B, D) unit norm, `logit_scale` the multiplier.

    contrastive = (CE(s x yᵀ, own) + CE(s y xᵀ, own)) / 2.
    distill = the same with soft labels: the mean over teachers of softmax(s_k u_k v_kᵀ), rows of images and rows of
    texts each normalised on their own. It is a cross-entropy: it differs from MobileCLIP's KL divergence (section 3) by
    the teachers' entropy, which no student changes. The mean is taken after the softmax, as in MobileCLIP's code.

    On several ranks every rank calls this with as many pairs, and each pair is compared with those of all; the mean
    over ranks, and of gradients, is that of one process with the whole batch.
    """
    sides = [(_full(image), _full(text), [(t.image, t.text, t.logit_scale) for t in teachers])]
    sides.append((sides[0][1], sides[0][0], [(v, u, scale) for u, v, scale in sides[0][2]]))
    sums = torch.stack([_direction(x, y, _full(logit_scale), pairs, block_rows) for x, y, pairs in sides]).sum(0)
    contrastive, distill = sums / (2 * len(image))
    return PairLosses(contrastive, distill)


class FeatureHeads(nn.Module):
    """A linear map for each teacher and tower, from the student's width to the teacher's; dropped after training."""

    def __init__(self, width: int, teacher_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.image, self.text = (
            nn.ModuleDict({name: nn.Linear(width, size) for name, size in teacher_widths.items()}) for _ in range(2)
        )


def feature_mse(guess: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of (B, D_k) directions to unit targets, from 0 to 4 (CLIP-KD's feature distillation, there
    as a mean over D_k)."""
    return (F.normalize(_full(guess), dim=-1) - target).square().sum(-1).mean()


def _direction(
    x: Tensor, y: Tensor, scale: Tensor, teachers: list[tuple[Tensor, Tensor, float]], block_rows: int
) -> Tensor:
    """Sums over the rows of `x` of the contrastive and the distillation loss, as a tensor of two."""
    first = len(x) * _rank()
    y = _gathered(y)
    gathered = [(_full(u), _gathered(_full(v)), scale_k) for u, v, scale_k in teachers]

    def block(start: int, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        log_p = (scale * x[start : start + block_rows] @ y.T).log_softmax(-1)
        rows = torch.arange(len(log_p), device=x.device)
        contrastive = -log_p[rows, first + start + rows].sum()
        if not gathered:
            return torch.stack([contrastive, torch.zeros_like(contrastive)])
        with torch.no_grad():
            targets = [(scale_k * u[start : start + block_rows] @ v.T).softmax(-1) for u, v, scale_k in gathered]
            target = torch.stack(targets).mean(0)
        return torch.stack([contrastive, -(target * log_p).sum()])

    with torch.autocast(x.device.type, enabled=False):
        starts = range(0, len(x), block_rows)
        if len(starts) == 1:
            return block(0, x, y, scale)
        blocks = [checkpoint(block, start, x, y, scale, use_reentrant=False) for start in starts]
        return torch.stack(blocks).sum(0)


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(x: Tensor) -> Tensor:
    """(B, D) of every rank as (G, D), with gradients to every rank."""
    return torch.cat(all_gather(x.contiguous())) if dist.is_initialized() else x  # type: ignore[no-untyped-call]
