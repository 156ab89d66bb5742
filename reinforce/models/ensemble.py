"""The teachers of a recipe, who answer together.

Pixels of one size and tokens of one vocabulary go to the device once for all teachers, and their answers come back in
one piece. So a GPU is waited for once a view, and not once a view and teacher; with an answer taken one view late, it
never waits for the host.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from reinforce.models.device import fetch, send
from reinforce.models.teacher import Teacher, as_bfloat16

Answers = Callable[[], dict[str, np.ndarray]]


class Ensemble:
    """Teachers by name. What is asked of some of them is answered by a function that waits for the device and gives
    their embeddings by name: bfloat16 (n, D), unit norm before rounding, as each of them gives alone."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = teachers

    def encode_images(self, names: Iterable[str], views: Mapping[int, np.ndarray]) -> Answers:
        """`views`: for each side in pixels uint8 (n, side, side, 3), n at most the batch size."""
        asked = {name: self.teachers[name] for name in names}
        sent: dict[int, Tensor] = {}
        for teacher in asked.values():
            if teacher.image_px not in sent:
                sent[teacher.image_px] = send(teacher.padded(views[teacher.image_px]), teacher.device)
        features = {name: teacher.units_of_images(sent[teacher.image_px]) for name, teacher in asked.items()}
        return _fetched(features, len(next(iter(views.values()), ())))

    def encode_texts(self, names: Iterable[str], texts: list[str]) -> Answers:
        """n texts, at most the batch size. Long texts are cut."""
        sent: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        for name in names:
            teacher = self.teachers[name]
            if teacher.vocabulary not in sent:
                sent[teacher.vocabulary] = send(teacher.tokens(texts), teacher.device)
            features[name] = teacher.units_of_texts(sent[teacher.vocabulary])
        return _fetched(features, len(texts))


def _fetched(features: Mapping[str, Tensor], num: int) -> Answers:
    """The first `num` rows of each, on the host."""
    if not features:
        return dict
    wait = fetch(torch.cat([units.to(torch.bfloat16) for units in features.values()], dim=1))
    ends = np.cumsum([units.shape[1] for units in features.values()])

    def answers() -> dict[str, np.ndarray]:
        parts = np.split(as_bfloat16(wait())[:num], ends[:-1], axis=1)
        # Copies, so that what is kept does not keep the memory that a GPU writes into.
        return {name: part.copy() for name, part in zip(features, parts, strict=True)}

    return answers
