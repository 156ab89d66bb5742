"""Our Mamba image encoder: convolutions where tokens are many, then state spaces to the end.

No part of it knows the size of the image: positions come from zero-padded depthwise convolutions, so any image works
whose sides are multiples of the stride. No BatchNorm, so that a sum of gradients over parts of a batch is exact.
The block is Mamba-2's (Dao and Gu 2024, arXiv 2405.21060, section 7): twice the width inside, and no MLP beside it. It
is made bidirectional, with a depthwise 3x3 convolution over the grid in place of its causal one, as in VMamba (Liu et
al. 2024, arXiv 2401.10166, section 4.2). What else was tried is in docs/results/encoder.md.

Inside, tensors are (B, H, W, C). Convolutions see them as channels-last (B, C, H, W), without a copy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.students.scan import ssd

EXPANSION = 2  # of a state-space block, in widths


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of one kind, `convolution`, `ssd` or, in mamba_v1.py, `attention`, at `width` channels."""

    kind: str
    width: int
    depth: int


class Conv(nn.Conv2d):
    """A convolution over the grid of (B, H, W, C). On a CPU in bfloat16 not for grids two pixels wide or narrower: with
    a stride of 2 oneDNN (3.12, of torch 2.13) computes them wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Depthwise(Conv):
    """3x3, of each channel alone, and SiLU if asked. cuDNN is slow at it: docs/results/encoder.md."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        x = super().forward(x)
        return _silu(x) if silu else x


def _silu(x: Tensor) -> Tensor:
    """Written over x where no gradient needs it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class SiLU(nn.Module):
    """That of the stem, whose maps are the largest."""

    def forward(self, x: Tensor) -> Tensor:
        return _silu(x)


class Local(nn.Module):
    """`x + depthwise(x)`: each pixel with those around it. Without the sum, students learn much less."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Depthwise(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x)
        return out

    @torch.no_grad()
    def fuse(self) -> Conv:
        """One convolution, for inference: `fold` asks for it."""
        self.conv.weight[:, 0, 1, 1] += 1
        return self.conv


class SSDMixer(nn.Module):
    """Bidirectional SSD over the grid read by rows, or by columns: (B, H, W, C) to the same.

    `inner` channels are scanned, in heads of `head_width`. `num_states` is Mamba's state size, 64 to 128 in language.
    Pixels of one image are few: 16 do.
    """

    def __init__(self, width: int, inner: int, num_states: int, head_width: int, by_columns: bool) -> None:
        super().__init__()
        num_heads = inner // head_width
        self.splits = [inner, inner + 2 * num_states, num_heads]
        self.by_columns = by_columns
        self.num_states = num_states
        self.head_width = head_width
        self.project_in = nn.Linear(width, sum(self.splits), bias=False)
        self.local = Depthwise(inner + 2 * num_states)
        # As Mamba-2 starts: decays of 1 to 16, steps of 0.001 to 0.1, evenly in the logarithm.
        self.log_decay = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        steps = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.LayerNorm(inner)
        self.project_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed, steps = torch.split(self.project_in(x), self.splits, dim=-1)
        mixed = self.local(mixed, silu=True)
        if self.by_columns:
            mixed, steps = mixed.transpose(1, 2), steps.transpose(1, 2)
        batch, *grid = mixed.shape[:3]
        values, keys, queries = torch.split(mixed, [gate.shape[-1], self.num_states, self.num_states], dim=-1)
        # Heads come first in memory, as the scan's products need them: one copy, by rows or by columns.
        values = self._by_heads(values).permute(0, 3, 1, 2, 4).flatten(2, 3).transpose(1, 2)
        steps = F.softplus(steps.flatten(1, 2).float() + self.step_bias)
        y = ssd(values, steps, -self.log_decay.exp(), keys.flatten(1, 2), queries.flatten(1, 2), self.skip)
        y = y.view(batch, *grid, *y.shape[2:])
        if self.by_columns:
            y = y.transpose(1, 2)
        gated = self._by_heads(_silu(gate)) * y  # in the first one's order in memory: pixels first again
        out: Tensor = self.project_out(self.norm(gated.flatten(-2)))
        return out

    def _by_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_width)


