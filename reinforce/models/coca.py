"""CoCa (Yu et al. 2022, arXiv 2205.01917) as open_clip builds it, decoded with a cache: images in, C captions each out.

A step computes one token of every caption. Captions of one image are queries of one attention over the image, so what
the image gives (its encoding, the keys and values of the cross-attention) is computed once and held once.
The text tower's class token comes after the text and no token looks ahead, so decoding never needs it.

Letters: B images, C captions, W width, L image tokens, T tokens of a caption, V vocabulary, R rows.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reinforce.config import Captioner as CaptionerConfig
from reinforce.errors import ConfigError
from reinforce.models.graph import captured
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


class Decoder:
    """Writes captions, for one batch of images after the other.

    On a GPU no step waits for the host: nothing that a token depends on is decided there, and all steps have one shape.
    So they are one CUDA graph, which is replayed, and a call waits once, at its end. On a CPU waiting is free: a step
    looks at the tokens so far and at few candidates, at more where these are too few, and a call ends when all captions
    have.
    """

    def __init__(
        self, model: open_clip.CoCa, config: CaptionerConfig, sot: int, eot: int, graphs: bool = False
    ) -> None:
        """`sot` and `eot`: the tokens that start and end a text. The model is in eval mode. `graphs`: run the
        steps as a CUDA graph. Raises what `check` raises."""
        check(model, config)
        self.graphs = graphs
        self.model, self.config, self.sot, self.eot = model, config, sot, eot
        self._num_candidates = 256  # mostly enough, and 10 times cheaper than to sort the vocabulary
        self._state: _State | None = None
        self._look: Callable[[Tensor], list[tuple[Tensor, Tensor]]] = self._see
        self._step: Callable[[Tensor], Tensor] = self._write_token

    @torch.inference_mode()
    def generate(self, images: Tensor, uniforms: np.ndarray) -> Tensor:
        """Normalised images (B, 3, H, W) -> tokens (B, C, T) int64, on the host: `sot`, the caption, `eot`, the model's
        pad.

        `uniforms` (B, C, T) float64 in [0, 1): number t chooses token t.
        """
        while True:
            state = self._begin(images, uniforms)
            for place in range(self.config.max_tokens - 2):
                self._step(state.positions[place : place + 1])
                if not state.fixed and state.ended.all():
                    break
            state.tokens[..., -1].masked_fill_(~state.ended, self.eot)
            told = torch.cat([state.tokens.flatten(), state.enough.view(1)]).cpu()  # together: a GPU is waited for once
            if told[-1]:
                return told[:-1].view(state.tokens.shape)
            self._num_candidates *= 8  # for all that follow, too
            self._state = None

    def _begin(self, images: Tensor, uniforms: np.ndarray) -> "_State":
        """Everything as it is before the first token."""
        numbers, state = torch.from_numpy(uniforms), self._state
        if state and state.tokens.shape != numbers.shape:
            state = None
        if not state and self.graphs:
            self._look = captured(self._see, images)
        memory = self._look(images)
        if not state:
            fixed = self.graphs or images.device.type != "cpu"
            state = self._state = _State(self.model, memory, numbers.to(images.device), fixed)
            self._step = self._write_token
            if self.graphs:
                self._step = captured(self._write_token, self._state.positions[:1])
        state.begin(memory, numbers, self.sot, self.model.pad_id)
        return state

    def _see(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the images for every cross-attention."""
        image_embs = self.model(images)["image_embs"]
        return [_image_keys_values(block, image_embs) for block in self.model.text_decoder.cross_attn]

    def _write_token(self, position: Tensor) -> Tensor:
        """Of every caption the token after that at `position` (1,). Gives which captions have ended, (B, C)."""
        state, pad = self._state, self.model.pad_id
        assert state is not None
        tokens = state.tokens.index_select(-1, position).squeeze(-1)
        after = position + 1
        logits = _logits(self.model, tokens, position, state).float()
        logits[..., pad] = -torch.inf  # no choice: the loss skips pads, and the text tower hides what follows one
        logits[..., self.eot].masked_fill_(after < self.config.min_tokens, -torch.inf)
        numbers = state.numbers.index_select(-1, after).flatten()
        num = self._num_candidates
        chosen, enough = choose(logits.flatten(0, 1), numbers, self.config, num)
        while not state.fixed and not enough:
            num *= 8
            chosen, enough = choose(logits.flatten(0, 1), numbers, self.config, num)
        state.enough &= enough
        chosen = chosen.view(tokens.shape).where(~state.ended, pad)
        state.tokens.index_copy_(-1, after, chosen.unsqueeze(-1))
        return state.ended.logical_or_(chosen == self.eot)


