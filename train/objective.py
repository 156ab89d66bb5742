"""What a step minimises: the student with its heads, the loss of a batch, and the gradients of a step in pieces."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reinforce.models.pixels import Normaliser
from train.config import TrainConfig
from train.data.loader import Batch
from train.data.sources import TeacherFacts
from train.evaluation.metrics import Metrics, evaluate
from train.evaluation.sets import EvalSet
from train.losses import FeatureHeads, TeacherPairs, feature_mse, pair_losses
from train.students import Student

Outputs = dict[str, Tensor]


class Trainee(nn.Module):
    """A student in training. Subclasses say what comes out of it, what is lost, how it is scored and how it is kept."""

    def __init__(self, student: Student, config: TrainConfig) -> None:
        super().__init__()
        self.student, self.precision = student, config.precision
        self.normaliser = Normaliser(student.preprocess_cfg)

    @property
    @abstractmethod
    def lasting(self) -> nn.Module:
        """The weights that are averaged and that outlive the training."""

    @abstractmethod
    def forward(self, images: Tensor, tokens: Tensor | None) -> Outputs:
        """`images` uint8 (B, H, W, 3), `tokens` (S x B, T), one text set after the other, or none. Of the
        outputs `logit_scale` is (), those named image.. are (B, D), all others (S x B, D)."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts."""

    @abstractmethod
    def evaluate(self, sets: Mapping[str, EvalSet]) -> dict[str, Metrics]: ...

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    def pixels(self, images: Tensor) -> Tensor:
        pixels: Tensor = self.normaliser(images.permute(0, 3, 1, 2))
        return pixels

    def autocast(self, images: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "amp_bf16")


class ClipTrainee(Trainee):
    """Pixels and tokens in, unit features out, and the student's guesses of the teachers' features."""

    def __init__(self, student: Student, teachers: dict[str, TeacherFacts], config: TrainConfig) -> None:
        super().__init__(student, config)
        self.model = student.model
        self.teachers, self.config = teachers, config
        widths = {name: facts.width for name, facts in teachers.items()} if config.feature_mse else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.heads = FeatureHeads(_width(student), widths)

    @property
    def lasting(self) -> nn.Module:
        model: nn.Module = self.model
        return model

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return batch_loss(outputs, batch, self.teachers, self.config)

    def evaluate(self, sets: Mapping[str, EvalSet]) -> dict[str, Metrics]:
        return evaluate(self.student, sets, precision=self.precision)

    def save(self, folder: Path) -> None:
        self.student.save(folder)

    def forward(self, images: Tensor, tokens: Tensor | None) -> Outputs:
        """`image` (B, D), `text` (S x B, D), `logit_scale` (), and `image/TEACHER`, `text/TEACHER` where features are
        matched."""
        with self.autocast(images):
            out = self.model(self.pixels(images), tokens)
            image, text = out["image_features"].float(), out["text_features"].float()
            outputs = {"image": image, "text": text, "logit_scale": out["logit_scale"]}
            for side, features in (("image", image), ("text", text)):
                heads: nn.ModuleDict = getattr(self.heads, side)
                outputs |= {f"{side}/{name}": head(features).float() for name, head in heads.items()}
        return outputs


