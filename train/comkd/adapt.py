"""Stage 1 of ComKD-CLIP: a teacher's prompts, trained on labelled images of a domain; the teacher stays as it is.

Source: PromptSRC (Khattak et al. 2023, arXiv 2307.06948), which ComKD-CLIP (arXiv 2408.04145) names as its way:
cross-entropy of the classes, and three terms that hold the prompted model near the frozen one. Read off its code, the
distances are means over all elements and the divergence is a sum over the batch's logits divided by their number.
Reconstructed: the views (its random crops without the flip), and an SGD momentum of 0.9, which no source at hand says.
"""

import hashlib
import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from reinforce.config import Address, Teacher, ViewSet
from reinforce.data import augment, draws, images
from reinforce.errors import ConfigError
from reinforce.models import prompts
from reinforce.models.device import pick_device
from reinforce.models.prompts import Prompts
from reinforce.models.teacher import load_teacher
from reinforce.recipes import load
from train import checkpoint
from train.average import Average
from train.comkd.base_to_novel import base_to_novel, check_classes, num_base
from train.comkd.shots import Labelled, draw_shots
from train.config import LARGEST_RATE, LARGEST_SEED, LoopConfig
from train.distributed import Ranks
from train.evaluation.folder import NSHARDS, Folder
from train.evaluation.metrics import Metrics, embed_classes, embed_images
from train.evaluation.sets import EvalSet
from train.folder import check_folder, say_ended
from train.logs import check_reporters
from train.loop import Ended, Training
from train.students import Student

TEMPLATE = "{}."  # what stands before the class is what the prompts learn
WARM_UP_LR = 1e-5
MOMENTUM = 0.9


class AdaptConfig(LoopConfig):
    """Stage 1 of ComKD-CLIP (train/comkd/adapt.py): a teacher's prompts. The values are PromptSRC's."""

    teacher: Teacher | None = Field(None, description="the CLIP to adapt; there is no default")
    data: Address = Field("", description="labelled images: a folder in CLIP_benchmark's layout, its split `train`")
    classes: Literal["all", "base"] = Field("all", description="base: the first half of the classes, rounded up")
    shots: int | None = Field(16, ge=1, description="images per class; null for all")
    views: ViewSet = Field(ViewSet(num_ops=0), description="how the images are cropped")
    num_tokens: int = Field(
        4,
        ge=1,
        description="prompts per layer, in each tower; those of the text begin as 'a photo of a', 4 tokens in CLIP",
    )
    depth: int = Field(9, ge=1, description="layers with prompts")

    text_l1: float = Field(25.0, ge=0, description="weight of the texts' distance to the frozen model's")
    image_l1: float = Field(10.0, ge=0, description="weight of the images' distance to the frozen model's")
    logits_kl: float = Field(1.0, ge=0, description="weight of the logits' divergence from the frozen model's")
    average: bool = Field(True, description="the result is an average of epochs, Gaussian weights; else the last one")

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float = Field(
        0.005, gt=0, le=LARGEST_RATE, description="SGD with momentum; a cosine over the epochs, the first at 1e-5"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: a teacher without its weights, to try shapes and memory"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_sets: dict[str, Address] = Field(
        {}, description="name: folder in CLIP_benchmark's layout with the same classes"
    )
    save_every_n_steps: int = Field(100, ge=1)


def load_adaptation(name: str, overrides: list[str] = []) -> AdaptConfig:
    """The `ADAPTATION` of a recipe (reinforce/recipes.py), with `dotted.key=value` overrides. Raises ConfigError."""
    return load(AdaptConfig, "ADAPTATION", name, overrides)


