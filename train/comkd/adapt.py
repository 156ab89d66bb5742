"""Stage 1 of ComKD-CLIP: a teacher's prompts, trained on labelled images of a domain; the teacher stays as it is.

Source: PromptSRC (Khattak et al. 2023, arXiv 2307.06948), which ComKD-CLIP (arXiv 2408.04145) names as its way:
cross-entropy of the classes, and three terms that hold the prompted model near the frozen one. Read off its code, the
distances are means over all elements and the divergence is a sum over the batch's logits divided by their number.
Reconstructed: the views (its random crops without the flip), and an SGD momentum of 0.9, which no source at hand says.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from reinforce.config import Config, Teacher, ViewSet
from reinforce.data import augment, draws, images
from reinforce.data.shards import Sample, Status
from reinforce.errors import ConfigError, Diverged, SampleError
from reinforce.models import prompts
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import pick_device
from reinforce.models.prompts import Prompts
from reinforce.recipes import load
from train.comkd.base_to_novel import base_to_novel, check_classes, num_base
from train.evaluation.metrics import Metrics, embed_classes, embed_images
from train.evaluation.sets import EvalSet
from train.students import Student

TEMPLATE = "{}."  # what stands before the class is what the prompts learn
WARM_UP_LR = 1e-5
MOMENTUM = 0.9


class AdaptConfig(Config):
    """Stage 1 of ComKD-CLIP (train/comkd/adapt.py): a teacher's prompts. The values are PromptSRC's."""

    teacher: Teacher
    data: str = Field("", description="labelled images: a folder in CLIP_benchmark's layout, its split `train`")
    classes: Literal["all", "base"] = Field("all", description="base: the first half of the classes, rounded up")
    shots: int | None = Field(16, ge=1, description="images a class; none for all")
    views: ViewSet = Field(ViewSet(num_ops=0), description="how the images are cropped")
    num_tokens: int = Field(
        4, ge=1, description="prompts a layer, in each tower; the text's begin as 'a photo of a', CLIP's 4 tokens"
    )
    depth: int = Field(9, ge=1, description="layers with prompts")

    text_l1: float = Field(25.0, ge=0, description="weight of the texts' distance to the frozen model's")
    image_l1: float = Field(10.0, ge=0, description="weight of the images' distance to the frozen model's")
    logits_kl: float = Field(1.0, ge=0, description="weight of the logits' divergence from the frozen model's")
    average: bool = Field(True, description="the result is an average of epochs, Gaussian weights; else the last one")

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float = Field(0.005, gt=0, description="SGD with momentum; a cosine over the epochs, the first at 1e-5")
    seed: int = Field(0, ge=0)
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: a teacher without its weights, to try shapes and memory"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_sets: dict[str, str] = Field({}, description="name: folder in CLIP_benchmark's layout with the same classes")


def load_adaptation(name: str, overrides: list[str] = []) -> AdaptConfig:
    """The `ADAPTATION` of a recipe (reinforce/recipes.py), with `dotted.key=value` overrides. Raises ConfigError."""
    return load(AdaptConfig, "ADAPTATION", name, overrides)


def adapt(config: AdaptConfig, out: Path) -> dict[str, Any]:
    """Train prompts into `out`, a safetensors file; where it is there already, say what it holds.

    Raises ConfigError where the request does not fit or `out` was made with other settings, Diverged where the loss is
    no number.
    """
    asked = config.model_dump(mode="json")
    if out.exists():
        about = json.loads(prompts.about(out)["about"])
        if about.get("config") != asked:
            raise ConfigError(f"{out} was made with other settings; give another --out, or remove it")
        report: dict[str, Any] = about["report"]
        return report
    return _Adaptation(config).run(out, asked)


def regularised_loss(
    image: Tensor, text: Tensor, frozen_image: Tensor, frozen_text: Tensor, labels: Tensor, scale: float, c: AdaptConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (B, D) and classes (C, D), prompted and frozen, unit norm; `labels` (B,). The loss, and its parts before
    their weights: `cross_entropy` + text_l1 x `text_l1` + image_l1 x `image_l1` + logits_kl x `logits_kl`."""
    logits, frozen_logits = scale * image @ text.T, scale * frozen_image @ frozen_text.T
    divergence = F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="sum", log_target=True)
    parts = {
        "cross_entropy": F.cross_entropy(logits, labels),
        "text_l1": F.l1_loss(text, frozen_text),
        "image_l1": F.l1_loss(image, frozen_image),
        "logits_kl": divergence / logits.numel(),
    }
    weights = {"text_l1": c.text_l1, "image_l1": c.image_l1, "logits_kl": c.logits_kl}
    loss = torch.stack([weights.get(name, 1.0) * part for name, part in parts.items()]).sum()
    return loss, parts


