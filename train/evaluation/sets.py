"""Evaluation sets: images with classes or with captions, decoded once and kept as a student sees them.

A set is a folder in CLIP_benchmark's layout, local or an fsspec URL,

    classnames.txt                          one class per line: line i names label i
    zeroshot_classification_templates.txt   one template per line, `{c}` or `{}` where the class goes
    coarse_classnames.txt                   ours, may be absent: line i names the group that class i is of
    dataset_type.txt                        `retrieval`; absent, or `classification`, for classes
    test/nshards.txt, test/0.tar, ...       image and `.cls`, or image and `.txt` with one caption per line

or the tars of a training set, with all captions that `reinforce.data.shards.read` gives. A folder without templates is
evaluated with OpenAI's 80 for ImageNet.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reinforce.data import images, shards
from reinforce.data.remote import as_os_errors
from reinforce.data.shards import Sample, Shard, Status
from reinforce.errors import ConfigError, MissingExtra, SampleError
from reinforce.models.open_clip import open_clip

CLASSNAMES = "classnames.txt"
COARSE = "coarse_classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
NSHARDS = "nshards.txt"
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

    `split` takes the place of `test` above. `prompts` are the texts of each class of `classnames`; both are None if the
    images have captions. `coarse` is the group of each class, None where nothing is said of groups. Raises ConfigError
    if something is missing or contradictory, MissingExtra if the URL needs a package that is not installed.
    """

    def __init__(self, url: str, split: str = "test") -> None:
        self.url = url.rstrip("/")
        self.classnames: list[str] | None = None
        self.prompts: list[list[str]] | None = None
        self.coarse: list[str] | None = None
        self._kept: tuple[dict[str, Any], Loaded] | None = None
        if url.endswith(".tar"):
            self._shards = shards.expand(url)
            self._read: Callable[[Shard], Iterator[tuple[Sample, Any]]] = _captioned
            return
        folder = _Folder(self.url)
        self._shards = _shards(folder, split)
        kind = (folder.text(TYPE) or "classification").strip().lower()
        if kind == "retrieval":
            self._read = _captioned_by_line
        elif kind == "classification":
            self.classnames, self.prompts = _prompts(folder)
            self.coarse = _coarse(folder, len(self.classnames))
            self._read = partial(_labelled, num_classes=len(self.prompts))
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
            self._kept = preprocess_cfg, self._load(preprocess_cfg)
        return self._kept[1]

    def _load(self, preprocess_cfg: dict[str, Any]) -> Loaded:
        cfg = open_clip.transform.PreprocessCfg(**preprocess_cfg)
        # The last two steps turn uint8 into float32 and normalise: `embed_images` does both, batch by batch.
        shape = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms[:-2]
        pixels, truth, skipped = list[Tensor](), list[Any](), Counter[str]()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = chain.from_iterable(map(self._read, self._shards))
            while group := list(islice(rows, _AT_ONCE)):  # the pool itself would read ahead without limit
                for picture, of_it in pool.map(partial(_pixels, shape), group):
                    if isinstance(picture, Status):
                        skipped[picture.reason] += 1
                    else:
                        pixels.append(picture)
                        truth.append(of_it)
        reasons = ", ".join(f"{reason} {num}" for reason, num in skipped.most_common())
        if not pixels:
            raise ConfigError(
                f"{self.url}: no sample to evaluate on ({reasons or 'its tars are empty'}); check the set"
            )
        if skipped:
            num = len(pixels) + skipped.total()
            log.warning("%s: %d of %d samples skipped: %s", self.url, skipped.total(), num, reasons)
        return Loaded(pixels, truth, skipped.total())


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


class _Folder:
    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(f"{url}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{url}: {error}; give a folder, or tars as 'DIR/*.tar'") from None

    def text(self, name: str) -> str | None:
        """The text of a file, None where there is none."""
        try:
            with as_os_errors():
                data: bytes = self.files.cat_file(f"{self.path}/{name}")
            return data.decode("utf-8-sig")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.url}/{name}: cannot be read: {error}") from error

    def lines(self, name: str) -> list[str] | None:
        text = self.text(name)
        return None if text is None else [line.strip() for line in text.rstrip().splitlines()]

    @as_os_errors()
    def exists(self, name: str) -> bool:
        return bool(self.files.exists(f"{self.path}/{name}"))


def _shards(folder: _Folder, split: str) -> list[Shard]:
    where = f"{folder.url}/{split}/{NSHARDS}"
    text = folder.text(f"{split}/{NSHARDS}")
    if text is None:
        raise ConfigError(
            f"{where}: not found; an evaluation set is a folder in CLIP_benchmark's layout, or tars as 'DIR/*.tar'"
        )
    if text.lstrip().startswith("<"):
        raise ConfigError(f"{where} is a page about the file; of a repository on Hugging Face give .../resolve/main")
    if not text.strip().isdecimal() or int(text) == 0:
        raise ConfigError(f"{where}: says '{text.strip()[:40]}'; it has to be the number of tars beside it")
    num = int(text)
    absent = next((i for i in range(num) if not folder.exists(f"{split}/{i}.tar")), None)
    if absent is not None:
        raise ConfigError(f"{where}: says {num}, and {absent}.tar is not there; add it, or correct the number")
    if folder.exists(f"{split}/{num}.tar"):
        raise ConfigError(f"{where}: says {num}, and {num}.tar is there as well; remove it, or correct the number")
    return [Shard(str(i), f"{folder.url}/{split}/{i}.tar") for i in range(num)]


def _prompts(folder: _Folder) -> tuple[list[str], list[list[str]]]:
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


def _coarse(folder: _Folder, num_classes: int) -> list[str] | None:
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


def _labelled(shard: Shard, num_classes: int) -> Iterator[tuple[Sample, int]]:
    for key, parts in shards.read_parts(shard, (*shards.IMAGES, "cls")):
        try:
            label = int(parts.get("cls", b"").decode())
        except ValueError:
            raise ConfigError(f"{shard.url}: {key}.cls is missing or not a number; write the label as digits") from None
        _check_label(f"{shard.url}: {key}", label, num_classes)
        yield _sample(key, parts, ()), label


def _captioned_by_line(shard: Shard) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    for key, parts in shards.read_parts(shard, (*shards.IMAGES, "txt")):
        try:
            lines = parts.get("txt", b"").decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            yield Sample(key, b"", (), Status.CAPTION_NOT_UTF8), ()
            continue
        captions = tuple(caption for line in lines if (caption := line.strip()))
        yield _sample(key, parts, captions) if captions else Sample(key, b"", (), Status.EMPTY_CAPTION), captions


def _captioned(shard: Shard) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    for sample in shards.read(shard):
        yield sample, sample.captions


def _sample(key: str, parts: dict[str, bytes], captions: tuple[str, ...]) -> Sample:
    image = next((parts[extension] for extension in shards.IMAGES if extension in parts), None)
    return Sample(key, b"", (), Status.MISSING_IMAGE) if image is None else Sample(key, image, captions)


def _pixels(steps: list[Callable[[Image.Image], Image.Image]], row: tuple[Sample, T]) -> tuple[Tensor | Status, T]:
    sample, truth = row
    if sample.status != Status.GOOD:
        return sample.status, truth
    try:
        picture = images.decode(sample.image)
    except SampleError as error:
        return Status(error.status), truth
    for step in steps:
        picture = step(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), truth
