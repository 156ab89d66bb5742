"""Learnable tokens in the towers of a frozen CLIP: what adapts a teacher to a domain, kept as one small file.

Source: independent vision-language prompting as PromptSRC uses it (Khattak et al. 2023, arXiv 2307.06948; its teachers:
4 + 4 tokens, depth 9). In the image tower the tokens stand behind the patches; in the text tower behind the start
token, as if these words stood before every text. At each of the first `depth` layers their places are filled anew.

The open_clip model stays as it is: the tokens come in through hooks on its modules.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from reinforce.errors import ConfigError, Corrupt
from reinforce.models import tensorfile
from reinforce.models.open_clip import open_clip

CONTEXT = "a photo of a"  # the words that a text's tokens begin as
STD = 0.02  # of the normal distribution that the other tokens are drawn from
_KIND = "clip-reinforce prompts"


class Prompts(nn.Module):
    """`image` (layers, n, width) and `text` (layers, n, width), either of which may be absent."""

    def __init__(self, tokens: dict[str, Tensor]) -> None:
        super().__init__()
        self.tokens = nn.ParameterDict(tokens)
        self._active = True

    @classmethod
    def fresh(cls, model: Any, num_tokens: int, depth: int, seed: int, tokenizer: Any = None) -> Self:
        """New ones for an open_clip model, for its text tower too where a tokenizer is given; fewer layers than `depth`
        where the tower has fewer. Raises ConfigError where a tower cannot take them."""
        drawn = torch.Generator().manual_seed(seed)

        def draw(layers: nn.ModuleList, width: int) -> Tensor:
            return STD * torch.randn(min(depth, len(layers)), num_tokens, width, generator=drawn)

        visual = _image_tower(model)
        tokens = {"image": draw(visual.transformer.resblocks, visual.transformer.width)}
        if tokenizer is not None:
            tower = _text_tower(model)
            tokens["text"] = draw(tower.transformer.resblocks, tower.transformer.width)
            words = tokenizer([CONTEXT])[0]
            words = words[1 : int(words.argmax())][:num_tokens]  # between start and end
            with torch.no_grad():
                tokens["text"][0, : len(words)] = tower.token_embedding(words.to(tower.token_embedding.weight.device))
        return cls(tokens)

    def attach(self, model: Any) -> None:
        """Let the towers of this model see the tokens from now on. Raises ConfigError where they do not fit."""
        for tower_name, tower in (("image", _image_tower), ("text", _text_tower)):
            if tower_name in self.tokens:
                self._attach(tower_name, tower(model))

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """The model without its prompts, for a while."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def make_room(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) with places behind the start token, the rest moved back; what falls off the end is lost, but
        for the end token."""
        if "text" not in self.tokens:
            return tokens
        num = self.tokens["text"].shape[1]
        # The start token stands in for the words: the pooling looks for the end token, the largest number.
        moved = torch.cat([tokens[:, :1].expand(-1, num + 1), tokens[:, 1:-num]], 1)
        end = tokens.amax(1)
        moved[:, -1] = torch.where((moved == end[:, None]).any(1), moved[:, -1], end)
        return moved

    def digest(self) -> str:
        """SHA-256 of all tokens."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tokens.items()):
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _attach(self, tower_name: str, tower: Any) -> None:
        layers, num, width = self.tokens[tower_name].shape
        blocks = tower.transformer.resblocks
        if width != tower.transformer.width or layers > len(blocks):
            raise ConfigError(
                f"prompts of {layers} layers and width {width} do not fit an {tower_name} tower of "
                f"{len(blocks)} layers and width {tower.transformer.width}; they belong to another model"
            )
        if tower_name == "image":
            # Before this norm, as published: the first layer's tokens go through it like the patches.
            tower.ln_pre.register_forward_pre_hook(self._append)
            tower.transformer.register_forward_hook(functools.partial(self._remove, num))
        else:
            tower.token_embedding.register_forward_hook(self._embed)
        replace = self._replace_last if tower_name == "image" else self._replace_first
        for layer in range(1, layers):
            blocks[layer].register_forward_pre_hook(functools.partial(replace, layer))

    def _append(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (torch.cat([args[0], self._of("image", 0, args[0])], 1), *args[1:]) if self._active else None

    def _replace_last(self, layer: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._active:
            return None
        tokens = self._of("image", layer, args[0])
        return (torch.cat([args[0][:, : -tokens.shape[1]], tokens], 1), *args[1:])

    def _remove(self, num: int, _: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor | None:
        return x[:, :-num] if self._active else None

    def _embed(self, _: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor | None:
        return self._with_first(0, x) if self._active else None

    def _replace_first(self, layer: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._with_first(layer, args[0]), *args[1:]) if self._active else None

    def _with_first(self, layer: int, x: Tensor) -> Tensor:
        tokens = self._of("text", layer, x)
        return torch.cat([x[:, :1], tokens, x[:, 1 + tokens.shape[1] :]], 1)

    def _of(self, tower_name: str, layer: int, x: Tensor) -> Tensor:
        tokens: Tensor = self.tokens[tower_name][layer]
        return tokens.to(x.dtype).expand(x.shape[0], -1, -1)  # not len: an export would fix it


def save(prompts: Prompts, path: Path, model: str, weights_sha256: str, about: dict[str, Any]) -> None:
    """One safetensors file beside the name and the digest of the frozen model; `about`: how they were made."""
    tensors = {name: tensor.float() for name, tensor in prompts.tokens.items()}
    metadata = {"kind": _KIND, "model": model, "weights_sha256": weights_sha256, "about": json.dumps(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensorfile.save(tensors, path, metadata)


def about(path: Path) -> dict[str, str]:
    """What a file of prompts says of itself: `model`, `weights_sha256`, `about`. Raises ConfigError."""
    return _read(path)[0]


def load(path: Path, model: str, weights_sha256: str) -> Prompts:
    """Raises ConfigError where the file is none of ours, or belongs to other weights than these of `model`."""
    metadata, tensors = _read(path)
    if metadata["weights_sha256"] != weights_sha256:
        raise ConfigError(
            f"{path}: these prompts were trained with {metadata['model']} (weights {metadata['weights_sha256'][:12]}) "
            f"and {model} has other weights ({weights_sha256[:12]}); give them their own model, or adapt this one"
        )
    return Prompts(tensors)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        tensors, metadata = tensorfile.load(path)
    except Corrupt as error:
        raise ConfigError(f"prompts {error}; make them with: clip-train adapt") from error
    if metadata.get("kind") != _KIND:
        raise ConfigError(f"{path} holds no prompts; make them with: clip-train adapt")
    return metadata, tensors


def _image_tower(model: Any) -> Any:
    tower = model.visual
    if not isinstance(tower, open_clip.transformer.VisionTransformer):
        raise ConfigError(f"prompts need an image tower that is open_clip's ViT; this one is a {type(tower).__name__}")
    return tower


def _text_tower(model: Any) -> Any:
    tower = getattr(model, "text", model)  # of open_clip's CLIP the model is the text tower itself
    pooling = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if (
        not hasattr(tower, "transformer")
        or pooling not in ("argmax", "eos")
        or getattr(tower, "cls_emb", None) is not None
    ):
        raise ConfigError(
            f"prompts need a text tower that is open_clip's transformer, pooled at its end token; this one is a "
            f"{type(tower).__name__}" + (f" pooled by '{pooling}'" if pooling else "")
        )
    return tower
