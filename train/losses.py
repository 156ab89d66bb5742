"""The losses of reinforced CLIP training; tensors in, scalars out.

Sources: CLIP (Radford et al. 2021, arXiv 2103.00020), MobileCLIP's distillation (Vasu et al. 2024, arXiv 2311.17049,
section 3), feature distillation (CLIP-KD, arXiv 2307.12732). Similarities are computed in float32 whatever the
autocast, in blocks of rows. The gradient of a row is known once its similarities are, so it is computed with them: none
is held, or computed twice, and memory grows with the batch and not with its square.

Letters: B samples of this rank, G of all ranks, D width of the student, D_k of teacher k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_gather

BLOCK_ROWS = 1024  # of similarities held at once: at G = 65,536 they are 256 MiB of float32


@dataclass(frozen=True)
class TeacherPairs:
    """What one teacher says of B pairs: `image` and `text` (B, D_k), unit norm, and its own `logit_scale`."""

    image: Tensor
    text: Tensor
    logit_scale: float


@dataclass(frozen=True)
class PairLosses:
    """Means over the pairs and over both directions. `distill` is 0 where there is no teacher. Gradients come from
    `loss`, the sum of the two parts by their weights; the parts have none."""

    loss: Tensor
    contrastive: Tensor
    distill: Tensor


def pair_losses(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teachers: Sequence[TeacherPairs] = (),
    weight: float = 0.0,
    block_rows: int = BLOCK_ROWS,
) -> PairLosses:
    """Contrastive and distillation loss of B pairs: `image`, `text` (B, D) unit norm, `logit_scale` the multiplier,
    `weight` the teachers' (lambda): loss = (1 - weight) x contrastive + weight x distill.

    contrastive = (CE(s x yᵀ, own) + CE(s y xᵀ, own)) / 2.
    distill = the same with soft labels: the mean over teachers of softmax(s_k u_k v_kᵀ), rows of images and rows of
    texts each normalised on their own. It is a cross-entropy: it differs from MobileCLIP's KL divergence (section 3) by
    the teachers' entropy, which no student changes. The mean is taken after the softmax, as in MobileCLIP's code.

    On several ranks every rank calls this with as many pairs, and each pair is compared with those of all; the mean
    over ranks, and of gradients, is that of one process with the whole batch.
    """
    image, text, scale = _full(image), _full(text), _full(logit_scale)
    pairs = [(_full(t.image), _full(t.text), t.logit_scale) for t in teachers]
    turned = [(v, u, scale_k) for u, v, scale_k in pairs]
    of_images = _direction(image, text, scale, pairs, weight, block_rows)
    of_texts = _direction(text, image, scale, turned, weight, block_rows)
    return PairLosses(*((a + b) / (2 * len(image)) for a, b in zip(of_images, of_texts, strict=True)))


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
    x: Tensor, y: Tensor, scale: Tensor, teachers: list[tuple[Tensor, Tensor, float]], weight: float, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows of `x`: of the loss, and of its parts."""
    gathered = [(u, _gathered(v), scale_k) for u, v, scale_k in teachers]
    with torch.autocast(x.device.type, enabled=False):
        sums: tuple[Tensor, Tensor, Tensor] = _Rows.apply(  # type: ignore[no-untyped-call]
            *(x, _gathered(y), scale, gathered, weight, len(x) * _rank(), block_rows)
        )
        return sums


class _Rows(torch.autograd.Function):
    """Sums over the rows of `x` (B, D), which are rows `first` and on of all, against `y` (G, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        teachers: list[tuple[Tensor, Tensor, float]],
        weight: float,
        first: int,
        block_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        contrastive, distill, d_scale = x.new_zeros(3)
        wanted = any(ctx.needs_input_grad)
        d_x, d_y = (torch.zeros_like(t) if wanted else None for t in (x, y))
        for rows in (slice(start, start + block_rows) for start in range(0, len(x), block_rows)):
            log_p = (scale * x[rows] @ y.T).log_softmax(-1)
            own = torch.arange(rows.start, rows.start + len(log_p), device=x.device)[:, None] + first
            contrastive -= log_p.gather(1, own).sum()
            target = None
            for u, v, scale_k in teachers:
                of_one = (scale_k * u[rows] @ v.T).softmax(-1)
                target = of_one if target is None else target.add_(of_one)
            if target is not None:
                distill -= torch.dot((target.div_(len(teachers))).flatten(), log_p.flatten())
            if d_x is None or d_y is None:
                continue
            # Of a cross-entropy by its logits: the student's probabilities less the labels.
            d_logits = log_p.exp_()
            if target is None:
                d_logits *= 1 - weight
            else:
                d_logits.sub_(target, alpha=weight)
            d_logits.scatter_add_(1, own, torch.full_like(own, weight - 1, dtype=x.dtype))
            d_rows = d_logits @ y
            d_scale += (d_rows * x[rows]).sum()
            d_x[rows] = scale * d_rows
            d_y.addmm_(d_logits.T, scale * x[rows])
        if wanted:
            ctx.save_for_backward(d_x, d_y, d_scale)
        ctx.mark_non_differentiable(contrastive, distill)
        return (1 - weight) * contrastive + (weight if teachers else 0.0) * distill, contrastive, distill

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(d_loss * part for part in ctx.saved_tensors), None, None, None, None


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(x: Tensor) -> Tensor:
    """(B, D) of every rank as (G, D), with gradients to every rank."""
    return torch.cat(all_gather(x.contiguous())) if dist.is_initialized() else x  # type: ignore[no-untyped-call]
