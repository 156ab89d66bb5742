"""A model of open_clip or an image encoder of timm, loaded, checked, and named by a digest of its weights. Teachers and
captioners are both one."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reinforce import process
from reinforce.config import TIMM, Model
from reinforce.errors import ConfigError
from reinforce.models import tensorfile, timm, vit
from reinforce.models.open_clip import open_clip
from reinforce.models.pixels import Normaliser
from reinforce.models.prompts import Prompts
from reinforce.models.tokenizer import get_tokenizer
from reinforce.models.weights import OFFLINE, loading

_CONFIG = "open_clip_config.json"
SCHEMAS = ("local-dir:", "hf-hub:")
QUICK = 1.702  # of open_clip's QuickGELU
log = logging.getLogger(__name__)


class FrozenModel:
    """A model that only answers: weights, tokenizer (none, where it reads no texts), preprocessing and precision as
    loaded.

    Raises ConfigError where model, weights and preprocessing do not belong together.
    """

    def __init__(
        self,
        config: Model,
        device: torch.device,
        random_seed: int | None = None,
        preprocess: dict[str, Any] = {},
        image_px: int | None = None,
    ) -> None:
        """`random_seed`: initialise the architecture from it and read no weights. `preprocess`: a `mean` or `std` in
        place of the one that comes with the weights; `image_px`: likewise, for images of this side."""
        self.name = config.model
        self.device = device
        self.precision = config.precision
        if config.precision == "auto":
            self.precision = "bf16" if device.type == "cuda" else "fp32"
        _check(config, random_seed)
        self.model = _create(config, random_seed, preprocess, image_px)
        self.weights = "random" if random_seed is not None else "pretrained"
        self.digest = weights_digest(self.model)
        self.prompts: Prompts | None = None
        self.model.eval().requires_grad_(False).to(device)
        self.tokenizer: Any = None if config.model.startswith(TIMM) else get_tokenizer(config.model)
        self.preprocess_cfg: dict[str, Any] = dict(self.model.visual.preprocess_cfg)
        self.image_px = _square(config, self.preprocess_cfg["size"])
        self._normaliser = Normaliser(self.preprocess_cfg).to(device)
        self.dtype = torch.float32  # of the weights, and of what goes into the image tower

    def take(self, added: Prompts) -> None:
        """Let both towers see prompts, and texts make room for them. Raises ConfigError where they do not fit."""
        added.attach(self.model)
        self.prompts = added

    def hold(self) -> None:
        """Hold the weights in the precision that the manifest promises, where that is bf16: autocast casts frozen
        weights anew in every forward pass, and makes norms pass through float32. What is held is computed in fewer
        passes, too (vit.py).

        Not with prompts, which are float32, and not with BatchNorm, whose statistics bf16 is too coarse for.
        """
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        if self.precision == "bf16" and not self.prompts and not norms:
            for module in self.model.modules():
                if isinstance(module, open_clip.transformer.ResidualAttentionBlock):
                    _quick_gelu_as_silu(module.mlp)
            scalars = {
                name: p.data for name, p in self.model.named_parameters() if name in ("logit_scale", "logit_bias")
            }
            self.dtype = torch.bfloat16
            self.model.to(self.dtype)
            for name, value in scalars.items():
                getattr(self.model, name).data = value
            vit.quicken(self.model)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) on any device -> (B, 3, H, W) on the model's, in the units it was trained in."""
        normalised: Tensor = self._normaliser(pixels.to(self.device).permute(0, 3, 1, 2))
        return normalised.to(self.dtype)

    def tokenize(self, texts: list[str]) -> Tensor:
        """n texts -> token ids (n, T), with room for the prompts where there are some. Long texts are cut."""
        tokens: Tensor = self.tokenizer(texts)
        return self.prompts.make_room(tokens) if self.prompts else tokens

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic the manifest promises: fp32, weights that are held in bf16, or bf16 autocast."""
        if self.precision == "bf16" and self.dtype == torch.float32:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @functools.cached_property
    def vocabulary(self) -> str:
        """What decides the tokens of a text. No two models with prompts have it in common."""
        text_cfg = _model_cfg(self.name)["text_cfg"]
        settings = {name: value for name, value in text_cfg.items() if "token" in name or name == "context_length"}
        return _hash([settings, self._words, self.prompts and self.digest])

    @functools.cached_property
    def _words(self) -> str:
        return _hash(_vocabulary(self.tokenizer))

    def describe(self) -> dict[str, Any]:
        """What about this model decides the bytes it writes."""
        has_words = self.tokenizer is not None
        said = {
            "weights": self.weights,
            "weights_sha256": self.digest,
            "precision": self.precision,
            "image_px": self.image_px,
            "mean": list(self.preprocess_cfg["mean"]),
            "std": list(self.preprocess_cfg["std"]),
            "tokenizer": type(self.tokenizer).__name__ if has_words else None,
            "vocab_size": _vocab_size(self.tokenizer) if has_words else None,
            "context_length": self.tokenizer.context_length if has_words else None,
            "architecture": _hash(_model_cfg(self.name)),
            "preprocessing": _hash({k: self.preprocess_cfg.get(k) for k in ("interpolation", "resize_mode")}),
            "vocabulary": self._words if has_words else None,
        }
        return {name: value for name, value in said.items() if value is not None}


@torch.no_grad()
def _quick_gelu_as_silu(mlp: Any) -> None:
    """`x sigmoid(a x)` is `silu(a x) / a`: with the factors in the weights on both sides the activation is one kernel
    where it was three, each of which reads and writes the widest tensor of the block."""
    if isinstance(mlp.gelu, open_clip.transformer.QuickGELU):
        mlp.c_fc.weight *= QUICK
        mlp.c_fc.bias *= QUICK
        mlp.c_proj.weight /= QUICK
        mlp.gelu = nn.SiLU()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights, whatever file they came from."""
    return tensorfile.digest(model.state_dict())