def epoch_weights(epochs: int) -> list[float]:
    """Shares of epochs 1.. in the result: a Gaussian of mean 15 and deviation 1 in 20, scaled to their number."""
    mean, deviation = 15 / 20 * epochs, epochs / 20
    logs = [-0.5 * ((epoch - mean) / deviation) ** 2 for epoch in range(1, epochs + 1)]
    weights = [math.exp(log - max(logs)) for log in logs]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class _Labelled:
    key: str
    image: bytes
    size: tuple[int, int]
    label: int


class _Adaptation:
    def __init__(self, config: AdaptConfig) -> None:
        self.config = config
        if config.teacher.prompts:
            raise ConfigError("the teacher has prompts already; adapt the plain one, teacher.prompts=null")
        self.device = pick_device(config.device)
        labelled = EvalSet(config.data, "train")
        if labelled.classnames is None or labelled.prompts is None:
            raise ConfigError(f"{config.data}: its images have captions; adapting needs images with classes")
        self.classnames, self.texts = labelled.classnames, labelled.prompts
        self.eval_sets = {name: EvalSet(url) for name, url in config.eval_sets.items()}
        for eval_set in self.eval_sets.values():
            check_classes(eval_set, self.classnames, config.data)
        num_classes = len(self.classnames)
        self.num_classes = num_base(num_classes) if config.classes == "base" else num_classes
        self.samples, self.num_skipped = self._chosen(labelled)
        random_seed = config.seed if config.weights == "random" else None
        self.frozen = FrozenModel(config.teacher, self.device, random_seed)
        self.prompts = Prompts.fresh(
            self.frozen.model, config.num_tokens, config.depth, config.seed, self.frozen.tokenizer
        ).to(self.device)
        self.frozen.take(self.prompts)

    def run(self, out: Path, asked: dict[str, Any]) -> dict[str, Any]:
        with self.prompts.set_aside():
            before = self._evaluate(self.texts, self.frozen.tokenizer)
            texts = self.texts[: self.num_classes]
            frozen_text = embed_classes(self._as_student(self.frozen.tokenizer), texts, 256).to(self.device)
        metrics = self._train(frozen_text)
        after = self._evaluate([[TEMPLATE.format(name)] for name in self.classnames], self.frozen.tokenize)
        report = {
            "prompts": str(out),
            "teacher": self.config.teacher.model,
            "classes": self.num_classes,
            "images": len(self.samples),
            "skipped": self.num_skipped,
            "metrics": metrics,
            "evaluated": {name: {"frozen": before[name], "adapted": after[name]} for name in before},
        }
        about = {"config": asked, "report": report}
        prompts.save(self.prompts, out, self.config.teacher.model, self.frozen.digest, about)
        return report

    def _train(self, frozen_text: Tensor) -> dict[str, float]:
        config = self.config
        tokens = self.frozen.tokenize([TEMPLATE.format(n) for n in self.classnames[: self.num_classes]]).to(self.device)
        scale = float(self.frozen.model.logit_scale.exp())
        optimizer = torch.optim.SGD(self.prompts.parameters(), lr=config.lr, momentum=MOMENTUM)
        shares = epoch_weights(config.epochs)
        average = [torch.zeros_like(tensor) for tensor in self.prompts.parameters()]
        metrics: dict[str, float] = {}
        with tqdm(total=config.epochs, unit="epoch", disable=None) as progress:
            for epoch in range(config.epochs):
                for group in optimizer.param_groups:
                    cosine = 0.5 * config.lr * (1 + math.cos(math.pi * epoch / config.epochs))
                    group["lr"] = cosine if epoch else min(WARM_UP_LR, config.lr)
                sums: dict[str, list[float]] = defaultdict(list)
                for views, labels in self._batches(epoch):
                    pixels = self.frozen.normalise(views)
                    with self.prompts.set_aside():
                        frozen_image = self._features(self.frozen.model.encode_image, pixels).detach()
                    image = self._features(self.frozen.model.encode_image, pixels)
                    text = self._features(self.frozen.model.encode_text, tokens)
                    loss, parts = regularised_loss(image, text, frozen_image, frozen_text, labels, scale, config)
                    if not loss.isfinite():
                        raise Diverged(f"epoch {epoch}: the loss is {loss.item()}; lower lr, and start again")
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    for name, part in parts.items():
                        sums[name].append(part.item())
                for total, tensor in zip(average, self.prompts.parameters(), strict=True):
                    total += shares[epoch] * tensor.detach()
                metrics = {name: float(np.mean(values)) for name, values in sums.items()}
                progress.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()}, refresh=False)
                progress.update()
        if config.average:
            for total, tensor in zip(average, self.prompts.parameters(), strict=True):
                tensor.data.copy_(total)
        return metrics

    def _features(self, encode: Any, inputs: Tensor) -> Tensor:
        with self.frozen.autocast():
            features: Tensor = encode(inputs)
        return F.normalize(features.float(), dim=-1)

    def _chosen(self, labelled: EvalSet) -> tuple[list[_Labelled], int]:
        """`shots` images of each class, drawn by their keys, encoded as they are in the tars; and how many were bad."""
        by_class: dict[int, list[Sample]] = {label: [] for label in range(self.num_classes)}
        skipped = 0
        for sample, label in labelled.samples():
            if sample.status == Status.GOOD and label in by_class:
                by_class[label].append(sample)
            skipped += sample.status != Status.GOOD
        chosen = []
        for label, samples in by_class.items():
            samples.sort(key=lambda s: (draws.uniforms(self.config.seed, "adapt/shots", s.key, 0, 1)[0], s.key))
            good = 0
            for sample in samples:
                if good == self.config.shots:
                    break
                try:
                    picture = images.decode(sample.image)
                except SampleError:
                    skipped += 1
                    continue
                good += 1
                chosen.append(_Labelled(sample.key, sample.image, (picture.height, picture.width), label))
            if not good:
                raise ConfigError(
                    f"{labelled.url}: no good image of class {label}, '{self.classnames[label]}', in its split train; "
                    "add some, or take the class out of classnames.txt"
                )
        return chosen, skipped

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (B, px, px, 3) and labels (B,): every sample once, in an order drawn for the epoch."""
        config, px = self.config, self.frozen.image_px
        drawn = draws.uniforms(config.seed, "adapt/order", str(epoch), 0, len(self.samples))
        order = np.argsort(drawn, kind="stable")
        for start in range(0, len(order), config.batch_size):
            batch = [self.samples[i] for i in order[start : start + config.batch_size]]
            views = []
            for item in batch:
                params = augment.draw(config.views, config.seed, "adapt", item.key, epoch, item.size)
                views.append(augment.replay(images.decode(item.image), params, item.size, px))
            yield torch.from_numpy(np.stack(views)), torch.tensor([item.label for item in batch], device=self.device)

    def _as_student(self, tokenizer: Any) -> Student:
        return Student(self.config.teacher.model, Path(), self.frozen.model, tokenizer)

    def _evaluate(self, texts: list[list[str]], tokenizer: Any) -> dict[str, Metrics]:
        student, results = self._as_student(tokenizer), {}
        for name, eval_set in self.eval_sets.items():
            loaded = eval_set.load(student.preprocess_cfg)
            features = embed_images(student, loaded.images, 256)
            results[name] = base_to_novel(features, torch.tensor(loaded.truth), embed_classes(student, texts, 256))
        return results
