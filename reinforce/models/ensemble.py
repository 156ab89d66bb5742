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

    def tokens(self, names: Iterable[str], texts: list[str]) -> dict[str, np.ndarray]:
        """n texts, at most the batch size, as some teachers read them: of each vocabulary (batch size, T). Long texts
        are cut. No device has a part in it."""
        of_vocabulary = {self.teachers[name].vocabulary: self.teachers[name] for name in names}
        return {vocabulary: teacher.tokens(texts) for vocabulary, teacher in of_vocabulary.items()}

    def encode_tokens(self, names: Iterable[str], tokens: Mapping[str, np.ndarray], num: int) -> Answers:
        """Embeddings of the first `num` rows of what `tokens` gave."""
        asked = {name: self.teachers[name] for name in names}
        sent: dict[str, Tensor] = {}
        for teacher in asked.values():
            if teacher.vocabulary not in sent:
                sent[teacher.vocabulary] = send(tokens[teacher.vocabulary], teacher.device)
        features = {name: teacher.units_of_texts(sent[teacher.vocabulary]) for name, teacher in asked.items()}
        return _fetched(features, num)


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
