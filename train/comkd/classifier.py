"""A student that classifies: its image encoder, ComKD-CLIP's parts on it, and a teacher's embeddings of the classes.

As a folder it is the student's open_clip folder and `comkd.safetensors` beside the weights: projector, attention,
alpha, visual prompts, the teacher's class texts and their names. The teacher itself is not needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from reinforce.errors import ConfigError, Corrupt
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
from train.export import ExportReport, Graph, Method, export
from train.students import Student
from train.students.fold import fold

FILE = "comkd.safetensors"


@dataclass(frozen=True)
class ClassTexts:
    """Names of C classes and a teacher's embeddings of them: float32 (C, D), unit norm."""

    names: list[str]
    features: Tensor


def class_texts(store_url: str, class_set: str, teacher: str) -> ClassTexts:
    """Read from a store. Raises ConfigError if it does not have them, StoreError if there is no store."""
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
    """`model` is open_clip's. `encode_image` is what evaluation asks of any model."""

    reader = "folder"

    def __init__(self, student: Student, names: list[str], head: Head, prompts: Prompts | None) -> None:
        """Raises ConfigError where the student cannot take the prompts."""
        super().__init__()
        self.student, self.names = student, names
        self.model, self.head, self.prompts = student.model, head, prompts
        if prompts is not None:
            prompts.attach(self.model)

    @property
    def visual(self) -> Any:
        """open_clip's image tower, which knows the preprocessing."""
        return self.model.visual

    @property
    def module(self) -> nn.Module:
        """All its weights."""
        return self

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

    def evaluate(
        self, sets: Mapping[str, EvalSet], batch_size: int = 256, precision: Precision = "fp32"
    ) -> dict[str, Metrics]:
        """`base_to_novel` of every set, which has to have these classes. Leaves the classifier in eval mode.

        Raises ConfigError.
        """
        self.eval()
        results = {}
        for name, eval_set in sets.items():
            check_classes(eval_set, self.names, "the student's class texts")
            loaded = eval_set.load(self.student.preprocess_cfg)
            features = embed_images(replace(self.student, model=self), loaded.images, batch_size, precision)
            metrics = base_to_novel(features, torch.tensor(loaded.truth), self.head.classes.cpu())
            results[name] = metrics | {"num_skipped": loaded.num_skipped}
        return results

    def export(self, out: Path) -> ExportReport:
        """Write its folder with the classifier as ONNX, and check it: `train.export.export`."""
        return export(self, out, load)

    def graphs(self, folded: bool) -> list[Graph]:
        """The logits, for an export."""
        module = Method(fold(self) if folded else self, "logits")
        scale = self.model.logit_scale.exp().item()
        return [Graph("logits", "classifier.onnx", module, self.student.probe(), ("images", "logits"), scale)]

    def documents(self, folder: str, checked: dict[str, Any]) -> dict[str, str]:
        """Its folder is read by this project, its graph by any."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What an application has to know of an export."""
        return self.student.facts() | {"classes": self.names}

    def save(self, folder: Path) -> None:
        """Write it as a folder that `load` reads; open_clip can read the student in it."""
        self.student.save(folder)
        tensors = {f"head/{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.prompts is not None:
            tensors |= {f"prompts/{name}": tensor for name, tensor in self.prompts.tokens.items()}
        scale = self.head.attention.scale if self.head.attention else None
        metadata = {"classnames": json.dumps(self.names), "attention_scale": json.dumps(scale)}
        tensorfile.save(tensors, folder / FILE, metadata)


def load(folder: Path) -> Classifier:
    """In eval mode, on the CPU. Raises ConfigError if the folder is not one that `save` wrote."""
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"{folder} is no folder of a student trained with comkd: it has no {FILE}; "
            + (
                f"did you mean {folder / 'student'}?"
                if (folder / "student" / FILE).is_file()
                else "`clip-train eval` is for others"
            )
        )
    student = students.create(str(folder))
    try:
        tensors, metadata = tensorfile.load(folder / FILE)
        names, scale = json.loads(metadata["classnames"]), json.loads(metadata["attention_scale"])
        head_state = tensorfile.under("head", tensors)
        head = Head(head_state["projector.first.weight"].shape[1], head_state["classes"], scale is not None, scale)
        head.load_state_dict(head_state)
    except (Corrupt, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{folder}: {FILE} cannot be used: {error}; give the folder of a student trained with comkd"
        ) from error
    tokens = tensorfile.under("prompts", tensors)
    return Classifier(student, names, head, Prompts(tokens) if tokens else None).eval()
