"""Evaluation sets: images with classes or with captions, decoded once and kept as a student sees them.

A set is a folder in CLIP_benchmark's layout, local or an fsspec URL,

    classnames.txt                          one class per line: line i names label i
    zeroshot_classification_templates.txt   one template per line, `{c}` or `{}` where the class goes
    coarse_classnames.txt                   ours, may be absent: line i names the group that class i is of
    dataset_type.txt                        `retrieval`; absent, or `classification`, for classes
    test/nshards.txt, test/0.tar, ...       image and `.cls` (or `.json` with a label), or image and `.txt` with one
                                            caption per line

or the tars of a training set, with all captions that `reinforce.data.shards.read` gives. A folder without templates is
evaluated with OpenAI's 80 for ImageNet.
"""

import io
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reinforce.config import CAPTION_FILES, CaptionFiles
from reinforce.data import captions, images, shards
from reinforce.data.shards import Sample, Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, SampleError
from reinforce.models.open_clip import open_clip
from train.evaluation.folder import NSHARDS, Folder

CLASSNAMES = "classnames.txt"
COARSE = "coarse_classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
_AT_ONCE = 256  # files that are read before their pictures are decoded

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """N images, uint8 (3, H, W), resized and cropped as the student's evaluation transform does; the `truth` of each,
    its label or its captions; and how many samples could not be used."""

    images: list[Tensor]
    truth: list[T]
    num_skipped: int


class EvalSet:
    """One evaluation set. Opening it reads the small files; `load` reads the tars.

    `split` takes the place of `test` above. `files`: how captions lie in tars that are no folder's. `prompts` are the
    texts of each class of `classnames`; both are None if the images have captions. `coarse` is the group of each class,
    None where nothing is said of groups. With `grouped` the truth of an image with a class is its label and its group,
    the first number of its `npy`. Raises ConfigError if something is missing or contradictory, MissingExtra if the URL
    needs a package that is not installed.
    """

    def __init__(
        self, url: str, split: str = "test", files: CaptionFiles = CAPTION_FILES, grouped: bool = False
    ) -> None:
        self.url = url.rstrip("/")
        self.classnames: list[str] | None = None
        self.prompts: list[list[str]] | None = None
        self.coarse: list[str] | None = None
        self._kept: tuple[dict[str, Any], Loaded] | None = None
        if url.endswith(".tar"):
            self._shards = shards.expand(url)
            self._read: Callable[[Shard], Iterator[tuple[Sample, Any]]] = partial(_captioned, files=files)
            return
        folder = Folder(self.url)
        self._shards = folder.shards(split)
        kind = (folder.text(TYPE) or "classification").strip().lower()
        if kind == "retrieval":
            self._read = _captioned_by_line
        elif kind == "classification":
            self.classnames, self.prompts = _prompts(folder)
            self.coarse = _coarse(folder, len(self.classnames))
            self._read = partial(_labelled, num_classes=len(self.prompts), grouped=grouped)
        else:
            raise ConfigError(f"{self.url}/{TYPE}: says '{kind}'; write classification or retrieval")

    def samples(self) -> Iterator[tuple[Sample, Any]]:
        """Every sample undecoded, the bad ones too, and its label or its captions. Raises as `load` does."""
        for shard in self._shards:
            yield from self._read(shard)

    def load(self, preprocess_cfg: dict[str, Any]) -> Loaded:
        """The images as a student with this preprocessing sees them, 3 x H x W bytes each. The last result is kept.

        Samples that cannot be used are skipped, counted, and logged with the reasons. Raises ConfigError if a label
        names no class of the set, or if no sample is left; ShardError if a tar cannot be read.
        """
        if self._kept is None or self._kept[0] != preprocess_cfg:
            [loaded] = self.parts(preprocess_cfg, sys.maxsize)
            self._kept = preprocess_cfg, loaded
        return self._kept[1]

    def parts(self, preprocess_cfg: dict[str, Any], rows: int) -> Iterator[Loaded]:
        """What `load` gives, `rows` images at a time, for a set that is larger than memory. Raises as `load` does."""
        cfg = open_clip.transform.PreprocessCfg(**preprocess_cfg)
        # The last two steps turn uint8 into float32 and normalise: `embed_images` does both, batch by batch.
        shape = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms[:-2]
        part, skipped, first, num = Loaded[Any]([], [], 0), Counter[str](), dict[str, str](), 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            samples = chain.from_iterable(map(self._read, self._shards))
            while group := list(islice(samples, _AT_ONCE)):  # the pool itself would read ahead without limit
                for picture, of_it in pool.map(partial(_pixels, shape), group):
                    if isinstance(picture, SampleError):
                        reason = Status(picture.status).reason
                        skipped[reason] += 1
                        first.setdefault(reason, picture.message)
                        continue
                    if len(part.images) == rows:
                        yield part
                        part = Loaded([], [], 0)
                    part.images.append(picture)
                    part.truth.append(of_it)
                    num += 1
        reasons = ", ".join(f"{reason} {times}" for reason, times in skipped.most_common())
        reasons += "".join(f"; {told}" for told in first.values())
        if not num:
            raise ConfigError(
                f"{self.url}: no sample to evaluate on ({reasons or 'its tars are empty'}); check the set"
            )
        if skipped:
            log.warning("%s: %d of %d samples skipped: %s", self.url, skipped.total(), num + skipped.total(), reasons)
        yield replace(part, num_skipped=skipped.total())


