"""Trains the small CoCa, which `clip-train fit` does not know: contrastive and captioning loss together, with the
weights of CoCa (Yu et al. 2022, arXiv 2205.01917). Batches and schedule are the trainer's.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pipelines.samples.models import COCA, TRAINING, describe, in_training, keep, train_clip
from reinforce.config import Captioner
from reinforce.data import shards
from reinforce.models import tensorfile
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip
from train.config import TrainConfig
from train.data.loader import Loader
from train.data.sources import source_of
from train.students import WEIGHTS
from train.trainer import lr_at


def train_vit_and_coca(out: Path, vocabulary: bytes) -> None:
    """One after the other, since the CoCa starts from the ViT's tower."""
    train_clip("teacher_vit", out, vocabulary)
    train_coca(out, vocabulary)


def train_coca(out: Path, vocabulary: bytes, epochs: int = 40) -> None:
    """Train COCA on the tars in `out/train` into `out/models/coca`. Its image tower starts from that of
    `out/models/teacher_vit`, which is there already."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "coca"
        describe(in_training(COCA), start, vocabulary)
        config = TrainConfig().but(**TRAINING, shards=_phrases(out, Path(folder)), global_batch_size=64)
        coca = FrozenModel(Captioner(model=f"local-dir:{start}"), torch.device("cpu"), random_seed=config.seed)
        tower, _ = tensorfile.load(out / "models/teacher_vit" / WEIGHTS)
        tower = {name: t for name, t in tower.items() if name.startswith("visual.") and name != "visual.proj"}
        coca.model.load_state_dict(tower, strict=False)
        loader = Loader(
            source_of(config), coca.image_px, coca.tokenizer, config.global_batch_size, config.streams, config.seed
        )
        _train(coca, loader, epochs * loader.steps_per_epoch, config)
        tensorfile.save(coca.model.state_dict(), start / WEIGHTS)
        describe(COCA, out / "models/coca", vocabulary)
        keep(start / WEIGHTS, out / "models/coca")


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


def _train(coca: FrozenModel, loader: Loader, num_steps: int, config: TrainConfig) -> None:
    model = coca.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.wd
    )
    progress = tqdm(loader.batches(0, num_steps), "coca", num_steps)
    for step, batch in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, num_steps, config)
        loss = _loss(model, coca.normalise(batch.images), *batch.tokens.values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def _loss(model: Any, images: Tensor, text: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) and tokens (B, T)."""
    image, image_tokens = model.visual(images)
    words, word_tokens = model.text(text)
    end = int(text.count_nonzero(dim=1).max())  # beyond it all is padding, which the decoder need not read
    logits = model.text_decoder(image_tokens, word_tokens[:, : end - 1])
    contrastive, caption = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        F.normalize(image, dim=-1), F.normalize(words, dim=-1), logits, text[:, 1:end], model.logit_scale.exp()
    )
    loss: Tensor = contrastive + caption
    return loss
