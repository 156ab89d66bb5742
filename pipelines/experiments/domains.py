"""Domains to adapt to: labelled images of some classes, tars with captions, and the test images shifted."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image

from pipelines.experiments import clothing
from reinforce.data import shards
from reinforce.errors import ConfigError
from train.evaluation.sets import write_classification_set

MIN_SAMPLES = 20  # of a Unicode block to learn from
MAX_TEST_SAMPLES = 40  # of a block to test with: half of all emoji are of one block
COARSE_PX = 24
SAMPLES = Path("samples")
Labelled = tuple[str, bytes, str]  # key, JPEG, class


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


def of_clothing(source: Path, out: Path) -> Domain:
    """Ten kinds of clothing (clothing.py). Raises ConfigError where the photographs are not there."""
    tars = {part: sorted((source / f"clothing_{part}").glob("*.tar")) for part in ("train", "test")}
    if not all(tars.values()):
        raise ConfigError(f"{source}: no tars in clothing_train and clothing_test; say where they are with --data")

    def read(part: str) -> list[Labelled]:
        return [sample for tar in tars[part] for sample in clothing.read(tar)]

    def write() -> None:
        train = read("train")
        classes = sorted({label for _, _, label in train})
        texts = (clothing.TEMPLATE.format(label) for _, _, label in train)
        _write(out, classes, train, texts, read("test"))

    return _made(out, write)


def of_emoji(out: Path) -> Domain:
    """The bundled samples by the Unicode block of their first code point, blocks of MIN_SAMPLES and more.

    Three training tars are learned from. The test is MAX_TEST_SAMPLES a block of the fourth and the held-out one.
    """
    tars = sorted((SAMPLES / "train").glob("*.tar"))

    def write() -> None:
        train = [sample for tar in tars[:-1] for sample in _emoji(tar)]
        test = [sample for tar in (tars[-1], SAMPLES / "heldout/00000.tar") for sample in _emoji(tar)]
        counts = Counter(block for (_, _, block), _ in train)
        classes = sorted(block for block, num in counts.items() if num >= MIN_SAMPLES)
        train = [(sample, text) for sample, text in train if sample[2] in classes]
        tested = [s for name in classes for s in [s for s, _ in test if s[2] == name][:MAX_TEST_SAMPLES]]
        _write(out, classes, [sample for sample, _ in train], (text for _, text in train), tested)

    return _made(out, write)


def _emoji(tar: Path) -> Iterable[tuple[Labelled, str]]:
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        yield (sample["__key__"], sample["jpg"], json.loads(sample["json"])["block"]), sample["txt"].decode()


def _made(out: Path, write: Callable[[], None]) -> Domain:
    domain = Domain(out / "labelled", f"{out}/captioned/*.tar", {name: out / name for name in SHIFTS})
    if not (domain.labelled / "test/nshards.txt").is_file():
        write()
    return domain


def _write(out: Path, classes: list[str], train: list[Labelled], captions: Iterable[str], test: list[Labelled]) -> None:
    """The labelled set's test split is written last."""

    def labelled(samples: list[Labelled], shift: str = "") -> Iterable[tuple[str, dict[str, bytes], int]]:
        for key, jpg, label in samples:
            yield key, {"jpg": _shifted(jpg, shift) if shift else jpg}, classes.index(label)

    (out / "captioned").mkdir(parents=True, exist_ok=True)
    pairs = zip(train, captions, strict=True)
    shards.write(
        str(out / "captioned/00000.tar"),
        ((key, {"jpg": jpg, "txt": text.encode()}) for (key, jpg, _), text in pairs),
    )
    templates = [clothing.TEMPLATE]
    for name in SHIFTS:
        write_classification_set(str(out / name), classes, templates, labelled(test, name))
    write_classification_set(str(out / "labelled"), classes, templates, labelled(train), 1000, split="train")
    write_classification_set(str(out / "labelled"), classes, templates, labelled(test))


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _coarse(picture: Image.Image) -> Image.Image:
    return picture.resize((COARSE_PX, COARSE_PX), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


SHIFTS = {"grey": _grey, "coarse": _coarse}


def _shifted(jpg: bytes, shift: str) -> bytes:
    file = io.BytesIO()
    SHIFTS[shift](Image.open(io.BytesIO(jpg)).convert("RGB")).save(file, "JPEG", quality=92)
    return file.getvalue()
