"""Our first Mamba image encoder, for the students that were trained with it: convolutions where tokens are many, then
state spaces, attention where few are left.

What is in mamba.py learns more in half the time (docs/results/encoder.md). Inside, tensors are (B, H, W, C).
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import register_model
from torch import Tensor, nn

from train.students.mamba import Depthwise, MambaEncoder, SSDMixer, Stage

HEAD_WIDTH = 32
MLP_RATIO = 3


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
        self.local = Depthwise(width)
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


def _blocks_v1(num_states: int) -> Callable[[Stage, int, float], nn.Module]:
    def block(stage: Stage, index: int, drop_path: float) -> nn.Module:
        width = stage.width
        mixer: nn.Module | None = None
        if stage.kind == "ssd":
            mixer = SSDMixer(width, width, num_states, HEAD_WIDTH, by_columns=index % 2 == 1)
        elif stage.kind == "attention":
            mixer = AttentionMixer(width)
        return Block(width, mixer, drop_path)

    return block


# The other settings are timm's: pooling, which is the mean here, and downloads, of which there are none.


@register_model
def mamba_tiny(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> MambaEncoder:
    """For 64 px on a CPU: state spaces on 8x8 tokens, attention on 4x4."""
    stages = [Stage("convolution", 48, 1), Stage("ssd", 96, 2), Stage("attention", 160, 2)]
    return MambaEncoder(stages, _blocks_v1(16), nn.GELU, num_classes, drop_path_rate)


@register_model
def mamba_small(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> MambaEncoder:
    """MCi1's size, for 256 px and more: state spaces on 16x16 tokens, attention on 8x8."""
    stages = [
        Stage("convolution", 64, 2),
        Stage("convolution", 128, 4),
        Stage("ssd", 320, 10),
        Stage("attention", 512, 3),
    ]
    return MambaEncoder(stages, _blocks_v1(32), nn.GELU, num_classes, drop_path_rate)
