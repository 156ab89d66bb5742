"""The losses of reinforced CLIP training; tensors in, scalars out.

Sources: CLIP (Radford et al. 2021, arXiv 2103.00020), MobileCLIP's distillation (Vasu et al. 2024, arXiv 2311.17049,
section 3), feature distillation (CLIP-KD, arXiv 2307.12732). Similarities are computed in float32 whatever the
autocast, in blocks of rows. The gradient of a row is known once its similarities are, so it is computed with them: none
is held, or computed twice, and memory grows with the batch and not with its square.

Letters: B samples of this rank, G of all ranks, D width of the student, D_k of teacher k.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_gather

NEVER = -1e4  # a logit whose probability is 0
BLOCK_ROWS = 1024  # of similarities held at once: at G = 65,536 they are 256 MiB of float32


@dataclass(frozen=True)
class TeacherPairs:
    """What one teacher says of B pairs: `image` and `text` (B, D_k), unit norm. `partial`: there may be rows of NaN, of
    pairs that it has not seen.

    Its answer to a row of similarities is the softmax of `logit_scale` times them. A SigLIP has a `logit_bias`, too:
    what it says of each pair is a sigmoid, and its answer to a row are these probabilities, over their sum."""

    image: Tensor
    text: Tensor
    logit_scale: float
    logit_bias: float | None = None
    partial: bool = False

    def turned(self) -> "TeacherPairs":
        """Of texts by images."""
        return replace(self, image=self.text, text=self.image)


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

    A teacher that has not seen a pair is left out of the mean of its row, and finds nothing like it in another row. A
    pair that no teacher has seen learns from its own caption alone: its weight is 0.

    On several ranks every rank calls this with as many pairs, and each pair is compared with those of all; the mean
    over ranks, and of gradients, is that of one process with the whole batch.
    """
    image, text, scale = _full(image), _full(text), _full(logit_scale)
    pairs = [replace(t, image=_full(t.image), text=_full(t.text)) for t in teachers]
    of_images = _direction(image, text, scale, pairs, weight, block_rows)
    of_texts = _direction(text, image, scale, [t.turned() for t in pairs], weight, block_rows)
    return PairLosses(*((a + b) / (2 * len(image)) for a, b in zip(of_images, of_texts, strict=True)))


class FeatureHeads(nn.Module):
    """A linear map for each teacher and tower, from the student's width to the teacher's; dropped after training."""

    def __init__(self, width: int, image_widths: Mapping[str, int], text_widths: Mapping[str, int]) -> None:
        super().__init__()
        self.image, self.text = (
            nn.ModuleDict({name: nn.Linear(width, size) for name, size in widths.items()})
            for widths in (image_widths, text_widths)
        )


def feature_mse(
    guesses: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    partial: Collection[str] = (),
    balanced: bool = False,
) -> Tensor:
    """Mean squared distance of directions to unit targets, (.., D_k) by teacher: from 0 to 4 (CLIP-KD's feature
    distillation, there as a mean over D_k). Of each sample the mean over the teachers that have seen it: of those that
    are `partial`, rows of NaN are samples that they have not.

    `balanced`: each teacher's distance over the spread of its targets, their mean squared distance to their mean: 1 is
    then what a guess of the mean would give. Teachers whose features lie close together count as much as others.
    """
    distances, seen = [], []
    for name, guess in guesses.items():
        target = _full(targets[name])
        there = torch.ones_like(target[..., 0], dtype=torch.bool)
        if name in partial:
            target, there = _seen(target)
        distance = (F.normalize(_full(guess), dim=-1) - target).square().sum(-1) * there
        distances.append(distance / _spread(target, there) if balanced else distance)
        seen.append(there)
    return (torch.stack(distances).sum(0) / torch.stack(seen).sum(0).clamp(min=1)).mean()


