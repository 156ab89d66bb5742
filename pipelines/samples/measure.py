"""What the small models do on the held-out pictures, as plain numbers and texts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.samples import emoji
from pipelines.samples.models import CLIPS
from reinforce.config import Captioner as CaptionerConfig
from reinforce.data import images, shards
from reinforce.models.captioner import Captioner
from train import students
from train.evaluation import metrics
from train.evaluation.sets import EvalSet

HELDOUT = "heldout/00000.tar"


def measure(out: Path) -> dict[str, Any]:
    """Of the models in `out/models` on the tar `out/heldout`."""
    heldout = dict(captions_of(out / HELDOUT))
    phrases = [captions[0] for captions in heldout.values()]
    written = write_captions(out)
    return {
        "num_samples": {
            "train": sum(1 for tar in (out / "train").glob("*.tar") for _ in captions_of(tar)),
            "heldout": len(heldout),
        },
        "teachers": {name: retrieval(out, name) for name in CLIPS},
        "coca_word_f1": round(sum(map(word_f1, phrases, written)) / len(phrases), 3),
        "coca_captions": [
            {"key": key, "phrase": phrase, "written": caption}
            for key, phrase, caption in zip(heldout, phrases, written, strict=True)
        ],
    }


def captions_of(tar: Path) -> Iterator[tuple[str, list[str]]]:
    """Key and captions (emoji.describe) of every picture in a tar."""
    for key, parts in shards.read_parts(shards.Shard(tar.stem, str(tar)), ("json",)):
        yield key, json.loads(parts["json"])["caption"]


def retrieval(out: Path, name: str) -> dict[str, float]:
    """Recall at 1 and 5 of a picture's phrase among all, and of the picture among all; and how often a matching pair
    is more alike than a pair with another phrase."""
    clip = students.create(str(out / "models" / name))
    clip.model.eval()
    pictures = EvalSet(str(out / HELDOUT)).load(clip.preprocess_cfg).images
    phrases = [captions[0] for _, captions in captions_of(out / HELDOUT)]
    image_features, text_features = metrics.embed_images(clip, pictures, 256), metrics.embed_texts(clip, phrases, 256)
    recall = metrics.retrieval(image_features, text_features, torch.arange(len(phrases)))
    alike = image_features @ text_features.T
    above = (alike.diagonal()[:, None] > alike).sum().item() / (len(alike) * (len(alike) - 1))
    kept = {name: recall[name] for way in ("text", "image") for k in (1, 5) if (name := f"{way}_retrieval_recall@{k}")}
    return {key: round(value, 3) for key, value in (kept | {"matching_above_other": above}).items()}


def write_captions(out: Path) -> list[str]:
    """The CoCa's greedy caption of every held-out picture."""
    config = CaptionerConfig(model=f"local-dir:{out}/models/coca", num_captions=1, sampling="greedy")
    samples = list(shards.read(shards.Shard("heldout", str(out / HELDOUT))))
    captioner = Captioner(config, len(samples), torch.device("cpu"))
    pictures = np.stack([captioner.preprocess(images.decode(sample.image)) for sample in samples])
    return captioner.caption(pictures, 0, "heldout", [sample.key for sample in samples])[0]


def word_f1(phrase: str, written: str) -> float:
    """Harmonic mean of how many words of each are in the other, the small ones and the templates left out."""
    small = set(re.findall(r"\w+", f"{emoji.TEMPLATES} the with and"))
    wanted, got = (set(re.findall(r"\w+", text.lower())) - small for text in (phrase, written))
    return 2 * len(wanted & got) / (len(wanted) + len(got)) if wanted and got else 0.0
