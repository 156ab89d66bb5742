"""Does the student still tell its samples apart? What a step says of it, and when that is worth a warning.

A collapsed student has all images at one point and all texts at one point. There it has next to no gradient, and its
loss and gradient norm are also those of students that learn. What tells them apart is `spread`: how much its logits
differ once the means of their rows and columns are taken away; readings of it are in docs/results/start.md.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

WINDOW = 50  # steps; the first ones are not counted, since a training may begin close to one point and leave it
LEAST_SPREAD = 0.02


@torch.no_grad()
def separation(image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor) -> dict[str, Tensor]:
    """How far apart B images and their texts are: `image` (B, D) and (B, D) of every text set, unit norm; `logit_scale`
    the multiplier.

    `spread`: the standard deviation of logit_scale x (U - mean U)(V - mean V)ᵀ, from two D x D matrices and without the
    B x B one. `image_cosine`, `text_cosine`: mean cosine of different rows. Means over the text sets. On several ranks
    each looks at its own samples.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, scale = image.float(), logit_scale.float()
        texts = [text.float() for text in texts]
        of_images = _scatter(image)
        spreads = [scale * (of_images * _scatter(text)).sum().clamp_min(0).sqrt() / len(image) for text in texts]
        return {
            "spread": torch.stack(spreads).mean().float(),
            "image_cosine": mean_cosine(image),
            "text_cosine": torch.stack([mean_cosine(text) for text in texts]).mean(),
        }


class Watch:
    """Over the steps of a training: is it collapsed?"""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def collapsed(self, step: int, spread: float) -> bool:
        """After step number `step`, counted from 1: whether most of the last WINDOW steps had next to no spread."""
        if step > WINDOW:
            self._recent.append(spread)
        return len(self._recent) == WINDOW and median(self._recent) < LEAST_SPREAD


def _scatter(x: Tensor) -> Tensor:
    """(D, D): the sum over rows of (x - mean)(x - mean)ᵀ. In float64: near a collapse the products of two of these
    cancel, and float32 would be off where it matters most."""
    x = x.double() - x.double().mean(0)
    return x.T @ x


def mean_cosine(x: Tensor) -> Tensor:
    """Of all pairs of different rows of (B, D), unit norm."""
    num = len(x)
    return (x.sum(0).square().sum() - num) / max(1, num * (num - 1))
