"""What a step minimises: the student with its heads, the loss of a batch, and the gradients of a step in pieces."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reinforce.models.pixels import Normaliser
from train.collapse import separation
from train.config import TrainConfig
from train.data.loader import Batch
from train.data.sources import TeacherFacts
from train.evaluation.metrics import Metrics, evaluate
from train.evaluation.sets import EvalSet
from train.losses import FeatureHeads, TeacherPairs, feature_mse, pair_losses
from train.students import Student

GUESS = "guess/"  # before a teacher's name, among outputs


@dataclass(frozen=True)
class Outputs:
    """What a student makes of B samples. `image` (B, D) by name and `text` (S, B, D) by name, of S text sets:
    `features` are its own, `guess/TEACHER` what it takes for that teacher's. `logit_scale` () is the multiplier."""

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    logit_scale: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Outputs":
        """The same samples, with every tensor through `function`."""
        image, text = ({name: function(x) for name, x in side.items()} for side in (self.image, self.text))
        return Outputs(image, text, function(self.logit_scale))

    @staticmethod
    def cat(pieces: Sequence["Outputs"]) -> "Outputs":
        """Outputs of pieces, one after the other, as those of one batch. All have one `logit_scale`, the first's."""
        first = pieces[0]
        return Outputs(
            {name: torch.cat([piece.image[name] for piece in pieces]) for name in first.image},
            {name: torch.cat([piece.text[name] for piece in pieces], dim=1) for name in first.text},
            first.logit_scale,
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.image.values(), *self.text.values(), self.logit_scale]


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
        """`images` uint8 (B, H, W, 3); `tokens` (S, B, T) of S text sets, or none."""

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
        matched = teachers if config.feature_mse else {}
        widths = {name: facts.width for name, facts in matched.items()}
        text_widths = {name: facts.width for name, facts in matched.items() if facts.reads_texts}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.heads = FeatureHeads(_width(student), widths, text_widths)

    @property
    def lasting(self) -> nn.Module:
        model: nn.Module = self.model
        return model

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = batch_loss(outputs, batch, self.teachers, self.config)
        image, text = outputs.image["features"], outputs.text["features"]
        return loss, parts | separation(image, list(text), outputs.logit_scale)

    def evaluate(self, sets: Mapping[str, EvalSet]) -> dict[str, Metrics]:
        return evaluate(self.student, sets, precision=self.precision)

    def save(self, folder: Path) -> None:
        self.student.save(folder)

    def forward(self, images: Tensor, tokens: Tensor | None) -> Outputs:
        """Guesses of the teachers' features are there where features are matched."""
        assert tokens is not None  # only comkd learns without texts
        with self.autocast(images):
            out = self.model(self.pixels(images), tokens.flatten(0, 1))
            image, text = out["image_features"].float(), out["text_features"].float().unflatten(0, tokens.shape[:2])
            return Outputs(
                {"features": image} | self._guesses(self.heads.image, image),
                {"features": text} | self._guesses(self.heads.text, text),
                out["logit_scale"],
            )

    @staticmethod
    def _guesses(heads: nn.ModuleDict, features: Tensor) -> dict[str, Tensor]:
        return {f"{GUESS}{name}": head(features).float() for name, head in heads.items()}


def batch_loss(
    outputs: Outputs, batch: Batch, teachers: dict[str, TeacherFacts], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its parts: each the sum over text sets, before its weight.

    loss = (1 - distill) x contrastive + distill x distillation + feature_mse x squared distance (MobileCLIP, section 3;
    CLIP-KD), summed over the text sets.
    """
    parts: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        parts[name] = parts[name] + value if name in parts else value

    for text_set, text in zip(batch.tokens, outputs.text["features"], strict=True):
        pairs = [
            TeacherPairs(
                batch.image_targets[name],
                batch.text_targets[text_set][name],
                facts.logit_scale,
                facts.logit_bias,
                facts.partial,
            )
            for name, facts in teachers.items()
            if facts.logit_scale is not None
        ]
        losses = pair_losses(outputs.image["features"], text, outputs.logit_scale, pairs, config.distill)
        add("loss", losses.loss)
        add("contrastive", losses.contrastive)
        if pairs:
            add("distill", losses.distill)
    loss = parts["loss"]
    if config.feature_mse:
        partial = {name for name, facts in teachers.items() if facts.partial}
        of_texts = {
            name: torch.stack([of[name] for of in batch.text_targets.values()])
            for name, facts in teachers.items()
            if facts.reads_texts
        }
        for guesses, targets in ((_guessed(outputs.image), batch.image_targets), (_guessed(outputs.text), of_texts)):
            if guesses:
                add("feature_mse", feature_mse(guesses, targets, partial, config.feature_balance))
        loss = loss + config.feature_mse * parts["feature_mse"]
    return loss, {name: value.detach() for name, value in parts.items()} | {"loss": loss.detach()}


def _guessed(side: dict[str, Tensor]) -> dict[str, Tensor]:
    """By teacher, what a student takes for its features."""
    return {name.removeprefix(GUESS): value for name, value in side.items() if name.startswith(GUESS)}


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
    features = [outputs.map(lambda x: x.detach().requires_grad_()) for outputs in made]
    # Without its pixels, which are the largest part of a batch and no concern of the loss.
    whole = Batch.cat([replace(piece, images=piece.images[:, :0]) for piece in pieces])
    loss, parts = loss_of(Outputs.cat(features), whole)
    loss.backward()  # type: ignore[no-untyped-call]
    for i, (piece, held) in enumerate(zip(pieces, features, strict=True)):
        torch.manual_seed(seed + i)
        with ExitStack() as stack:
            if isinstance(trainee, DistributedDataParallel) and i < len(pieces) - 1:
                stack.enter_context(trainee.no_sync())
            pairs = zip(_forward(trainee, piece).tensors, held.tensors, strict=True)
            # Without a gradient, too: each output has to be in the graph that the ranks walk together.
            share = [(x * (torch.zeros_like(x) if at.grad is None else at.grad)).sum() for x, at in pairs]
            torch.stack(share).sum().backward()  # type: ignore[no-untyped-call]
    return parts


def _forward(trainee: Any, batch: Batch) -> Outputs:
    outputs: Outputs = trainee(batch.images, torch.stack(list(batch.tokens.values())) if batch.tokens else None)
    return outputs


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
