"""Trains a CoCa, which `clip-train fit` does not know: contrastive and captioning loss together, with the weights that
CoCa gives them (Yu et al. 2022, arXiv 2205.01917). Batches and schedule are the trainer's.
"""

import copy
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reinforce.config import Captioner
from reinforce.models import tensorfile
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip
from reinforce.progress import Progress
from train.config import TrainConfig
from train.data.loader import Loader
from train.data.mixture import source_of
from train.students import CONFIG, WEIGHTS
from train.trainer import lr_at

PATCH_DROPOUT = 0.5  # half of a ViT's patches are left out in training


def learn_to_caption(described: Path, folder: Path, config: TrainConfig, begin: Path | None = None) -> None:
    """Train the CoCa that the folder `described` describes, on the tars and for the epochs or steps of `config`, into
    `folder`; its weights are written last. It begins anew, its image tower with that of the CLIP in `begin`."""
    with tempfile.TemporaryDirectory() as there:
        start = Path(there)
        copy_description(described, start)
        whole = json.loads((start / CONFIG).read_text())
        (start / CONFIG).write_text(json.dumps(in_training(whole)))
        coca = FrozenModel(Captioner(model=f"local-dir:{start}"), torch.device("cpu"), random_seed=config.seed)
        if begin:
            tower, _ = tensorfile.load(begin / WEIGHTS)
            tower = {name: t for name, t in tower.items() if name.startswith("visual.") and name != "visual.proj"}
            coca.model.load_state_dict(tower, strict=False)
        loader = Loader(
            source_of(config), coca.image_px, coca.tokenizer, config.global_batch_size, config.streams, config.seed
        )
        _train(coca, loader, config.steps or round(config.epochs * loader.steps_per_epoch), config)
        copy_description(described, folder)
        save_halves(coca.model.state_dict(), folder)


def in_training(config: dict[str, Any]) -> dict[str, Any]:
    """The open_clip_config.json of the same model, with patches left out where it is a ViT."""
    changed = copy.deepcopy(config)
    if "patch_size" in changed["model_cfg"]["vision_cfg"]:
        changed["model_cfg"]["vision_cfg"]["patch_dropout"] = PATCH_DROPOUT
    return changed


def copy_description(described: Path, folder: Path) -> None:
    """A model's folder but for its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in described.iterdir():
        if path.name != WEIGHTS:
            shutil.copyfile(path, folder / path.name)


def save_halves(tensors: dict[str, Tensor], folder: Path) -> None:
    """Weights into a model's folder, as float16."""
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    tensorfile.save(halves, folder / WEIGHTS)


def _train(coca: FrozenModel, loader: Loader, num_steps: int, config: TrainConfig) -> None:
    model = coca.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.wd
    )
    progress = Progress(num_steps, "step", title="coca")
    for step, batch in enumerate(loader.batches(0, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, num_steps, config)
        loss = _loss(model, coca.normalise(batch.images), *batch.tokens.values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        progress.add(f"loss {loss.item():.2f}")
    progress.close()


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
