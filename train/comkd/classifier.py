"""A student that tells a teacher's classes apart: its image encoder, ComKD-CLIP's parts on it, and the class texts.

As a folder it is the student's open_clip folder and `comkd.safetensors` beside the weights: projector, attention,
alpha, visual prompts, the teacher's class texts and their names. Nothing of the teacher is needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reinforce.errors import ConfigError
from reinforce.models import tensorfile
from reinforce.models.open_clip import open_clip
from reinforce.models.prompts import Prompts
from reinforce.store.columns import CLASSES, class_columns
from reinforce.store.store import Store
from train import students
from train.comkd.base_to_novel import base_to_novel, check_classes
from train.comkd.terms import Head
from train.evaluation.metrics import Metrics, Precision, embed_images
from train.evaluation.sets import EvalSet
from train.students import Student

FILE = "comkd.safetensors"


@dataclass(frozen=True)
class ClassTexts:
    """Names of C classes and what a teacher says of them: float32 (C, D), unit norm."""

    names: list[str]
    features: Tensor


def class_texts(store_url: str, class_set: str, teacher: str) -> ClassTexts:
    """Those of a store. Raises ConfigError where it does not have them, StoreError where there is no store."""
    store = Store(store_url)
    recipe = store.promised().parsed_recipe()
    if class_set not in recipe.class_sets:
        has = f"has class sets {', '.join(recipe.class_sets)}" if recipe.class_sets else "has no class texts"
        raise ConfigError(
            f"{store_url} {has}, and '{class_set}' is asked for; name it in the recipe's class_sets, and reinforce "
            "into a new store"
        )
    if store.missing(CLASSES, class_columns(recipe)):
        raise ConfigError(f"{store_url}: class texts are missing; run its reinforcement again to complete them")
    names = store.read(CLASSES, f"{class_set}/name").tolist()
    features = torch.from_numpy(store.read(CLASSES, f"{class_set}/{teacher}").astype("float32"))
    return ClassTexts(names, F.normalize(features, dim=-1))


class Classifier(nn.Module):
    """`model` is open_clip's; `visual` and `encode_image` are what evaluation and export ask of any model."""

    def __init__(self, student: Student, names: list[str], head: Head, prompts: Prompts | None) -> None:
        """Raises ConfigError where the student cannot take the prompts."""
        super().__init__()
        self.student, self.names = student, names
        self.model, self.head, self.prompts = student.model, head, prompts
        if prompts is not None:
            prompts.attach(self.model)

    @property
    def visual(self) -> Any:
        return self.model.visual

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, 3, H, W), normalised -> P(u_s) and f_e, as `Head` gives them."""
        features = self.model(pixels)["image_features"].float()
        with torch.autocast(pixels.device.type, enabled=False):
            projected, fused = self.head(features)
        return projected, fused

    def encode_image(self, pixels: Tensor) -> Tensor:
        """f_e (B, D)."""
        fused: Tensor = self(pixels)[1]
        return fused

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, C): logit_scale x f_e W^T."""
        classes: Tensor = self.head.classes
        out: Tensor = self.model.logit_scale.exp() * self.encode_image(pixels) @ classes.T
        return out

    @torch.no_grad()
    def classify(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The probability of each class (n, C), of RGB pictures of any size. In eval mode."""
        cfg = open_clip.transform.PreprocessCfg(**self.student.preprocess_cfg)
        transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
        pixels = torch.stack([transform(picture) for picture in pictures])
        return self.logits(pixels.to(next(self.model.parameters()).device)).softmax(-1)

    def evaluate(self, sets: Mapping[str, EvalSet], precision: Precision = "fp32") -> dict[str, Metrics]:
        """`protocol.base_to_novel` of every set, which has to have these classes. Leaves it in eval mode.

        Raises ConfigError.
        """
        self.eval()
        results = {}
        for name, eval_set in sets.items():
            check_classes(eval_set, self.names, "the student's class texts")
            loaded = eval_set.load(self.student.preprocess_cfg)
            features = embed_images(replace(self.student, model=self), loaded.images, 256, precision)
            metrics = base_to_novel(features, torch.tensor(loaded.said), self.head.classes.cpu())
            results[name] = metrics | {"num_skipped": loaded.num_skipped}
        return results

    def save(self, folder: Path) -> None:
        """Write it as a folder that `load` reads, and open_clip the student in it."""
        students.save(self.student, folder)
        tensors = {f"head/{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.prompts is not None:
            tensors |= {f"prompts/{name}": tensor for name, tensor in self.prompts.tokens.items()}
        scale = self.head.attention.scale if self.head.attention else None
        metadata = {"classnames": json.dumps(self.names), "attention_scale": json.dumps(scale)}
        tensorfile.save(tensors, folder / FILE, metadata)


def load(folder: Path) -> Classifier:
    """In eval mode, on the CPU. Raises ConfigError where the folder is not one that `save` wrote."""
    student = students.create(str(folder))
    try:
        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        names, scale = json.loads(metadata["classnames"]), json.loads(metadata["attention_scale"])
        head_state = _of("head", tensors)
        head = Head(head_state["projector.first.weight"].shape[1], head_state["classes"], scale is not None, scale)
        head.load_state_dict(head_state)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{folder}: {FILE} cannot be used: {error}; give the folder of a student trained with comkd"
        ) from error
    tokens = _of("prompts", tensors)
    return Classifier(student, names, head, Prompts(tokens) if tokens else None).eval()


def _of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