def batch_loss(
    outputs: Outputs, batch: Batch, teachers: dict[str, TeacherFacts], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its parts: each the sum over text sets, before its weight.

    loss = (1 - distill) x contrastive + distill x distillation + feature_mse x squared distance (MobileCLIP, section 3;
    CLIP-KD), summed over the text sets.
    """
    sets = list(batch.tokens)
    parts: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        parts[name] = parts[name] + value if name in parts else value

    for text_set, text in zip(sets, outputs["text"].chunk(len(sets)), strict=True):
        said = [
            TeacherPairs(batch.image_targets[name], batch.text_targets[text_set][name], facts.logit_scale)
            for name, facts in teachers.items()
        ]
        losses = pair_losses(outputs["image"], text, outputs["logit_scale"], said)
        add("contrastive", losses.contrastive)
        if teachers:
            add("distill", losses.distill)
    loss = (1 - config.distill) * parts["contrastive"]
    if teachers:
        loss = loss + config.distill * parts["distill"]
    if config.feature_mse:
        for name in teachers:
            targets = torch.cat([batch.text_targets[text_set][name] for text_set in sets])
            add("feature_mse", feature_mse(outputs[f"image/{name}"], batch.image_targets[name]) / len(teachers))
            add("feature_mse", feature_mse(outputs[f"text/{name}"], targets) / len(teachers))
        loss = loss + config.feature_mse * parts["feature_mse"]
    return loss, {name: value.detach() for name, value in parts.items()} | {"loss": loss.detach()}


def backward(
    trainee: Trainee | DistributedDataParallel,
    pieces: list[Batch],
    loss_of: Callable[[Outputs, Batch], tuple[Tensor, dict[str, Tensor]]],
    seed: int,
) -> dict[str, Tensor]:
    """Adds the gradients of one step to the parameters; gives the parts of its loss.

    A contrastive loss sees all pairs of a batch, so that a batch in pieces is no sum of losses. Features of all pieces
    are computed first and without gradients; then the loss of the whole batch, and its gradients by the features; then
    each piece again, which carries them to the weights (Gao et al. 2021, arXiv 2101.06983). Equal to one large batch,
    but for BatchNorm, which sees a piece. `seed`: of the random numbers of this step, the same for both passes.
    """
    if len(pieces) == 1:
        torch.manual_seed(seed)
        loss, parts = loss_of(_forward(trainee, pieces[0]), pieces[0])
        loss.backward()  # type: ignore[no-untyped-call]
        return parts
    local: Trainee = trainee.module if isinstance(trainee, DistributedDataParallel) else trainee
    with torch.no_grad(), _batch_norms_keep_their_averages(local):
        made = []
        for i, piece in enumerate(pieces):
            torch.manual_seed(seed + i)
            made.append(_forward(local, piece))
    whole = _joined([piece.tokens for piece in pieces], made)
    for features in whole.values():
        features.requires_grad_()
    loss, parts = loss_of(whole, _whole_batch(pieces))
    loss.backward()  # type: ignore[no-untyped-call]
    for i, (piece, grads) in enumerate(zip(pieces, _split([p.tokens for p in pieces], whole), strict=True)):
        torch.manual_seed(seed + i)
        with ExitStack() as stack:
            if isinstance(trainee, DistributedDataParallel) and i < len(pieces) - 1:
                stack.enter_context(trainee.no_sync())
            outputs = _forward(trainee, piece)
            share = [(outputs[name] * grad).sum() for name, grad in grads.items()]
            torch.stack(share).sum().backward()  # type: ignore[no-untyped-call]
    return parts


def _forward(trainee: Any, batch: Batch) -> Outputs:
    outputs: Outputs = trainee(batch.images, torch.cat(list(batch.tokens.values())) if batch.tokens else None)
    return outputs


def _joined(tokens: list[dict[str, Tensor]], made: list[Outputs]) -> Outputs:
    """Outputs of pieces as those of the whole batch: texts have to come set by set."""
    num_sets = len(tokens[0])

    def join(name: str) -> Tensor:
        if name == "logit_scale":
            return made[0][name].clone()
        if name.startswith("image"):
            return torch.cat([outputs[name] for outputs in made])
        chunks = [outputs[name].chunk(num_sets) for outputs in made]
        return torch.cat([piece[k] for k in range(num_sets) for piece in chunks])

    return {name: join(name) for name in made[0]}


def _split(tokens: list[dict[str, Tensor]], whole: Outputs) -> Iterator[Outputs]:
    """The gradients of `_joined`'s outputs, piece by piece."""
    num_sets, num_pieces = len(tokens[0]), len(tokens)
    for i in range(num_pieces):
        grads = {}
        for name, features in whole.items():
            grad = features.grad if features.grad is not None else torch.zeros_like(features)
            if name == "logit_scale":
                grads[name] = grad / num_pieces
            elif name.startswith("image"):
                grads[name] = grad.chunk(num_pieces)[i]
            else:
                grads[name] = torch.cat([part.chunk(num_pieces)[i] for part in grad.chunk(num_sets)])
        yield grads


def _whole_batch(pieces: list[Batch]) -> Batch:
    first = pieces[0]
    return Batch(
        [key for piece in pieces for key in piece.keys],
        torch.empty(0),  # the loss needs no pixels
        {name: torch.cat([piece.tokens[name] for piece in pieces]) for name in first.tokens},
        {name: torch.cat([piece.image_targets[name] for piece in pieces]) for name in first.image_targets},
        {
            text_set: {name: torch.cat([piece.text_targets[text_set][name] for piece in pieces]) for name in said}
            for text_set, said in first.text_targets.items()
        },
    )


@contextmanager
def _batch_norms_keep_their_averages(model: nn.Module) -> Iterator[None]:
    """In the first of two passes over a piece, so that each piece counts once."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def _width(student: Student) -> int:
    tokens = student.tokenizer([""])
    with torch.no_grad():
        return int(student.model.eval().encode_text(tokens).shape[1])
