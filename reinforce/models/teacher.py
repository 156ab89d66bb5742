"""K frozen CLIP models: images or texts in, unit embeddings out, one array per teacher."""

import hashlib
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
from reinforce.models.frozen import FrozenModel
from reinforce.models.graph import captured


def load_teacher(config: TeacherConfig, device: torch.device, random_seed: int | None = None) -> FrozenModel:
    """A teacher's model: with the preprocessing that its settings give, and adapted where they name prompts.

    Raises ConfigError where model, weights, preprocessing and prompts do not belong together.
    """
    given = {"mean": config.image_mean, "std": config.image_std}
    frozen = FrozenModel(config, device, random_seed, {name: value for name, value in given.items() if value})
    if config.prompts:
        added = prompts.load(Path(config.prompts), config.model, frozen.digest)
        frozen.take(added.requires_grad_(False).to(device))
        frozen.digest = hashlib.sha256(f"{frozen.digest} {added.digest()}".encode()).hexdigest()
    return frozen


class Teacher:
    """One frozen CLIP. Every forward pass has the same shape: a short batch is padded and the padding dropped,
    because kernels are chosen by shape and a row's last bit can depend on the kernel. On a GPU its weights are held in
    the precision of the store, and the image tower is one CUDA graph."""

    def __init__(
        self, config: TeacherConfig, batch_size: int, device: torch.device, random_seed: int | None = None
    ) -> None:
        self.frozen = load_teacher(config, device, random_seed)
        self.batch_size = batch_size
        self.logit_scale = float(self.frozen.model.logit_scale.exp())
        self._images: Callable[[Tensor], Tensor] = self._units_of_images
        if device.type == "cuda":
            self.frozen.hold()
            side = self.image_px
            blank = torch.zeros(batch_size, side, side, 3, dtype=torch.uint8, device=device)
            with torch.inference_mode():
                self._images = captured(self._units_of_images, blank)
        self.width = self.encode_texts([""]).shape[1]

    @property
    def image_px(self) -> int:
        return self.frozen.image_px

    def encode_images(self, views: np.ndarray) -> np.ndarray:
        """uint8 (n, image_px, image_px, 3), n at most the batch size -> bfloat16 (n, D), unit norm before rounding."""
        pixels = self._padded(torch.from_numpy(views))
        with torch.inference_mode():
            return _rounded(self._images(pixels)[: len(views)])

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """n texts, at most the batch size -> bfloat16 (n, D), unit norm before rounding. Long texts are cut."""
        return _rounded(self._encode_texts(texts))

    def encode_classes(self, classes: ClassSet) -> np.ndarray:
        """bfloat16 (C, D): for each class the mean of its templates' embeddings, unit norm before rounding."""
        texts = classes.texts()
        parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        features = torch.cat([self._encode_texts(part) for part in parts])
        by_class = features.view(len(classes.classnames), -1, self.width)
        return _rounded(F.normalize(by_class.mean(1), dim=-1))

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this teacher."""
        return self.frozen.describe() | {"width": self.width, "logit_scale": self.logit_scale}

    def _units_of_images(self, pixels: Tensor) -> Tensor:
        """uint8 (batch_size, image_px, image_px, 3) -> float32 (batch_size, D), unit norm."""
        with self.frozen.autocast():
            features = self.frozen.model.encode_image(self.frozen.normalise(pixels))
        return _unit(features)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """float32 (n, D), unit norm."""
        tokens = self._padded(self.frozen.tokenize(texts))
        with torch.inference_mode(), self.frozen.autocast():
            features = self.frozen.model.encode_text(tokens.to(self.frozen.device))
        return _unit(features)[: len(texts)]

    def _padded(self, rows: Tensor) -> Tensor:
        if len(rows) == self.batch_size:
            return rows
        return torch.cat([rows, rows[-1:].expand(self.batch_size - len(rows), *rows.shape[1:])])


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _rounded(unit: Tensor) -> np.ndarray:
    return unit.to(torch.bfloat16).cpu().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
