"""MambaVision, the image encoder of DM-CLIP, written from its description.

Sources: MambaVision (Hatamizadeh and Kautz 2024, arXiv 2407.08083, section 3) for the blocks; DM-CLIP's repository,
24su-DM-CLIP of deepdaiv-multimodal, for the size: B, with layer scale 1e-5 and drop path 0.3, and a linear head.

DM-CLIP reads 256 px with windows of 14 and 7 tokens, which it pads: three tokens in four are zeros. Here windows are 16
and 8, so that at 256 px, and at multiples of it, there is nothing to pad; the weights have the same shapes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.students.fold import ConvNorm
from train.students.scan import selective_scan

NUM_STATES = 8
KERNEL = 3  # of the convolutions along the tokens
WINDOWS = (16, 8)  # tokens a side, in stages 3 and 4


@dataclass(frozen=True)
class Size:
    """`width` is that of stage 1 and doubles with every stage. `layer_scale` is where it starts, None for none."""

    width: int
    stem: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int]  # of attention, in stages 3 and 4
    layer_scale: float | None


def conv_norm(ins: int, outs: int, stride: int = 1, bias: bool = False) -> ConvNorm:
    return ConvNorm(nn.Conv2d(ins, outs, 3, stride, 1, bias=bias), nn.BatchNorm2d(outs))


class ConvBlock(nn.Module):
    """`x + conv(gelu(conv(x)))`, both with BatchNorm: (B, C, H, W) to the same."""

    def __init__(self, width: int, drop_path: float):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(width, width, bias=True), nn.GELU(approximate="tanh"), conv_norm(width, width, bias=True)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.body(x))
        return x


class MambaMixer(nn.Module):
    """Half the channels through a selective scan, half through a convolution alone: (B, L, D) to the same.

    The scan runs one way, the convolutions before it look both ways.
    """

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.rank = math.ceil(width / 16)  # of the step
        self.project_in = nn.Linear(width, width, bias=False)
        self.local_scan = nn.Conv1d(half, half, KERNEL, padding="same", groups=half, bias=False)
        self.local_gate = nn.Conv1d(half, half, KERNEL, padding="same", groups=half, bias=False)
        self.project_scan = nn.Linear(half, self.rank + 2 * NUM_STATES, bias=False)
        # As Mamba starts: state n decays at rate n, steps are 0.001 to 0.1, evenly in the logarithm.
        self.project_step = nn.Linear(self.rank, half)
        nn.init.uniform_(self.project_step.weight, -(self.rank**-0.5), self.rank**-0.5)
        steps = torch.empty(half).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.project_step.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        self.log_decay = nn.Parameter(torch.arange(1.0, NUM_STATES + 1).log().repeat(half, 1))
        self.skip = nn.Parameter(torch.ones(half))
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scanned, gate = self.project_in(x).transpose(1, 2).chunk(2, dim=1)  # (B, D / 2, L) each
        scanned = F.silu(self.local_scan(scanned))
        steps, keys, queries = torch.split(
            self.project_scan(scanned.transpose(1, 2)), [self.rank, NUM_STATES, NUM_STATES], dim=-1
        )
        steps = F.linear(steps, self.project_step.weight).transpose(1, 2)
        y = selective_scan(
            scanned,
            steps.to(scanned.dtype),
            -self.log_decay.float().exp(),
            keys.transpose(1, 2).to(scanned.dtype),
            queries.transpose(1, 2).to(scanned.dtype),
            self.skip.float(),
            delta_bias=self.project_step.bias.float(),
            delta_softplus=True,
        )
        out: Tensor = self.project_out(torch.cat([y, F.silu(self.local_gate(gate))], dim=1).transpose(1, 2))
        return out


class AttentionMixer(nn.Module):
    """Self-attention within a window: (B, L, D) to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project_in(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.project_out(y)
        return out


class TokenBlock(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`, each times a scale of its own: (B, C, H, W), mixed by windows.

    An image smaller than a window is one window. Raises ValueError where windows do not fill the grid.
    """

    def __init__(self, width: int, mixer: nn.Module, window: int, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.window = window
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.bodies = nn.ModuleList([mixer, mlp])
        self.scales = (
            nn.ParameterList([torch.full((width,), layer_scale) for _ in range(2)]) if layer_scale else [1.0, 1.0]
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = min(self.window, height), min(self.window, width)
        if height % rows or width % columns:
            raise ValueError(f"a grid of {height} x {width} tokens is no whole number of windows of {self.window}")
        x = x.view(batch, channels, height // rows, rows, width // columns, columns)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * columns, channels)
        for norm, body, scale in zip(self.norms, self.bodies, self.scales, strict=True):
            x = x + self.drop_path(scale * body(norm(x)))
        x = x.view(batch, height // rows, width // columns, rows, columns, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


class MambaVision(nn.Module):
    """Images (B, 3, H, W) to features (B, num_classes), as timm's models do. Sides: 32 times 1 to 8, or 256 times any.

    A stem to a stride of 4, four stages with a stride-2 convolution between them: two of convolutions, two of tokens,
    whose first half of blocks scans and whose second half attends.
    """

    def __init__(self, size: Size, num_classes: int = 1000, drop_path_rate: float = 0.0):
        super().__init__()
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            conv_norm(3, size.stem, stride=2), nn.ReLU(), conv_norm(size.stem, size.width, stride=2), nn.ReLU()
        )
        last = max(sum(size.depths) - 1, 1)
        rates = [drop_path_rate * index / last for index in range(last + 1)]
        layers: list[nn.Module] = []
        width = size.width
        for stage, depth in enumerate(size.depths):
            if stage:
                layers.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False))
                width *= 2
            for index in range(depth):
                rate = rates.pop(0)
                if stage < 2:
                    layers.append(ConvBlock(width, rate))
                    continue
                scans = index < (depth + 1) // 2
                mixer = MambaMixer(width) if scans else AttentionMixer(width, size.heads[stage - 2])
                layers.append(TokenBlock(width, mixer, WINDOWS[stage - 2], size.layer_scale, rate))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing else layer(x)
        features: Tensor = self.head(self.norm(x).mean((2, 3)))
        return features


@register_model
def dmclip_b(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> MambaVision:
    """MambaVision-B. The other settings are timm's, about downloads, which there are none of."""
    size = Size(width=128, stem=64, depths=(3, 3, 10, 5), heads=(8, 16), layer_scale=1e-5)
    return MambaVision(size, num_classes, drop_path_rate)