def _model_cfg(name: str) -> Any:
    """What is built: sizes, activation, heads; weights do not tell all of that."""
    if name.startswith(TIMM):
        return timm.architecture(name)
    if name.startswith("hf-hub:"):
        path = open_clip.pretrained.download_pretrained_from_hf(name.removeprefix("hf-hub:"), filename=_CONFIG)
    elif name.startswith("local-dir:"):
        path = f"{name.removeprefix('local-dir:')}/{_CONFIG}"
    else:
        return open_clip.get_model_config(name)
    return json.loads(Path(path).read_text())["model_cfg"]


def embedding_width(config: Model) -> int | None:
    """D, as its architecture says, or None where that is not at hand."""
    if config.model.startswith((TIMM, "hf-hub:")):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        return (_model_cfg(config.model) or {}).get("embed_dim")  # type: ignore[no-any-return]
    return None


def _vocabulary(tokenizer: Any) -> Any:
    """Words with their ids, and merges in their order where the tokenizer is open_clip's own."""
    words = tokenizer.encoder if hasattr(tokenizer, "encoder") else tokenizer.tokenizer.get_vocab()
    return [sorted(words.items()), sorted(getattr(tokenizer, "bpe_ranks", {}).items())]


def _vocab_size(tokenizer: Any) -> int:
    """Of open_clip's own tokenizer, or of one of transformers'."""
    return int(tokenizer.vocab_size if hasattr(tokenizer, "vocab_size") else len(tokenizer.tokenizer))


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