def write_classification_set(
    folder: str,
    classnames: list[str],
    templates: list[str],
    samples: Iterable[tuple[str, dict[str, bytes], int]],
    samples_per_shard: int = 10_000,
    split: str = "test",
    coarse: list[str] | None = None,
) -> None:
    """Write a set in CLIP_benchmark's layout; `folder` may be a URL. `samples` are (key, {extension: bytes}, label).
    `coarse`: the group of each class.

    `nshards.txt` is written last, so that an unfinished set is refused. Raises ConfigError.
    """
    _check_classes(folder, classnames, templates)
    for name, lines in ((CLASSNAMES, classnames), (TEMPLATES, templates), (COARSE, coarse or [])):
        if not lines:
            continue
        with fsspec.open(f"{folder}/{name}", "w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    samples, num_shards = iter(samples), 0
    while part := list(islice(samples, samples_per_shard)):
        for key, _, label in part:
            _check_label(key, label, len(classnames))
        path = f"{folder}/{split}/{num_shards}.tar"
        shards.write(path, ((key, parts | {"cls": str(label).encode()}) for key, parts, label in part))
        num_shards += 1
    if not num_shards:
        raise ConfigError(f"{folder}: no sample to write; a set needs at least one")
    with fsspec.open(f"{folder}/{split}/{NSHARDS}", "w") as file:
        file.write(f"{num_shards}\n")


def _prompts(folder: Folder) -> tuple[list[str], list[list[str]]]:
    """Names and texts of the classes."""
    classnames, templates = folder.lines(CLASSNAMES), folder.lines(TEMPLATES)
    if classnames is None:
        raise ConfigError(
            f"{folder.url}/{CLASSNAMES}: not found; write one class per line, "
            f"or 'retrieval' into {TYPE} where images have captions"
        )
    if templates is None:
        templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    _check_classes(folder.url, classnames, templates)
    for name, num in Counter(classnames).items():
        if num > 1:  # ImageNet's names have two missiles and two sunglasses
            log.warning("%s: %d classes are called '%s'; tied, none of them counts as right", folder.url, num, name)
    return classnames, [[t.replace("{c}", name).replace("{}", name) for t in templates] for name in classnames]


def _coarse(folder: Folder, num_classes: int) -> list[str] | None:
    lines = folder.lines(COARSE)
    if lines is not None and len(lines) != num_classes:
        raise ConfigError(f"{folder.url}/{COARSE}: {len(lines)} lines for {num_classes} classes; write one for each")
    return lines


def _check_classes(folder: str, classnames: list[str], templates: list[str]) -> None:
    if len(classnames) < 2 or "" in classnames:
        raise ConfigError(f"{folder}/{CLASSNAMES}: has to name at least two classes, one per line and no line empty")
    if not templates:
        raise ConfigError(f"{folder}/{TEMPLATES}: is empty; write one template per line, such as 'a photo of a {{c}}.'")
    for template in templates:
        if "{c}" not in template and "{}" not in template:
            raise ConfigError(
                f"{folder}/{TEMPLATES}: '{template}' has no place for the class; write {{c}} or {{}} in it"
            )


def _check_label(key: str, label: int, num_classes: int) -> None:
    if not 0 <= label < num_classes:
        raise ConfigError(
            f"{key}.cls: label {label}, and {CLASSNAMES} names {num_classes} classes, counted from 0; correct either"
        )


def _labelled(shard: Shard, num_classes: int, grouped: bool) -> Iterator[tuple[Sample, Any]]:
    for key, parts in shards.read_parts(shard, (*shards.IMAGES, "cls", "json", *(["npy"] if grouped else []))):
        try:
            label = captions.label(parts)
        except (ValueError, RecursionError):
            raise ConfigError(f"{shard.url}: {key}.cls is missing or not a number; write the label as digits") from None
        _check_label(f"{shard.url}: {key}", label, num_classes)
        yield _sample(key, parts, ()), (label, _group(f"{shard.url}: {key}", parts)) if grouped else label


def _group(where: str, parts: dict[str, bytes]) -> int:
    try:
        group = int(np.lib.format.read_array(io.BytesIO(parts["npy"]), allow_pickle=False).reshape(-1)[0])
    except (KeyError, ValueError, IndexError, EOFError):
        group = -1
    if group < 0:
        raise ConfigError(f"{where}.npy is missing, or its first number is no group; groups are counted from 0")
    return group


def _captioned_by_line(shard: Shard) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    for key, parts in shards.read_parts(shard, (*shards.IMAGES, "txt")):
        try:
            lines = parts.get("txt", b"").decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            yield Sample(key, b"", (), Status.CAPTION_NOT_UTF8, f"{key}.txt: is not UTF-8; convert it"), ()
            continue
        found = tuple(caption for line in lines if (caption := line.strip()))
        without = Sample(key, b"", (), Status.EMPTY_CAPTION, f"{key}: has no .txt with a caption; add one")
        yield _sample(key, parts, found) if found else without, found


def _captioned(shard: Shard, files: CaptionFiles) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    for sample in shards.read(shard, files):
        yield sample, sample.captions


def _sample(key: str, parts: dict[str, bytes], captions: tuple[str, ...]) -> Sample:
    image = next((parts[extension] for extension in shards.IMAGES if extension in parts), None)
    if image is None:
        few = ", ".join(shards.IMAGES)
        return Sample(key, b"", (), Status.MISSING_IMAGE, f"{key}: has no image that is read; add one of {few}")
    return Sample(key, image, captions)


def _pixels(steps: list[Callable[[Image.Image], Image.Image]], row: tuple[Sample, T]) -> tuple[Tensor | SampleError, T]:
    sample, truth = row
    if sample.status != Status.GOOD:
        return SampleError(sample.status, sample.detail), truth
    try:
        picture = images.decode(sample.image)
    except SampleError as error:
        return SampleError(error.status, f"{sample.key}: {error}"), truth
    for step in steps:
        picture = step(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), truth
