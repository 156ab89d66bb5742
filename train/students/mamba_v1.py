"""Our first Mamba image encoder, for the students that were trained with it: convolutions where tokens are many, then
state spaces, attention where few are left.

What is in mamba.py learns more in half the time (docs/results/encoder.md). Inside, tensors are (B, H, W, C).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.students.mamba import Conv, SSDMixer, depthwise, zero_biases

HEAD_WIDTH = 32
MLP_RATIO = 3


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of one kind, `convolution`, `ssd` or `attention`, at `width` channels."""

    kind: str
    width: int
    depth: int


class AttentionMixer(nn.Module):
    """Self-attention over all tokens of the grid: (B, H, W, C) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q, k, v = self.project_in(x).view(batch, height * width, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.project_out(y.transpose(1, 2).reshape(batch, height, width, channels))
        return out


class Block(nn.Module):
    """`x + local(x)`, then `x + mixer(norm(x))` where there is a mixer, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, mixer: nn.Module | None, drop_path: float):
        super().__init__()
        self.local = depthwise(width)
        self.mixer_norm = nn.LayerNorm(width) if mixer else None
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x)
        if self.mixer is not None and self.mixer_norm is not None:
            x = x + self.drop_path(self.mixer(self.mixer_norm(x)))
        x = x + self.drop_path(self.mlp(self.mlp_norm(x)))
        return x


class FirstMambaEncoder(nn.Module):
    """Images (B, 3, H, W), sides multiples of `stride`, to features (B, num_classes), as timm's models do.

    The stem works at a stride of 4; every stage after the first halves the sides.
    """

    def __init__(self, stages: list[Stage], num_states: int, num_classes: int = 1000, drop_path_rate: float = 0.0):
        super().__init__()
        self.stride = 2 ** (1 + len(stages))
        self.grad_checkpointing = False
        width = stages[0].width
        self.stem = nn.Sequential(
            Conv(3, width // 2, 3, stride=2, padding=1), nn.GELU(), Conv(width // 2, width, 3, stride=2, padding=1)
        )
        mixers: dict[str, Callable[[int, int], nn.Module | None]] = {
            "convolution": lambda width, index: None,
            "ssd": lambda width, index: SSDMixer(width, width, num_states, HEAD_WIDTH, by_columns=index % 2 == 1),
            "attention": lambda width, index: AttentionMixer(width),
        }
        last = max(sum(stage.depth for stage in stages) - 1, 1)
        rates = [drop_path_rate * index / last for index in range(last + 1)]
        layers: list[nn.Module] = []
        for number, stage in enumerate(stages):
            if number:
                layers += [nn.LayerNorm(width), Conv(width, stage.width, 3, stride=2, padding=1)]
                width = stage.width
            layers += [Block(width, mixers[stage.kind](width, index), rates.pop(0)) for index in range(stage.depth)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        zero_biases(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing else layer(x)
        features: Tensor = self.head(self.norm(x).mean((1, 2)))
        return features


# The other settings are timm's: pooling, which is the mean here, and downloads, of which there are none.


@register_model
def mamba_tiny(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> FirstMambaEncoder:
    """For 64 px on a CPU: state spaces on 8x8 tokens, attention on 4x4."""
    stages = [Stage("convolution", 48, 1), Stage("ssd", 96, 2), Stage("attention", 160, 2)]
    return FirstMambaEncoder(stages, 16, num_classes, drop_path_rate)


@register_model
def mamba_small(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> FirstMambaEncoder:
    """MCi1's size, for 256 px and more: state spaces on 16x16 tokens, attention on 8x8."""
    stages = [
        Stage("convolution", 64, 2),
        Stage("convolution", 128, 4),
        Stage("ssd", 320, 10),
        Stage("attention", 512, 3),
    ]
    return FirstMambaEncoder(stages, 32, num_classes, drop_path_rate)
