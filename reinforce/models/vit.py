"""Transformer blocks of a held model, which only answers: what open_clip's do, in fewer passes over a GPU's memory.

A block is four products, with attention in between. Each sum, norm and activation between two of them is a pass over
memory, and together they took a quarter of a ViT-L/14's time (docs/results/gpu.md). So here
- what a branch gives is added to the stream by its last product, at no cost. The bias of that product cannot be added
  there as well: the stream goes without the biases of all branches so far, and norms add their sum, one vector.
- the activation belongs to the product before it.
- of the last block a CLIP's image tower computes the class token alone, at which nothing but it looks.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reinforce.models.open_clip import open_clip

HOPPER = (9, 0)


def quicken(model: Any) -> None:
    """Put `Blocks` in place of the transformers of a held model of open_clip, where they compute the same."""
    visual = getattr(model, "visual", None)
    if isinstance(visual, open_clip.transformer.VisionTransformer) and _plain(visual.transformer):
        pools_it = visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens
        visual.transformer = Blocks(visual.transformer, causal=False, class_token=pools_it)
    # A CLIP holds its text tower in parts, other models as one; that of a CoCa is run by coca.py, or has another mask.
    text: Any = model if isinstance(model, open_clip.model.CLIP) else getattr(model, "text", None)
    whole = isinstance(text, open_clip.transformer.TextTransformer) and text.cls_emb is None and not text.use_pad_mask
    if (text is model or whole) and _plain(text.transformer):
        text.transformer = Blocks(text.transformer, causal=text.attn_mask is not None, class_token=False)


def _plain(transformer: Any) -> bool:
    """Whether it is made of what `Blocks` knows."""
    blocks = getattr(transformer, "resblocks", ())
    return getattr(transformer, "batch_first", False) and all(
        type(block) is open_clip.transformer.ResidualAttentionBlock
        and type(block.ls_1) is type(block.ls_2) is nn.Identity
        and isinstance(block.ln_1, nn.LayerNorm)
        and not hasattr(block, "ln_1_kv")
        for block in blocks
    )


class Blocks(nn.Module):
    """In place of open_clip's `whole` transformer."""

    offsets: Tensor

    def __init__(self, whole: Any, causal: bool, class_token: bool) -> None:
        """`causal`: a token attends to itself and those before it. `class_token`: only the first is wanted."""
        super().__init__()
        self.whole, self.causal, self.class_token = whole, causal, class_token
        biases = [bias for block in whole.resblocks for bias in (block.attn.out_proj.bias, block.mlp.c_proj.bias)]
        sums = torch.stack([torch.zeros_like(biases[0]), *biases]).double().cumsum(0).float()
        self.register_buffer("offsets", sums, persistent=False)  # (2 * blocks + 1, W): what the stream goes without

    @property
    def resblocks(self) -> Any:
        return self.whole.resblocks

    def get_cast_dtype(self) -> torch.dtype:
        """Asked for by towers of texts."""
        dtype: torch.dtype = self.whole.get_cast_dtype()
        return dtype

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, L, W) -> (B, L, W), or the class tokens (B, 1, W). `attn_mask` is known before."""
        if not torch.backends.mha.get_fastpath_enabled():  # one switch for all that is quicker and computes the same
            whole: Tensor = self.whole(x, attn_mask)
            return whole
        batch, length, width = x.shape
        stream = x.reshape(-1, width).clone()
        for i, block in enumerate(self.resblocks):
            class_token = self.class_token and i == len(self.resblocks) - 1
            seen = norm(stream, self.offsets[2 * i], block.ln_1).view(batch, length, width)
            if class_token:
                stream = stream.view(batch, length, width)[:, 0].contiguous()
            heads = _attention(block.attn, seen, self.causal, class_token)
            stream.addmm_(heads, block.attn.out_proj.weight.t())
            seen = norm(stream, self.offsets[2 * i + 1], block.ln_2)
            stream.addmm_(activated(seen, block.mlp.c_fc, block.mlp.gelu), block.mlp.c_proj.weight.t())
        return (stream + self.offsets[-1].to(x.dtype)).view(batch, -1, width)


def _attention(attn: nn.MultiheadAttention, x: Tensor, causal: bool, class_token: bool) -> Tensor:
    """(B, L, W) -> what the tokens see, heads side by side (B * L, W); or the class tokens (B, W)."""
    batch, length, width = x.shape
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if class_token:
        queries = F.linear(x[:, :1], weight[:width], bias[:width])
        queries = queries.view(batch, 1, attn.num_heads, -1).transpose(1, 2)
        projected = F.linear(x, weight[width:], bias[width:]).view(batch, length, 2, attn.num_heads, -1)
        keys, values = projected.permute(2, 0, 3, 1, 4)
    else:
        projected = F.linear(x, weight, bias).view(batch, length, 3, attn.num_heads, -1)
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    return out.transpose(1, 2).reshape(-1, width)


def norm(x: Tensor, offset: Tensor, layer: nn.LayerNorm) -> Tensor:
    """`layer` of x (n, W) + offset (W,), as x."""
    own = _kernels() if x.is_cuda else None
    if own:
        quick: Tensor = own.norm(x, offset, layer.weight, layer.bias, layer.eps)
        return quick
    return F.layer_norm(x + offset.to(x.dtype), layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def activated(x: Tensor, layer: nn.Linear, activation: nn.Module) -> Tensor:
    """x (n, W) through `layer` and then GELU or SiLU, (n, M). On a GPU GELU is the tanh form, which cuBLAS has: 5e-4
    away at most, and torch's own transformer layer takes it, too."""
    if x.is_cuda and isinstance(activation, nn.GELU):
        return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
    own = _kernels() if x.is_cuda and isinstance(activation, nn.SiLU) else None
    if own and torch.cuda.get_device_capability(x.device) == HOPPER:
        quick: Tensor = own.linear_silu(x, layer.weight, layer.bias)
        return quick
    out: Tensor = activation(layer(x))
    return out


@functools.cache
def _kernels() -> ModuleType | None:
    """None without Triton, which comes with torch for CUDA."""
    try:
        from reinforce.models import kernels
    except ImportError:
        return None
    return kernels