def choose(
    logits: Tensor, uniforms: Tensor, config: CaptionerConfig, num_candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row: logits (R, V) float32, uniforms (R,) float64 in [0, 1) -> (R,) int64, and (), bool: whether
    `num_candidates`, the tokens looked at of each row, were enough. Only then are they the right ones.

    The temperature comes first. top_k keeps the k most probable tokens, top_p the fewest most probable ones whose mass
    reaches it (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751, section 3.1); tokens as probable as the last
    kept are kept too. `uniforms` is a place on the mass of the kept, laid out by token number.
    """
    if config.sampling == "greedy":
        return logits.argmax(dim=-1), torch.ones((), dtype=torch.bool, device=logits.device)
    probs, order, enough = _most_probable((logits / config.temperature).softmax(dim=-1), config, num_candidates)
    order, by_number = order.sort(dim=-1)
    mass = probs.gather(1, by_number).double().cumsum(dim=-1)
    place = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)
    return order.gather(1, place).squeeze(1), enough


def _most_probable(probs: Tensor, config: CaptionerConfig, num: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (R, V) -> the `num` largest of them, 0 where not kept, and their tokens, (R, num) each; and whether
    all that are kept are among them."""
    size = min(num or probs.shape[1], probs.shape[1])
    values, order = probs.topk(size, dim=-1)
    if config.sampling == "top_k":
        last = torch.full_like(order[:, :1], config.top_k - 1)
    else:
        last = (values.double().cumsum(dim=-1) < config.top_p).sum(dim=-1, keepdim=True)
    edge = values.gather(1, last.clamp(max=size - 1))
    enough = (values[:, -1:] < edge).all() if size < probs.shape[1] else torch.ones_like(edge[0, 0], dtype=torch.bool)
    return values.where(values >= edge, 0), order, enough


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
    """Keys and values of one self-attention, (rows, heads, T, head width) each."""

    def __init__(self, num_rows: int, num_tokens: int, attn: nn.MultiheadAttention, like: Tensor) -> None:
        self.keys_values = like.new_zeros(2, num_rows, attn.num_heads, num_tokens, attn.head_dim)

    def extend(self, keys_values: Tensor, position: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Put in those of the token at `position`, (2, rows, heads, 1, head width); give the first `num`."""
        self.keys_values.index_copy_(3, position, keys_values)
        keys, values = self.keys_values[..., :num, :]
        return keys, values


class _State:
    """What the steps of a call read and write. A CUDA graph knows it by its addresses, so it is filled anew and not
    made anew."""

    def __init__(
        self, model: open_clip.CoCa, image: list[tuple[Tensor, Tensor]], numbers: Tensor, fixed: bool = False
    ) -> None:
        """`image`: keys and values of the image for every cross-attention. `numbers` (B, C, T), on the device. `fixed`:
        all steps have one shape, and do not wait."""
        self.image, self.numbers, self.fixed = image, numbers, fixed
        *shape, num_tokens = numbers.shape
        self.positions = torch.arange(num_tokens, device=numbers.device)
        self.tokens = torch.zeros(numbers.shape, dtype=torch.int64, device=numbers.device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=numbers.device)
        self.enough = torch.ones((), dtype=torch.bool, device=numbers.device)
        # Under autocast their type is not that of the weights, but that of what was computed.
        towers = model.text.transformer.resblocks, model.text_decoder.resblocks
        self.text, self.decoder = (
            [_Cache(self.ended.numel(), num_tokens, block.attn, like=image[0][0]) for block in blocks]
            for blocks in towers
        )

    def seen(self, position: Tensor) -> tuple[int, Tensor | None]:
        """How many tokens of a text the one at `position` attends to; where these are all, a mask hides those to
        come."""
        if self.fixed:
            return len(self.positions), (self.positions <= position).unsqueeze(0)
        return int(position) + 1, None

    def begin(self, image: list[tuple[Tensor, Tensor]], numbers: Tensor, sot: int, pad: int) -> None:
        for kept, given in zip(self.image, image, strict=True):
            for old, new in zip(kept, given, strict=True):
                if new is not old:
                    old.copy_(new)
        self.numbers.copy_(numbers, non_blocking=True)
        self.tokens.fill_(pad)
        self.tokens[..., 0] = sot
        self.ended.zero_()
        self.enough.fill_(True)


def _logits(model: open_clip.CoCa, tokens: Tensor, position: Tensor, state: _State) -> Tensor:
    """Tokens (B, C) at `position` (1,) -> logits (B, C, V) of the tokens after them."""
    text, decoder = model.text, model.text_decoder
    dtype = text.transformer.get_cast_dtype()
    seen = state.seen(position)
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[position].to(dtype)
    for block, cache in zip(text.transformer.resblocks, state.text, strict=True):
        x = _feed_forward(block, x + block.ls_1(_self_attention(block, x, cache, position, seen)))
    if text.cls_emb is None:  # with a class token, open_clip normalises that token alone
        x = text.ln_final(x)
    for block, cache, cross, image in zip(
        decoder.resblocks, state.decoder, decoder.cross_attn, state.image, strict=True
    ):
        x = _feed_forward(block, x + block.ls_1(_self_attention(block, x, cache, position, seen)))
        x = _feed_forward(cross, x + cross.ls_1(_cross_attention(cross, x, *image)))
    logits: Tensor = decoder.ln_final(x) @ decoder.text_projection
    return logits


def _feed_forward(block: Block, x: Tensor) -> Tensor:
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def _self_attention(
    block: Block, x: Tensor, cache: _Cache, position: Tensor, seen: tuple[int, Tensor | None]
) -> Tensor:
    """The token at `position` of every caption (B, C, W) attends to what is `seen` of its own caption -> (B, C, W)."""
    num, mask = seen
    attn: nn.MultiheadAttention = block.attn
    projected = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    heads = projected.view(-1, 1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    keys, values = cache.extend(heads[1:], position, num)
    out = F.scaled_dot_product_attention(heads[0], keys, values, mask)  # (B * C, heads, 1, head width)
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