class MambaBlock(nn.Module):
    """`x + local(x)`, then `x + mixer(norm(x))`."""

    def __init__(self, width: int, mixer: SSDMixer, drop_path: float) -> None:
        super().__init__()
        self.local = Local(width)
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        out: Tensor = x + self.drop_path(self.mixer(self.norm(x)))
        return out


class MambaEncoder(nn.Module):
    """Images (B, 3, H, W), sides multiples of `stride`, to features (B, num_classes), as timm's models do.

    The stem works at a stride of 4; every stage after the first halves the sides.
    """

    def __init__(
        self,
        stages: list[Stage],
        block: Callable[[Stage, int, float], nn.Module],
        activation: type[nn.Module] = SiLU,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        """`block` makes that of a stage, of an index in it, with a rate of dropped paths. `activation`: the stem's."""
        super().__init__()
        self.stride = 2 ** (1 + len(stages))
        self.grad_checkpointing = False
        width = stages[0].width
        self.stem = nn.Sequential(
            Conv(3, width // 2, 3, stride=2, padding=1), activation(), Conv(width // 2, width, 3, stride=2, padding=1)
        )
        last = max(sum(stage.depth for stage in stages) - 1, 1)
        rates = iter([drop_path_rate * index / last for index in range(last + 1)])
        layers: list[nn.Module] = []
        for number, stage in enumerate(stages):
            if number:
                layers += [nn.LayerNorm(width), Conv(width, stage.width, 3, stride=2, padding=1)]
                width = stage.width
            layers += [block(stage, index, next(rates)) for index in range(stage.depth)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        _zero_biases(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing else layer(x)
        features: Tensor = self.head(self.norm(x).mean((1, 2)))
        return features


def _blocks(num_states: int, head_width: int) -> Callable[[Stage, int, float], nn.Module]:
    def block(stage: Stage, index: int, drop_path: float) -> nn.Module:
        if stage.kind == "convolution":
            return Local(stage.width)
        inner, by_columns = EXPANSION * stage.width, index % 2 == 1
        return MambaBlock(stage.width, SSDMixer(stage.width, inner, num_states, head_width, by_columns), drop_path)

    return block


def _zero_biases(encoder: nn.Module) -> None:
    """So that features begin apart. torch's random biases are the same for every image, and no BatchNorm takes them
    away again: with them all images begin at nearly one point (mean cosine .95 to .99, without them .4 to .6), where
    a training can be caught (docs/results/start.md). What Mamba-2 starts its steps and decays with stays."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


# The names are timm's; mamba_v1.py has `mamba_tiny` and `mamba_small`, which exported students ask for. The settings
# that are not read are timm's: pooling, which is the mean here, and downloads, of which there are none.


@register_model
def mamba2_tiny(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> MambaEncoder:
    """For 64 px on a CPU: state spaces on 8x8 and on 4x4 tokens."""
    stages = [Stage("convolution", 48, 1), Stage("ssd", 96, 3), Stage("ssd", 160, 3)]
    return MambaEncoder(stages, _blocks(16, 32), num_classes=num_classes, drop_path_rate=drop_path_rate)


@register_model
def mamba2_mini(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> MambaEncoder:
    """For 256 px, in half the time of MobileCLIP's MCi0: state spaces on 16x16 and on 8x8 tokens."""
    stages = [Stage("convolution", 40, 1), Stage("convolution", 80, 2), Stage("ssd", 192, 4), Stage("ssd", 512, 4)]
    return MambaEncoder(stages, _blocks(32, 64), num_classes=num_classes, drop_path_rate=drop_path_rate)


@register_model
def mamba2_small(num_classes: int = 1000, drop_path_rate: float = 0.0, **settings: Any) -> MambaEncoder:
    """For 256 px and more, in half the time of MCi1: state spaces on 16x16 and on 8x8 tokens."""
    stages = [Stage("convolution", 48, 1), Stage("convolution", 96, 2), Stage("ssd", 256, 5), Stage("ssd", 640, 5)]
    return MambaEncoder(stages, _blocks(32, 64), num_classes=num_classes, drop_path_rate=drop_path_rate)
