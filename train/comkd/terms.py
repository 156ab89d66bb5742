"""ComKD-CLIP's terms and the small parts that learn with a student: features in, scalars and features out.

Source: ComKD-CLIP (arXiv 2408.04145). No code of it is public and every copy of the text at hand shows its formulas as
pictures, so that each docstring says what is the prose's and what is a reconstruction. Where ComKD-CLIP is silent, its
template PromptKD (Li et al. 2024, arXiv 2403.02781) is followed.

Letters: B images, C classes, D_s width of the student's features, D width of the teacher's; u a unit image feature, W
the teacher's class texts (C, D), unit norm. The whole loss is kl x refinement + align x IFAlign; the prose has no
weights.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Statistics = Literal["batch", "width"]  # what a mean and a variance are taken over


def mean_and_variance(features: Tensor, over: Statistics = "batch") -> tuple[Tensor, Tensor]:
    """(B, D) -> two (D,), over the batch; or two (B,), over the width. The variance is the population's, so that of one
    image it is 0.

    Reconstructed: the axis and the kind of variance.
    """
    variance, mean = torch.var_mean(features, dim=("batch", "width").index(over), correction=0)
    return mean, variance


def if_align(student: Tensor, teacher: Tensor, over: Statistics = "batch", average: bool = False) -> Tensor:
    """IFAlign: |mean_t - mean_s|_1 + |variance_t - variance_s|_1 of P(u_s) and u_t, both (B, D).

    The prose's: L1 between means and between variances, added. Reconstructed: the L1 norm as a sum, as it is written
    (`average`: a mean in its place), and P(u_s) brought to unit norm, since u_t is. Over the batch it is that of one
    process and forward pass; `over` the width, the other reading, each image has its own mean and variance.
    """
    pairs = zip(mean_and_variance(student, over), mean_and_variance(teacher.to(student.dtype), over), strict=True)
    distances = torch.stack([(of_student - of_teacher).abs() for of_student, of_teacher in pairs]).sum(0)
    return distances.mean() if average else distances.sum()


def refinement(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """KL(softmax(q_t / tau) || softmax(q_s / tau)) tau^2 of (B, C) logits, the mean over the images.

    The prose's, with Hinton's tau^2. PromptKD divides by B x C and weighs by 1000 (200 on some sets).
    """
    log_s, log_t = (logits.div(tau).log_softmax(-1) for logits in (student_logits, teacher_logits))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * tau**2


class Projector(nn.Module):
    """(B, D_s) -> (B, D): linear, BatchNorm, ReLU, linear, as PromptKD's (there as 1 x 1 convolutions).

    A batch of one image has no variance: in training, too, it is normalised by the running averages.
    """

    def __init__(self, student_width: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(student_width, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        x, norm = self.first(features), self.norm
        if not self.training or len(x) > 1:  # in this order, so that an export in eval mode takes any batch
            x = norm(x)
        else:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        out: Tensor = self.last(x.relu())
        return out


class EduAttention(nn.Module):
    """f_e = u + alpha f_att, f_att = softmax(FC_q(u) FC_k(W)^T / C) FC_v(W); u (B, D), W (C, D) -> (B, D).

    The prose's: attention of the student's image features over the teacher's text features, fully connected layers, a
    hyperparameter C (`scale`), alpha learned from 0. Reconstructed: which side asks, where alpha and C stand, C's value
    (the root of D), and that f_e is used as it comes, not brought to unit norm.

    While alpha is 0 the attention's own layers get no gradient, and alpha does: they learn from the second step on.
    With C the root of D and unit features the attention begins flat: every class has nearly the same weight.
    """

    def __init__(self, width: int, scale: float | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.scale = scale or math.sqrt(width)

    def forward(self, image: Tensor, classes: Tensor) -> Tensor:
        weights = (self.query(image) @ self.key(classes).T / self.scale).softmax(-1)
        fused: Tensor = image + self.alpha * (weights @ self.value(classes))
        return fused


class Head(nn.Module):
    """What stands on a student's image encoder: the projector and, if asked for, EduAttention over the classes."""

    classes: Tensor

    def __init__(self, student_width: int, classes: Tensor, attention: bool, scale: float | None = None) -> None:
        super().__init__()
        width = classes.shape[1]
        self.projector = Projector(student_width, width)
        self.attention = EduAttention(width, scale) if attention else None
        self.register_buffer("classes", classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """u_s (B, D_s), unit norm -> P(u_s) and f_e, both (B, D), the first of unit norm. Without attention f_e is
        P(u_s)."""
        projected = F.normalize(self.projector(features), dim=-1)
        return projected, projected if self.attention is None else self.attention(projected, self.classes)
