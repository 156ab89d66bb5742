"""Photographs of ten kinds of clothing as the experiments use them: small, captioned by a template, some wrongly.

Source: folders `clothing_train` and `clothing_test` of webdataset tars, `jpg` and a `json` with `label`
(github.com/alexeygrigorev/clothing-dataset-small, CC0-1.0).
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import webdataset
from PIL import Image

from reinforce.data import draws, shards
from reinforce.errors import ConfigError
from train.evaluation.sets import write_classification_set

TEMPLATE = "a photo of a {}."
LONGEST_PX = 128  # the students here see 64; decoding what they do not see would be most of the work
SEED = 0
Labelled = tuple[str, bytes, str]  # key, JPEG, label


def prepare(source: Path, out: Path, noises: dict[str, float]) -> None:
    """Writes `out/NAME/{00000..}.tar` for every share of wrong captions, and the evaluation set `out/test`.

    A wrong caption names another class, drawn for the key alone: the same samples are wrong in every run.
    Raises ConfigError where the photographs are not there.
    """
    train_tars, test_tars = (sorted((source / f"clothing_{part}").glob("*.tar")) for part in ("train", "test"))
    if not train_tars or not test_tars:
        raise ConfigError(f"{source}: no tars in clothing_train and clothing_test; say where they are with --data")
    read_train = {tar.name: list(read(tar)) for tar in train_tars}
    classes = sorted({label for samples in read_train.values() for _, _, label in samples})
    for tar_name, samples in read_train.items():
        for name, noise in noises.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            shards.write(
                str(out / name / tar_name),
                (
                    (key, {"jpg": jpg, "txt": caption(key, label, classes, noise).encode()})
                    for key, jpg, label in samples
                ),
            )
    write_classification_set(
        str(out / "test"),
        classes,
        [TEMPLATE],
        ((key, {"jpg": jpg}, classes.index(label)) for tar in test_tars for key, jpg, label in read(tar)),
    )


def read(tar: Path) -> Iterator[Labelled]:
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        yield sample["__key__"], _small(sample["jpg"]), json.loads(sample["json"])["label"]


def caption(key: str, label: str, classes: list[str], noise: float) -> str:
    """The template with the label, or, for a share `noise` of all keys, with another class."""
    wrong, which = draws.uniforms(SEED, "clothing/noise", key, 0, 2)
    if wrong < noise:
        others = [name for name in classes if name != label]
        label = others[int(which * len(others))]
    return TEMPLATE.format(label)


def _small(jpg: bytes) -> bytes:
    picture = Image.open(io.BytesIO(jpg)).convert("RGB")
    picture.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()