def _spread(target: Tensor, there: Tensor) -> Tensor:
    """Of the targets of all ranks: one less the squared length of their mean, since they are unit vectors."""
    total, num = target.flatten(0, -2).sum(0), there.sum().to(target)
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(num)
    return (1 - (total / num.clamp(min=1)).square().sum()).clamp(min=1e-3)


def _seen(units: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (.., D) with zeros for NaN, and (..) whether each was there."""
    there = ~units[..., 0].isnan()
    return units.where(there[..., None], 0.0), there


def _direction(
    x: Tensor, y: Tensor, scale: Tensor, teachers: list[TeacherPairs], weight: float, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows of `x`: of the loss, and of its parts."""
    gathered = [replace(teacher, text=_gathered(teacher.text)) for teacher in teachers]
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
        teachers: list[TeacherPairs],
        weight: float,
        first: int,
        block_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, contrastive, distill, d_scale = x.new_zeros(4)
        wanted = any(ctx.needs_input_grad)
        columns = [_seen(teacher.text) if teacher.partial else (teacher.text, None) for teacher in teachers]
        d_x, d_y = (torch.zeros_like(t) if wanted else None for t in (x, y))
        for rows in (slice(start, start + block_rows) for start in range(0, len(x), block_rows)):
            log_p = (scale * x[rows] @ y.T).log_softmax(-1)
            own = torch.arange(rows.start, rows.start + len(log_p), device=x.device)[:, None] + first
            own_log_p = log_p.gather(1, own)
            target, num = _soft_labels(teachers, columns, rows, own_log_p)
            share = weight * (num > 0).to(x.dtype)  # of the soft labels, for each row
            loss -= ((1 - share) * own_log_p).sum()
            contrastive -= own_log_p.sum()
            if target is not None:
                distill -= torch.dot(target.flatten(), log_p.flatten())  # of rows that none has seen it has zeros
            if d_x is None or d_y is None:
                continue
            # Of a cross-entropy by its logits: the student's probabilities less the labels.
            d_logits = log_p.exp_()
            if target is not None:
                d_logits.sub_(target, alpha=weight)
            d_logits.scatter_add_(1, own, share - 1)
            d_rows = d_logits @ y
            d_scale += (d_rows * x[rows]).sum()
            d_x[rows] = scale * d_rows
            d_y.addmm_(d_logits.T, scale * x[rows])
        if wanted:
            ctx.save_for_backward(d_x, d_y, d_scale)
        ctx.mark_non_differentiable(contrastive, distill)
        return loss + weight * distill, contrastive, distill

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(d_loss * part for part in ctx.saved_tensors), None, None, None, None


def _soft_labels(
    teachers: list[TeacherPairs], columns: Sequence[tuple[Tensor, Tensor | None]], rows: slice, like: Tensor
) -> tuple[Tensor | None, Tensor]:
    """(rows, G): the mean over the teachers that have seen a row, zeros where none has, or None where there is no
    teacher at all. And (rows, 1), `like` that: how many have. `columns`: of each teacher its texts, and where it is
    partial which of them it has seen."""
    total, num = None, torch.zeros_like(like)
    for teacher, (text, in_column) in zip(teachers, columns, strict=True):
        image, in_row = _seen(teacher.image[rows]) if teacher.partial else (teacher.image[rows], None)
        logits = teacher.logit_scale * image @ text.T
        if teacher.logit_bias is not None:
            logits = F.logsigmoid(logits + teacher.logit_bias)
        if in_row is not None and in_column is not None:
            answer = logits.masked_fill_(~in_column, NEVER).softmax(-1).mul_(in_row[:, None])
            num += in_row[:, None]
        else:
            answer = logits.softmax(-1)
            num += 1
        total = answer if total is None else total.add_(answer)
    return (None if total is None else total.div_(num.clamp(min=1))), num


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(x: Tensor) -> Tensor:
    """(B, D) of every rank as (G, D), with gradients to every rank."""
    return torch.cat(all_gather(x.contiguous())) if dist.is_initialized() else x  # type: ignore[no-untyped-call]
