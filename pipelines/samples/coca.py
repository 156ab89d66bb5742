"""Trains the small CoCa of the samples, on phrases."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.experiments.captioner import learn_to_caption
from pipelines.samples.models import COCA, TRAINING, describe, train_clip
from reinforce.data import shards
from train.config import TrainConfig


def train_vit_and_coca(out: Path, vocabulary: bytes) -> None:
    """One after the other, since the CoCa starts from the ViT's tower."""
    train_clip("teacher_vit", out, vocabulary)
    train_coca(out, vocabulary)


def train_coca(out: Path, vocabulary: bytes, epochs: int = 40) -> None:
    """Train COCA on the tars in `out/train` into `out/models/coca`. Its image tower starts from that of
    `out/models/teacher_vit`, which is there already."""
    with tempfile.TemporaryDirectory() as folder:
        describe(COCA, Path(folder) / "coca", vocabulary)
        config = TrainConfig().but(**TRAINING, shards=_phrases(out, Path(folder)), global_batch_size=64, epochs=epochs)
        learn_to_caption(Path(folder) / "coca", out / "models/coca", config, out / "models/teacher_vit")


def _phrases(out: Path, folder: Path) -> str:
    """The same pictures with phrases for captions: without the template of `txt`, and without the keywords, which are
    the last of several captions. A captioner should write neither."""

    def samples(shard: shards.Shard) -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, parts in shards.read_parts(shard, ("jpg", "json")):
            captions = json.loads(parts["json"])["caption"]
            yield key, {"jpg": parts["jpg"], "json": json.dumps(captions[:-1] or captions).encode()}

    for shard in shards.expand(f"{out}/train/*.tar"):
        shards.write(str(folder / f"{shard.name}.tar"), samples(shard))
    return f"{folder}/*.tar"
