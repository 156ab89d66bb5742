"""A trained student, loaded from its folder: a CLIP of two towers, or a classifier.

Both have `evaluate`, `export` and `save`, so that users need not ask which it is: `load` is the one place that asks. It
stands above both kinds, because `train.comkd` is built on `train.students`, which therefore cannot know it.
"""

from pathlib import Path

import torch

from train import students
from train.comkd import classifier
from train.comkd.classifier import Classifier
from train.students import Student


def load(name: str, device: torch.device | str = "cpu") -> Student | Classifier:
    """A folder such as runs/NAME/student or an export, or a name of the table; in eval mode. Raises ConfigError."""
    is_classifier = (Path(name) / classifier.FILE).is_file()
    trained = classifier.load(Path(name)) if is_classifier else students.create(name)
    trained.module.to(device).eval()
    return trained
