"""MobileCLIP-S0's text tower, MCt: convolutions at both ends, attention in between.

Source: MobileCLIP (Vasu et al. 2024, arXiv 2311.17049, section 4.1). open_clip has no such tower; importing this module
makes it build one wherever a `text_cfg` names a `mixer_kernel`. It is open_clip's own text tower with a block more
before and after its transformer's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from reinforce.models.open_clip import open_clip
from reinforce.process import open_clip_text_tower
from train.students.fold import ConvNorm

LAYER_SCALE = 1e-5  # where a block's branches start


def conv_norm(width: int, kernel: int) -> ConvNorm:
    """Depthwise, along the tokens."""
    conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    return ConvNorm(conv, nn.BatchNorm1d(width))


class RepMixer(nn.Module):
    """`x + scale (conv(x) + skip(x) - norm(x))` over (B, D, L); in inference one depthwise convolution.

    conv is a depthwise convolution with BatchNorm, skip and norm are BatchNorms (FastViT, section 3.2.1).
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = conv_norm(width, kernel)
        self.skip = nn.BatchNorm1d(width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.full((width, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * (self.conv(x) + self.skip(x) - self.norm(x))
        return x

    def fuse(self) -> nn.Conv1d:
        """Every branch is a depthwise kernel; a BatchNorm alone is one that is zero beside its centre."""
        folded = self.conv.fuse()
        assert isinstance(folded, nn.Conv1d) and folded.bias is not None
        centre = folded.kernel_size[0] // 2
        with torch.no_grad():
            for norm, sign in ((self.skip, 1), (self.norm, -1)):
                assert norm.running_mean is not None and norm.running_var is not None
                gain = norm.weight / (norm.running_var + norm.eps).sqrt()
                folded.weight[:, 0, centre] += sign * gain
                folded.bias += sign * (norm.bias - norm.running_mean * gain)
            folded.weight *= self.scale.unsqueeze(-1)
            folded.bias *= self.scale.squeeze(-1)
            folded.weight[:, 0, centre] += 1
        return folded


class ConvMLP(nn.Module):
    """Depthwise convolution with BatchNorm, then an MLP of four times the width: (B, L, D) to the same."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = conv_norm(width, kernel)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (widen, narrow):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return y


class RepMixerBlock(nn.Module):
    """A block of open_clip's transformer, called as its others are, that mixes tokens by convolution."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.mixer = RepMixer(width, kernel)
        self.mlp = ConvMLP(width, kernel)
        self.scale = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def get_weight_dtype(self) -> torch.dtype:
        return self.scale.dtype

    def forward(self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Queries, keys and values are one, and a convolution along the text reads both ways: nothing to mask."""
        x = self.mixer(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.scale * self.mlp(x)
        return x


def build(embed_dim: int, text_cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """open_clip's text tower; where `text_cfg` has a `mixer_kernel` (tokens, odd), with the blocks at both its ends."""
    if not isinstance(text_cfg, dict) or "mixer_kernel" not in text_cfg:
        return build_plain(embed_dim, text_cfg, *args, **kwargs)
    plain = {key: value for key, value in text_cfg.items() if key != "mixer_kernel"}
    if not plain.get("no_causal_mask"):
        raise ValueError("text_cfg: a tower with mixer_kernel reads both ways, so it needs no_causal_mask = true")
    tower = build_plain(embed_dim, plain, *args, **kwargs)
    first, last = (RepMixerBlock(tower.width, text_cfg["mixer_kernel"]) for _ in range(2))
    tower.transformer.resblocks = nn.ModuleList([first, *tower.transformer.resblocks, last])
    return tower


build_plain = open_clip_text_tower(open_clip.model, build)
