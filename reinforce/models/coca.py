"""CoCa (Yu et al. 2022, arXiv 2205.01917) as open_clip builds it, decoded with a cache: images in, C captions each out.

A step computes one token of every caption. Captions of one image are queries of one attention over the image, so what
the image gives (its encoding, the keys and values of the cross-attention) is computed once and held once.
The text tower's class token comes after the text and no token looks ahead, so decoding never needs it.

Letters: B images, C captions, W width, L image tokens, T tokens of a caption, V vocabulary, R rows.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reinforce.config import Captioner as CaptionerConfig
from reinforce.errors import ConfigError
from reinforce.models.open_clip import open_clip

Block: TypeAlias = open_clip.transformer.ResidualAttentionBlock


def check(model: open_clip.CoCa, config: CaptionerConfig) -> None:
    """Raises ConfigError for a model that this decoding does not fit, or that has fewer than T positions."""
    name = f"captioner {config.model}"
    if not isinstance(model, open_clip.CoCa):
        raise ConfigError(f"{name} is a {type(model).__name__} and writes no captions; choose an open_clip CoCa")
    if not isinstance(model.text, open_clip.transformer.TextTransformer):
        raise ConfigError(
            f"{name} has a {type(model.text).__name__} as its text tower, which cannot be decoded token by token here; "
            "choose a CoCa with open_clip's own text tower, such as coca_ViT-L-14"
        )
    if model.text.attn_mask is None:
        raise ConfigError(f"{name} has a text tower without causal mask (no_causal_mask), which cannot write captions")
    blocks = [*model.text.transformer.resblocks, *model.text_decoder.resblocks, *model.text_decoder.cross_attn]
    for block in blocks:
        if type(block) is not Block:
            raise ConfigError(
                f"{name} has blocks of kind {type(block).__name__}; choose a CoCa of ResidualAttentionBlocks only"
            )
    num_positions = min(model.text.context_length, model.text_decoder.context_length)
    if config.max_tokens > num_positions:
        raise ConfigError(f"{name} has {num_positions} positions, too few for max_tokens={config.max_tokens}")


@torch.inference_mode()
def generate(
    model: open_clip.CoCa, images: Tensor, config: CaptionerConfig, uniforms: np.ndarray, sot: int, eot: int
) -> Tensor:
    """Normalised images (B, 3, H, W) -> tokens (B, C, T) int64: `sot`, the caption, `eot`, the model's pad.

    `uniforms` (B, C, T) float64 in [0, 1): number t chooses token t. The model is in eval mode.
    Raises what `check` raises.
    """
    check(model, config)
    pad = model.pad_id
    shape = (len(images), config.num_captions)
    memory = _Memory(model, model(images)["image_embs"], config)
    numbers = torch.from_numpy(uniforms).to(images.device)
    tokens = torch.full((*shape, config.max_tokens), pad, device=images.device)
    tokens[..., 0] = sot
    ended = torch.zeros(shape, dtype=torch.bool, device=images.device)
    for length in range(1, config.max_tokens - 1):
        logits = _step(model, tokens[..., length - 1], length - 1, memory).float()
        logits[..., pad] = -torch.inf  # no choice: the loss skips pads, and the text tower hides what follows one
        if length < config.min_tokens:
            logits[..., eot] = -torch.inf
        chosen = choose(logits.flatten(0, 1), numbers[..., length].flatten(), config).view(shape)
        tokens[..., length] = chosen.where(~ended, pad)
        ended |= chosen == eot
        if ended.all():
            break
    tokens[..., -1].masked_fill_(~ended, eot)
    return tokens


def choose(logits: Tensor, uniforms: Tensor, config: CaptionerConfig) -> Tensor:
    """One token a row: logits (R, V) float32, uniforms (R,) float64 in [0, 1) -> (R,) int64.

    The temperature comes first. top_k keeps the k most probable tokens, top_p the fewest most probable ones whose mass
    reaches it (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751, section 3.1); tokens as probable as the last
    kept are kept too. `uniforms` is a place on the mass of the kept, laid out by token number.
    """
    if config.sampling == "greedy":
        return logits.argmax(dim=-1)
    probs, order = _most_probable((logits / config.temperature).softmax(dim=-1), config)
    order, by_number = order.sort(dim=-1)
    mass = probs.gather(1, by_number).double().cumsum(dim=-1)
    place = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)
    return order.gather(1, place).squeeze(1)


def _most_probable(probs: Tensor, config: CaptionerConfig) -> tuple[Tensor, Tensor]:
    """Probabilities (R, V) -> the largest of them, 0 where not kept, and their tokens, (R, n) each."""
    size = 256  # mostly enough, and 10 times cheaper than to sort the vocabulary
    while True:
        size = min(size, probs.shape[1])
        values, order = probs.topk(size, dim=-1)
        if config.sampling == "top_k":
            last = torch.full_like(order[:, :1], config.top_k - 1)
        else:
            last = (values.double().cumsum(dim=-1) < config.top_p).sum(dim=-1, keepdim=True)
        edge = values.gather(1, last.clamp(max=size - 1))
        if size == probs.shape[1] or (values[:, -1:] < edge).all():
            return values.where(values >= edge, 0), order
        size *= 8


def caption_text(tokens: Tensor, tokenizer: Any, sot: int, eot: int) -> str:
    """Tokens (T,) of one caption -> its first sentence without the full stop, which may be empty.

    `tokenizer` has open_clip's `decode`. Source: the captions of DataCompDR's generator are cut the same way.
    """
    words = tokens.tolist()
    words = words[words.index(sot) + 1 :]
    if eot in words:
        words = words[: words.index(eot)]
    return str(tokenizer.decode(words)).partition(".")[0].strip()


class _Cache:
    """Keys and values of one self-attention, (rows, heads, T, head width) each, filled from the left."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.keys_values: Tensor | None = None

    def extend(self, keys_values: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Put in those of one token (2, rows, heads, 1, head width); give all up to it."""
        if self.keys_values is None:  # only now is the type known: autocast decides it
            self.keys_values = keys_values.repeat(1, 1, 1, self.num_tokens, 1)
        self.keys_values[..., position, :] = keys_values[..., 0, :]
        keys, values = self.keys_values[..., : position + 1, :]
        return keys, values


class _Memory:
    """What a step needs from before it: a cache for each self-attention, and the image for each cross-attention."""

    def __init__(self, model: open_clip.CoCa, image_embs: Tensor, config: CaptionerConfig) -> None:
        self.text = [_Cache(config.max_tokens) for _ in model.text.transformer.resblocks]
        self.decoder = [_Cache(config.max_tokens) for _ in model.text_decoder.resblocks]
        self.image = [_image_keys_values(block, image_embs) for block in model.text_decoder.cross_attn]


def _step(model: open_clip.CoCa, tokens: Tensor, position: int, memory: _Memory) -> Tensor:
    """Tokens (B, C) at `position` -> logits (B, C, V) of the tokens after them."""
    text, decoder = model.text, model.text_decoder
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[position].to(dtype)
    for block, cache in zip(text.transformer.resblocks, memory.text, strict=True):
        x = _feed_forward(block, x + block.ls_1(_self_attention(block, x, cache, position)))
    if text.cls_emb is None:  # with a class token, open_clip normalises that token alone
        x = text.ln_final(x)
    for block, cache, cross, image in zip(
        decoder.resblocks, memory.decoder, decoder.cross_attn, memory.image, strict=True
    ):
        x = _feed_forward(block, x + block.ls_1(_self_attention(block, x, cache, position)))
        x = _feed_forward(cross, x + cross.ls_1(_cross_attention(cross, x, *image)))
    logits: Tensor = decoder.ln_final(x) @ decoder.text_projection
    return logits


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def _self_attention(block: Block, x: Tensor, cache: _Cache, position: int) -> Tensor:
    """The last token of every caption (B, C, W) attends to its own caption so far -> (B, C, W)."""
    attn: nn.MultiheadAttention = block.attn
    projected = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    heads = projected.view(-1, 1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    keys, values = cache.extend(heads[1:], position)
    out = F.scaled_dot_product_attention(heads[0], keys, values)  # (B * C, heads, 1, head width)
    return F.linear(out.reshape(x.shape), attn.out_proj.weight, attn.out_proj.bias)


def _cross_attention(block: Block, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The captions of each image (B, C, W) attend to it, as C queries of one attention -> (B, C, W)."""
    attn: nn.MultiheadAttention = block.attn
    queries = F.linear(block.ln_1(x), attn.in_proj_weight[: attn.embed_dim], attn.in_proj_bias[: attn.embed_dim])
    queries = queries.view(*x.shape[:2], attn.num_heads, attn.head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values)  # (B, heads, C, head width)
    return F.linear(out.transpose(1, 2).reshape(x.shape), attn.out_proj.weight, attn.out_proj.bias)


def _image_keys_values(block: Block, image_embs: Tensor) -> tuple[Tensor, Tensor]:
    """Image tokens (B, L, W) -> keys and values (B, heads, L, head width)."""
    attn: nn.MultiheadAttention = block.attn
    weight, bias = attn.in_proj_weight[attn.embed_dim :], attn.in_proj_bias[attn.embed_dim :]
    projected = F.linear(block.ln_1_kv(image_embs), weight, bias)
    heads = projected.view(*image_embs.shape[:2], 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    keys, values = heads.contiguous()
    return keys, values
