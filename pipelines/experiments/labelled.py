"""A labelled data set for the experiments: small images of some classes, captions from a template, some of them wrong.

Source: the folders PREFIX_train, PREFIX_validation and PREFIX_test, or train, validation and test inside the folder
PREFIX: webdataset tars, `jpg` and a `json` with `label`, the class, and perhaps `coarse`, the group of classes that it
is of.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image

from reinforce.data import draws, shards
from reinforce.errors import ConfigError
from train.evaluation.sets import write_classification_set

PARTS = ("train", "validation", "test")
TEMPLATE = "a photo of a {}."
LONGEST_PX = 128  # the students here see 64; decoding larger ones would be most of the work
SEED = 0
Labelled = tuple[str, bytes, str]  # key, JPEG, class


@dataclass(frozen=True)
class LabelledSet:
    """`train` by the names of its tars; `coarse` is the group of each class, empty where the data have none."""

    train: dict[str, list[Labelled]]
    validation: list[Labelled]
    test: list[Labelled]
    coarse: dict[str, str]

    @property
    def classes(self) -> list[str]:
        """In alphabetical order."""
        return sorted({label for samples in self.train.values() for _, _, label in samples})


def read(prefix: str, longest_px: int = LONGEST_PX) -> LabelledSet:
    """All images, at most `longest_px` on their longest side. Raises ConfigError where something is not there."""
    tars = {part: _tars(prefix, part) for part in PARTS}
    coarse: dict[str, str] = {}
    train = {tar.name: list(_read(tar, longest_px, coarse)) for tar in tars["train"]}
    validation, test = ([s for tar in tars[part] for s in _read(tar, longest_px, coarse)] for part in PARTS[1:])
    found = LabelledSet(train, validation, test, coarse)
    unknown = sorted({label for _, _, label in validation + test} - set(found.classes))
    if unknown:
        raise ConfigError(f"{prefix}: no training image of the class '{unknown[0]}', which others have")
    if coarse and (ungrouped := sorted(set(found.classes) - coarse.keys())):
        raise ConfigError(
            f"{prefix}: the class '{ungrouped[0]}' has no `coarse`, and others have; give it to all or none"
        )
    return found


def write(data: LabelledSet, out: Path, noises: dict[str, float]) -> None:
    """Writes `out/NAME/*.tar` for every share of wrong captions, and the evaluation sets `out/validation`, `out/test`.

    A wrong caption names another class. Which are wrong depends on the keys alone, so it is the same in every run.
    """
    for name, noise in noises.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for tar_name, samples in data.train.items():
            captioned = (
                (key, {"jpg": jpg, "txt": caption(key, label, data.classes, noise).encode()})
                for key, jpg, label in samples
            )
            shards.write(str(out / name / tar_name), captioned)
    coarse = [data.coarse[name] for name in data.classes] if data.coarse else None
    for part, samples in (("validation", data.validation), ("test", data.test)):
        labelled = ((key, {"jpg": jpg}, data.classes.index(label)) for key, jpg, label in samples)
        write_classification_set(str(out / part), data.classes, [TEMPLATE], labelled, coarse=coarse)


def caption(key: str, label: str, classes: list[str], noise: float) -> str:
    """The template with the label, or, for a share `noise` of all keys, with another class."""
    wrong, which = draws.uniforms(SEED, "noise", key, 0, 2)
    if wrong < noise:
        others = [name for name in classes if name != label]
        label = others[int(which * len(others))]
    return TEMPLATE.format(label)


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()


def _tars(prefix: str, part: str) -> list[Path]:
    for folder in (Path(f"{prefix}_{part}"), Path(prefix) / part):
        if tars := sorted(folder.glob("*.tar")):
            return tars
    raise ConfigError(f"no tars in {prefix}_{part} or {prefix}/{part}; say where the data are: --data PREFIX")


def _read(tar: Path, longest_px: int, coarse: dict[str, str]) -> Iterator[Labelled]:
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        told = json.loads(sample.get("json", b"{}"))
        if "jpg" not in sample or "label" not in told:
            raise ConfigError(f"{tar}: {sample['__key__']} has no jpg, or no json with a label")
        if "coarse" in told:
            coarse[told["label"]] = told["coarse"]
        picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        picture.thumbnail((longest_px, longest_px), Image.Resampling.BICUBIC)
        yield sample["__key__"], jpeg(picture), told["label"]
