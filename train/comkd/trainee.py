"""Stage 2 of ComKD-CLIP: a student's image encoder learns from what a store says of unlabelled views.

Source and reconstructions: terms.py. The store has the teacher's embedding of each view and its class texts; no teacher
is loaded. The student's text tower is left as it is and is not used.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reinforce.errors import ConfigError
from reinforce.models.prompts import Prompts
from train.comkd import terms
from train.comkd.base_to_novel import check_classes
from train.comkd.classifier import Classifier, class_texts
from train.config import ComkdConfig, TrainConfig
from train.data.loader import Batch
from train.data.sources import TeacherFacts
from train.evaluation.metrics import Metrics
from train.evaluation.sets import EvalSet
from train.objective import Outputs, Trainee
from train.students import Student


class ComkdTrainee(Trainee):
    """A classifier in training: the image encoder whole, or its visual prompts only, and the parts on it."""

    def __init__(
        self,
        student: Student,
        teachers: dict[str, TeacherFacts],
        config: TrainConfig,
        eval_sets: Mapping[str, EvalSet],
    ) -> None:
        """Raises ConfigError where store, teachers, student and sets do not fit each other."""
        super().__init__(student, config)
        assert config.comkd and config.store  # without a store there are no teachers, which is found before
        if len(teachers) != 1:
            raise ConfigError(
                f"comkd learns from one teacher, and {config.store} has {', '.join(teachers)}; choose: teachers=[..]"
            )
        self.settings: ComkdConfig = config.comkd
        [(self.teacher, self.facts)] = teachers.items()
        classes = class_texts(config.store, self.settings.class_set, self.teacher)
        for eval_set in eval_sets.values():
            check_classes(eval_set, classes.names, config.store)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            head = terms.Head(
                _image_width(student), classes.features, self.settings.attention, self.settings.attention_scale
            )
        prompts = None
        if self.settings.num_prompts:
            prompts = Prompts.fresh(student.model, self.settings.num_prompts, self.settings.prompt_depth, config.seed)
        self.classifier = Classifier(student, classes.names, head, prompts)
        _choose_what_learns(student, self.settings)

    @property
    def lasting(self) -> nn.Module:
        return self.classifier

    def forward(self, images: Tensor, tokens: Tensor | None) -> Outputs:
        """Of images only: the features (B, D) are f_e, the guess of the teacher's (B, D) is P(u_s)."""
        with self.autocast(images):
            projected, fused = self.classifier(self.pixels(images))
        image = {"features": fused, f"guess/{self.teacher}": projected}
        return Outputs(image, {}, self.student.model.logit_scale.exp())

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """kl x refinement + align x IFAlign; of the parts those that have a weight; `agreement`, the share of the
        batch for which student and teacher name the same class; and EduAttention's `alpha`."""
        target = batch.image_targets[self.teacher].float()
        classes = self.classifier.head.classes
        assert self.facts.logit_scale is not None  # the store has its texts of the classes
        teacher_logits = self.facts.logit_scale * target @ classes.T
        logits = outputs.logit_scale * outputs.image["features"] @ classes.T
        parts, loss = {}, target.new_zeros(())
        if self.settings.kl:
            parts["kl"] = terms.refinement(logits, teacher_logits, self.settings.tau)
            loss = loss + self.settings.kl * parts["kl"]
        if self.settings.align:
            guess, settings = outputs.image[f"guess/{self.teacher}"], self.settings
            parts["align"] = terms.if_align(guess, target, settings.align_over, settings.align_average)
            loss = loss + self.settings.align * parts["align"]
        parts["agreement"] = (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
        if self.classifier.head.attention:
            parts["alpha"] = self.classifier.head.attention.alpha.clone()  # as it is before the step
        return loss, {name: value.detach() for name, value in parts.items()} | {"loss": loss.detach()}

    def evaluate(self, sets: Mapping[str, EvalSet]) -> dict[str, Metrics]:
        return self.classifier.evaluate(sets, precision=self.precision)

    def save(self, folder: Path) -> None:
        self.classifier.save(folder)


def _choose_what_learns(student: Student, settings: ComkdConfig) -> None:
    whole = not settings.num_prompts
    student.model.requires_grad_(False)
    for parameter in student.model.visual.parameters():
        parameter.requires_grad_(whole)
    student.model.logit_scale.requires_grad_(whole and settings.kl > 0)


def _image_width(student: Student) -> int:
    with torch.no_grad():
        images = torch.zeros(1, 3, student.image_px, student.image_px)
        return int(student.model.eval()(images)["image_features"].shape[1])