def _check(config: Model, random_seed: int | None) -> None:
    """What can be known to be wrong before anything is downloaded or built."""
    if config.model.startswith(TIMM):
        timm.check(config)
        return
    if config.model.startswith(SCHEMAS):
        if config.pretrained:
            raise ConfigError(f"{config.model} brings its own weights; remove pretrained={config.pretrained}")
        folder = config.model.removeprefix("local-dir:")
        if config.model.startswith("local-dir:") and not Path(folder, _CONFIG).is_file():
            raise ConfigError(
                f"no {_CONFIG} in {os.path.abspath(folder)}: not an open_clip model folder. Paths are "
                "relative to where you run; the bundled models are in samples/ of a checkout of this project"
            )
        return
    if config.model not in open_clip.list_models():
        raise ConfigError(
            f"open_clip has no model '{config.model}'; its names: "
            "python -c 'from reinforce.models.open_clip import open_clip; print(open_clip.list_models())'"
        )
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained) if config.pretrained else {}
    if tag:
        _check_activation(config, bool(tag.get("quick_gelu", False)))
    elif random_seed is None and _is_torchscript(config):
        _check_activation(config, True)
    elif random_seed is None and not (config.pretrained and os.path.isfile(config.pretrained)):
        tags = open_clip.list_pretrained_tags_by_model(config.model)
        raise ConfigError(
            f"{config.model}: '{config.pretrained}' is neither a file nor a tag; tags: {', '.join(tags)}; {OFFLINE}"
        )
    elif random_seed is None:
        base, dash, _ = config.model.partition("-quickgelu")
        if f"{base}-quickgelu" in open_clip.list_models():
            log.warning(
                "%s,%s runs with %s: a file does not say what its weights were trained with (OpenAI's, DFN's and "
                "MetaCLIP's were with QuickGELU); if with the other, the model is %s",
                *(config.model, config.pretrained),
                *(("QuickGELU", base) if dash else ("GELU", f"{base}-quickgelu")),
            )


def _check_activation(config: Model, weights_quick_gelu: bool) -> None:
    # open_clip only warns, and then runs a teacher that differs from the one that was trained.
    model_quick_gelu = bool((open_clip.get_model_config(config.model) or {}).get("quick_gelu", False))
    if model_quick_gelu != weights_quick_gelu:
        trained = "QuickGELU" if weights_quick_gelu else "GELU"
        other = f"{config.model}-quickgelu" if weights_quick_gelu else config.model.removesuffix("-quickgelu")
        raise ConfigError(
            f"{config.model},{config.pretrained}: the weights were trained with {trained} "
            f"and the model would run with the other; use {other},{config.pretrained}"
        )


def _create(config: Model, random_seed: int | None, given: dict[str, Any], image_px: int | None) -> Any:
    if config.model.startswith(TIMM):
        model: Any = timm.create(config, random_seed, image_px)
        model.visual.preprocess_cfg |= given
    else:
        model = _create_open_clip(config, random_seed, given, image_px)
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise ConfigError(f"{config.model},{config.pretrained}: the weights hold NaN or infinity; get the file again")
    return model


def _create_open_clip(config: Model, random_seed: int | None, given: dict[str, Any], image_px: int | None) -> Any:
    preprocess: dict[str, Any] = {}
    if random_seed is not None and config.pretrained:
        tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
        preprocess = {k: tag[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in tag}
    if random_seed is not None:
        torch.manual_seed(random_seed)
    process.timm_without_warnings()
    script = random_seed is None and _is_torchscript(config)
    reads = random_seed is None and not script
    with loading(config):
        model = open_clip.create_model(
            config.model,
            pretrained=config.pretrained if reads else None,
            load_weights=reads,
            require_pretrained=reads,
            pretrained_text=False,
            force_image_size=image_px,
            force_preprocess_cfg=preprocess | given,
        )
        if script:
            weights = open_clip.load_openai_model(str(config.pretrained), "fp32", "cpu").state_dict()
            open_clip.model.resize_pos_embed(weights, model)
            model.load_state_dict(weights)
    if random_seed is not None and isinstance(model, open_clip.CoCa):
        head = model.text_decoder.text_projection  # open_clip leaves it as the memory was
        nn.init.normal_(head, std=6 * head.shape[0] ** -0.5)  # so spread, a nucleus is small, as that of a trained one
    return model


def _is_torchscript(config: Model) -> bool:
    """Whether its file is a TorchScript archive, as OpenAI's own are: trained with QuickGELU, and read by no other
    door of open_clip's."""
    if not config.pretrained or not zipfile.is_zipfile(config.pretrained):
        return False
    with zipfile.ZipFile(config.pretrained) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _square(config: Model, size: int | tuple[int, int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ConfigError(f"{config.model} takes {height} x {width} images; only square ones are supported")
    return height
