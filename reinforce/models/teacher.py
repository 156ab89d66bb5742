"""A frozen model: images or texts in, unit embeddings out."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reinforce.config import ClassSet
from reinforce.config import Teacher as TeacherConfig
from reinforce.models import prompts
from reinforce.models.device import send
from reinforce.models.frozen import FrozenModel
from reinforce.models.graph import captured


def load_teacher(config: TeacherConfig, device: torch.device, random_seed: int | None = None) -> FrozenModel:
    """A teacher's model: with the preprocessing that its settings give, and adapted where they name prompts.

    Raises ConfigError where model, weights, preprocessing and prompts do not belong together.
    """
    given: dict[str, Any] = {"mean": config.image_mean, "std": config.image_std}
    given = {name: value for name, value in given.items() if value}
    frozen = FrozenModel(config, device, random_seed, given, config.image_px)
    if config.prompts:
        added = prompts.load(Path(config.prompts), config.model, frozen.digest)
        frozen.take(added.requires_grad_(False).to(device))
        frozen.digest = hashlib.sha256(f"{frozen.digest} {added.digest()}".encode()).hexdigest()
    return frozen


class Teacher:
    """One frozen CLIP, or an image encoder that reads no texts. Every forward pass has the same shape: a short batch is
    padded and the padding dropped, because kernels are chosen by shape and a row's last bit can depend on the kernel.
    On a GPU its weights are held in the precision of the store, and the image tower is one CUDA graph."""

    def __init__(
        self, config: TeacherConfig, batch_size: int, device: torch.device, random_seed: int | None = None
    ) -> None:
        self.frozen = load_teacher(config, device, random_seed)
        self.batch_size, self.device = batch_size, device
        self.reads_texts = config.reads_texts
        model = self.frozen.model
        self.logit_scale = float(model.logit_scale.exp()) if self.reads_texts else math.nan
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias)
        if device.type != "cpu":
            self.frozen.hold()
        self._image_tower: Callable[[Tensor], Tensor] = self._encode_image
        if device.type == "cuda":
            blank = torch.zeros(batch_size, self.image_px, self.image_px, 3, dtype=torch.uint8, device=device)
            with torch.inference_mode():
                self._image_tower = captured(self._encode_image, blank)
        blank_image = np.zeros((1, self.image_px, self.image_px, 3), np.uint8)
        self.width = (self.encode_texts([""]) if self.reads_texts else self.encode_images(blank_image)).shape[1]

    @property
    def image_px(self) -> int:
        return self.frozen.image_px

    @property
    def vocabulary(self) -> str:
        """Teachers that have it in common make the same tokens of a text."""
        return self.frozen.vocabulary

    def encode_images(self, views: np.ndarray) -> np.ndarray:
        """uint8 (n, image_px, image_px, 3), n at most the batch size -> bfloat16 (n, D), unit norm before rounding."""
        units = self.units_of_images(send(self.padded(views), self.device))
        return _rounded(units[: len(views)])

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """n texts, at most the batch size -> bfloat16 (n, D), unit norm before rounding. Long texts are cut."""
        return _rounded(self._units(texts))

    def encode_classes(self, classes: ClassSet) -> np.ndarray:
        """bfloat16 (C, D): for each class the mean of its templates' embeddings, unit norm before rounding."""
        texts = classes.texts()
        parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        by_class = torch.cat([self._units(part) for part in parts]).view(len(classes.classnames), -1, self.width)
        return _rounded(F.normalize(by_class.mean(1), dim=-1))

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this teacher. `logit_scale` multiplies similarities; a SigLIP adds its `logit_bias`
        to that, and takes the sigmoid where a CLIP takes the softmax."""
        said = self.frozen.describe() | {"width": self.width}
        if self.reads_texts:
            said["logit_scale"] = self.logit_scale
        if self.logit_bias is not None:
            said["logit_bias"] = self.logit_bias
        return said

    @torch.inference_mode()
    def units_of_images(self, pixels: Tensor) -> Tensor:
        """uint8 (batch_size, image_px, image_px, 3) on the device -> float32 (batch_size, D), unit norm; overwritten by
        the next call."""
        return self._image_tower(pixels)

    @torch.inference_mode()
    def units_of_texts(self, tokens: Tensor) -> Tensor:
        """Tokens (batch_size, T) on the device -> float32 (batch_size, D), unit norm."""
        with self.frozen.autocast():
            return _unit(self.frozen.model.encode_text(tokens))

    def tokens(self, texts: list[str]) -> np.ndarray:
        """n texts, at most the batch size -> int64 (batch_size, T)."""
        return self.padded(self.frozen.tokenize(texts).numpy())

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """(n, ..) -> (batch_size, ..), by repeating the last row."""
        if len(rows) == self.batch_size:
            return rows
        return np.concatenate([rows, np.repeat(rows[-1:], self.batch_size - len(rows), axis=0)])

    def _encode_image(self, pixels: Tensor) -> Tensor:
        with self.frozen.autocast():
            return _unit(self.frozen.model.encode_image(self.frozen.normalise(pixels)))

    def _units(self, texts: list[str]) -> Tensor:
        """float32 (n, D), unit norm."""
        return self.units_of_texts(send(self.tokens(texts), self.device))[: len(texts)]


def as_bfloat16(tensor: Tensor) -> np.ndarray:
    """A bfloat16 tensor on the host as an array, without a copy."""
    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _rounded(unit: Tensor) -> np.ndarray:
    return as_bfloat16(unit.to(torch.bfloat16).cpu())