def adapt(config: AdaptConfig, out: Path) -> dict[str, Any]:
    """Train prompts into `out`, a safetensors file; where it is there already, say what it holds.

    Its run lies beside it, in a folder of the same name without the suffix: `config.json`, `metrics.jsonl`,
    `checkpoints/`. Called again after it was stopped, it goes on from there.

    Raises ConfigError where the request does not fit or `out` was made with other settings, Diverged where the loss is
    NaN or infinite.
    """
    folder = out.with_suffix("")
    if out.exists():
        about = json.loads(prompts.about(out)["about"])
        if found := checkpoint.differences(about.get("config", {}), config, out):
            raise ConfigError(
                f"{out} was made with other settings:",
                *found,
                f"Give another --out, or remove it and the folder {folder}.",
            )
        report: dict[str, Any] = about["report"]
        say_ended(out)
        return report
    if folder == out:
        raise ConfigError(f"--out {out}: end it in .safetensors; the folder of the run has the name without that")
    check_folder(folder)
    adaptation = _Adaptation(config, folder)
    return adaptation.keep(adaptation.run(adaptation.resume()), out)


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
class _Batch:
    """`views` uint8 (B, px, px, 3) and `labels` int64 (B,)."""

    keys: list[str]
    views: Tensor
    labels: Tensor


