"""Domains to adapt to: labelled images of some classes, tars with captions, and the test images shifted."""

import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image

from pipelines.experiments import bundled, labelled
from pipelines.experiments.labelled import Labelled
from reinforce.data import shards
from train.evaluation.sets import write_classification_set

MIN_SAMPLES = 20  # training images that a Unicode block needs to be a class
MAX_TEST_SAMPLES = 40  # per class: half of all emoji are of one block
COARSE_PX = 24


@dataclass(frozen=True)
class Domain:
    """`labelled`: a folder with the splits train and test. `captioned`: tars of the training images. `shifted`: folders
    of the test images as another domain, by name."""

    labelled: Path
    captioned: str
    shifted: dict[str, Path]

    @property
    def classes(self) -> list[str]:
        return (self.labelled / "classnames.txt").read_text().splitlines()


def of_labelled(prefix: str, out: Path) -> Domain:
    """Any labelled data set (labelled.py). Raises ConfigError where it is not there."""
    data = labelled.read(prefix)
    train = [sample for samples in data.train.values() for sample in samples]
    texts = [labelled.TEMPLATE.format(label) for _, _, label in train]
    return _written(out, data.classes, train, texts, data.test)


def of_emoji(out: Path) -> Domain:
    """The bundled samples by the Unicode block of their first code point, blocks of MIN_SAMPLES and more.

    Training images come from three training tars; test images from the fourth and the held-out one, at most
    MAX_TEST_SAMPLES per class. Raises ConfigError where the samples are not there.
    """
    samples = bundled()
    *learned, last = sorted((samples / "train").glob("*.tar"))
    train = [sample for tar in learned for sample in _emoji(tar)]
    test = [sample for tar in (last, samples / "heldout/00000.tar") for sample, _ in _emoji(tar)]
    counts = Counter(block for (_, _, block), _ in train)
    classes = sorted(block for block, num in counts.items() if num >= MIN_SAMPLES)
    train = [(sample, text) for sample, text in train if sample[2] in classes]
    tested = [sample for name in classes for sample in [s for s in test if s[2] == name][:MAX_TEST_SAMPLES]]
    return _written(out, classes, [sample for sample, _ in train], [text for _, text in train], tested)


def _emoji(tar: Path) -> Iterable[tuple[Labelled, str]]:
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        yield (sample["__key__"], sample["jpg"], json.loads(sample["json"])["block"]), sample["txt"].decode()


def _written(out: Path, classes: list[str], train: list[Labelled], captions: list[str], test: list[Labelled]) -> Domain:
    """The domain in `out`. Every run writes it again, so that it always belongs to the source that was asked for."""

    def rows(samples: list[Labelled], shift: str = "") -> Iterable[tuple[str, dict[str, bytes], int]]:
        for key, jpg, label in samples:
            yield key, {"jpg": _shifted(jpg, shift) if shift else jpg}, classes.index(label)

    (out / "captioned").mkdir(parents=True, exist_ok=True)
    pairs = zip(train, captions, strict=True)
    shards.write(
        str(out / "captioned/00000.tar"),
        ((key, {"jpg": jpg, "txt": text.encode()}) for (key, jpg, _), text in pairs),
    )
    templates = [labelled.TEMPLATE]
    for name in SHIFTS:
        write_classification_set(str(out / name), classes, templates, rows(test, name))
    write_classification_set(str(out / "labelled"), classes, templates, rows(train), 1000, split="train")
    write_classification_set(str(out / "labelled"), classes, templates, rows(test))
    return Domain(out / "labelled", f"{out}/captioned/*.tar", {name: out / name for name in SHIFTS})


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _coarse(picture: Image.Image) -> Image.Image:
    return picture.resize((COARSE_PX, COARSE_PX), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


SHIFTS = {"grey": _grey, "coarse": _coarse}


def _shifted(jpg: bytes, shift: str) -> bytes:
    return labelled.jpeg(SHIFTS[shift](Image.open(io.BytesIO(jpg)).convert("RGB")))
