"""Photographs of ten kinds of clothing for the experiments: small, with captions from a template, some of them wrong.

Source: folders `clothing_train` and `clothing_test` of webdataset tars, `jpg` and a `json` with `label`
(github.com/alexeygrigorev/clothing-dataset-small, CC0-1.0).
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

TEMPLATE = "a photo of a {}."
LONGEST_PX = 128  # the students here see 64; decoding larger ones would be most of the work
SEED = 0
Labelled = tuple[str, bytes, str]  # key, JPEG, class


@dataclass(frozen=True)
class Photographs:
    """`train` by the names of its tars; the names of the classes are in alphabetical order."""

    train: dict[str, list[Labelled]]
    test: list[Labelled]

    @property
    def classes(self) -> list[str]:
        return sorted({label for samples in self.train.values() for _, _, label in samples})


def read(source: Path) -> Photographs:
    """All photographs, made small. Raises ConfigError where they are not there."""
    train, test = (sorted((source / f"clothing_{part}").glob("*.tar")) for part in ("train", "test"))
    if not train or not test:
        raise ConfigError(f"{source}: no tars in clothing_train and clothing_test; say where they are with --data")
    return Photographs({tar.name: list(_read(tar)) for tar in train}, [sample for tar in test for sample in _read(tar)])


def write(photographs: Photographs, out: Path, noises: dict[str, float]) -> None:
    """Writes `out/NAME/*.tar` for every share of wrong captions, and the evaluation set `out/test`.

    A wrong caption names another class. Which are wrong depends on the keys alone, so it is the same in every run.
    """
    classes = photographs.classes
    for name, noise in noises.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for tar_name, samples in photographs.train.items():
            captioned = (
                (key, {"jpg": jpg, "txt": caption(key, label, classes, noise).encode()}) for key, jpg, label in samples
            )
            shards.write(str(out / name / tar_name), captioned)
    test = ((key, {"jpg": jpg}, classes.index(label)) for key, jpg, label in photographs.test)
    write_classification_set(str(out / "test"), classes, [TEMPLATE], test)


def caption(key: str, label: str, classes: list[str], noise: float) -> str:
    """The template with the label, or, for a share `noise` of all keys, with another class."""
    wrong, which = draws.uniforms(SEED, "clothing/noise", key, 0, 2)
    if wrong < noise:
        others = [name for name in classes if name != label]
        label = others[int(which * len(others))]
    return TEMPLATE.format(label)


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()


def _read(tar: Path) -> Iterator[Labelled]:
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        picture.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
        yield sample["__key__"], jpeg(picture), json.loads(sample["json"])["label"]