class _Adaptation(Training[_Batch]):
    def __init__(self, config: AdaptConfig, out: Path) -> None:
        self.config: AdaptConfig = config
        self.out, self.ranks = out, Ranks(0, 1, pick_device(config.device))
        check_reporters(config)
        if config.teacher is None:
            raise ConfigError("name the CLIP to adapt: --teacher MODEL --pretrained WEIGHTS, or a recipe that names it")
        self.teacher = config.teacher
        if self.teacher.prompts:
            raise ConfigError("the teacher has prompts already; adapt the plain one, teacher.prompts=null")
        if not Folder(config.data).exists(f"train/{NSHARDS}"):
            raise ConfigError(
                f"{config.data}/train/{NSHARDS}: not found; labelled images to adapt with are a folder in "
                "CLIP_benchmark's layout with a split `train`; see docs/comkd.md"
            )
        labelled = EvalSet(config.data, "train")
        if labelled.classnames is None or labelled.prompts is None:
            raise ConfigError(f"{config.data}: its images have captions; adapting needs images with classes")
        self.classnames, self.texts = labelled.classnames, labelled.prompts
        self.eval_sets = {name: EvalSet(url) for name, url in config.eval_sets.items()}
        for eval_set in self.eval_sets.values():
            check_classes(eval_set, self.classnames, config.data)
        num_classes = len(self.classnames)
        self.num_classes = num_base(num_classes) if config.classes == "base" else num_classes
        learned = self.classnames[: self.num_classes]
        self.samples, self.num_skipped = draw_shots(labelled, learned, config.shots, config.seed)
        random_seed = config.seed if config.weights == "random" else None
        self.frozen = load_teacher(self.teacher, self.ranks.device, random_seed)
        self.fingerprint = self._fingerprint()
        self.model: Prompts = Prompts.fresh(
            self.frozen.model, config.num_tokens, config.depth, config.seed, self.frozen.tokenizer
        ).to(self.ranks.device)
        self.frozen.take(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=MOMENTUM)
        self.steps_per_epoch = -(-len(self.samples) // config.batch_size)
        self.num_steps, self.samples_per_step = config.epochs * self.steps_per_epoch, config.batch_size
        self.average = Average(self.model, self._share) if config.average else None
        self.tokens = self.frozen.tokenize([TEMPLATE.format(name) for name in learned]).to(self.ranks.device)
        with self.model.set_aside():
            student, texts = self._as_student(self.frozen.tokenizer), self.texts[: self.num_classes]
            self.frozen_text = embed_classes(student, texts, 256).to(self.ranks.device)

    def describe(self) -> str:
        return (
            f"prompts of {self.teacher.model} on {self.ranks.device}: {len(self.samples)} images of "
            f"{self.num_classes} classes, {self.num_skipped} left out"
        )

    def batches(self, step: int) -> Generator[list[_Batch], None, None]:
        """In an epoch every sample once, in an order drawn for it."""
        for at in range(step, self.num_steps):
            epoch, number = divmod(at, self.steps_per_epoch)
            drawn = draws.uniforms(self.config.seed, "adapt/order", str(epoch), 0, len(self.samples))
            start = number * self.config.batch_size
            order = np.argsort(drawn, kind="stable")[start : start + self.config.batch_size]
            yield [self._batch([self.samples[i] for i in order], epoch)]

    def lr_at(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        if not epoch:
            return min(WARM_UP_LR, self.config.lr)
        return 0.5 * self.config.lr * (1 + math.cos(math.pi * epoch / self.config.epochs))

    def backward(self, pieces: list[_Batch], step: int) -> dict[str, Tensor]:
        [batch] = pieces
        pixels, labels = self.frozen.normalise(batch.views), batch.labels.to(self.ranks.device)
        with self.model.set_aside():
            frozen_image = self._features(self.frozen.model.encode_image, pixels).detach()
        image = self._features(self.frozen.model.encode_image, pixels)
        text = self._features(self.frozen.model.encode_text, self.tokens)
        scale = float(self.frozen.model.logit_scale.exp())
        loss, parts = regularised_loss(image, text, frozen_image, self.frozen_text, labels, scale, self.config)
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: part.detach() for name, part in parts.items()} | {"loss": loss.detach()}

    def evaluate(self) -> dict[str, Metrics]:
        return self._scores([[TEMPLATE.format(name)] for name in self.classnames], self.frozen.tokenize)

    def keep(self, ended: Ended, out: Path) -> dict[str, Any]:
        """Write the prompts, and what there is to say of them."""
        with self.model.set_aside():
            frozen = self._scores(self.texts, self.frozen.tokenizer)
        report = {
            "prompts": str(out),
            "teacher": self.teacher.model,
            "classes": self.num_classes,
            "images": len(self.samples),
            "skipped": self.num_skipped,
            "metrics": ended.metrics,
            "evaluated": {name: {"frozen": frozen[name], "adapted": ended.evaluated[name]} for name in frozen},
        }
        about = {"config": self.config.model_dump(mode="json"), "report": report}
        with self.averaged():
            prompts.save(self.model, out, self.teacher.model, self.frozen.digest, about)
        return report

    def _share(self, step: int) -> float:
        """Of the newest weights in the average after a step: those at the end of an epoch count."""
        epoch, number = divmod(step, self.steps_per_epoch)
        weights = epoch_weights(self.config.epochs)[: epoch + 1]
        return weights[-1] / sum(weights) if number == self.steps_per_epoch - 1 else 0.0

    def _fingerprint(self) -> str:
        """Of the teacher, the classes and the images."""
        digest = hashlib.sha256(f"{self.frozen.digest};{self.classnames};".encode())
        for sample in self.samples:
            digest.update(f"{sample.key} {sample.label};".encode() + hashlib.sha256(sample.image).digest())
        return digest.hexdigest()

    def _features(self, encode: Any, inputs: Tensor) -> Tensor:
        with self.frozen.autocast():
            features: Tensor = encode(inputs)
        return F.normalize(features.float(), dim=-1)

    def _batch(self, samples: list[Labelled], epoch: int) -> _Batch:
        views = []
        for sample in samples:
            params = augment.draw(self.config.views, self.config.seed, "adapt", sample.key, epoch, sample.size)
            views.append(augment.replay(images.decode(sample.image), params, sample.size, self.frozen.image_px))
        labels = torch.tensor([sample.label for sample in samples])
        return _Batch([sample.key for sample in samples], torch.from_numpy(np.stack(views)), labels)

    def _as_student(self, tokenizer: Any) -> Student:
        return Student(self.teacher.model, Path(), self.frozen.model, tokenizer)

    def _scores(self, texts: list[list[str]], tokenizer: Any) -> dict[str, Metrics]:
        """Base-to-novel of every evaluation set."""
        student, results = self._as_student(tokenizer), {}
        for name, eval_set in self.eval_sets.items():
            loaded = eval_set.load(student.preprocess_cfg)
            features = embed_images(student, loaded.images, 256)
            results[name] = base_to_novel(features, torch.tensor(loaded.truth), embed_classes(student, texts, 256))
        return results
