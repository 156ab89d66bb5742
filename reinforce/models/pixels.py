"""Pixels as a model was trained to see them."""

from typing import Any

import torch
from torch import Tensor, nn


class Normaliser(nn.Module):
    """Pixel / 255 less mean, over std. It moves with the module that holds it and adds nothing to its state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess_cfg: dict[str, Any]) -> None:
        """`preprocess_cfg` is open_clip's: `mean` and `std` are of the three channels, from 0 to 1."""
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess_cfg[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 of the same shape. Both are on the normaliser's device."""
        made = pixels.float()  # the one tensor that this makes
        if not made.is_contiguous(memory_format=torch.channels_last):
            return made.div_(255).sub_(self.mean).div_(self.std)
        # The same line by line, and not three numbers at a time: half the time on a CPU.
        lines = made.permute(0, 2, 3, 1).view(made.shape[0], made.shape[2], 3 * made.shape[3])
        mean, std = (of_channels.flatten().repeat(made.shape[3]) for of_channels in (self.mean, self.std))
        lines.div_(255).sub_(mean).div_(std)
        return made
