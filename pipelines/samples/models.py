"""Small CLIP and CoCa models, trained on small tars in minutes on two cores, kept as open_clip `local-dir:` folders.

One thread a model, so that two train side by side and the sums do not depend on how many cores there are.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pipelines.samples.emoji import TEMPLATES
from pipelines.samples.pictures import Pictures
from reinforce.models.open_clip import open_clip

WEIGHTS = "open_clip_model.safetensors"
VOCABULARY = "bpe.txt.gz"
VOCABULARY_SIZE = 2000
LEARNING_RATE = 1e-3
WORKING_PX = 96  # pictures are brought to it before crops are taken, between the models' sizes and the files' 128


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """`model_cfg` of open_clip, what its images look like, and how it is trained.

    Half of a ViT's patches are left out in training. `image_tower`: the model trained before, whose tower this one
    starts from.
    """

    model_cfg: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int
    batch_size: int
    patch_dropout: float | None = None
    image_tower: str | None = None

    @property
    def image_px(self) -> int:
        return int(self.model_cfg["vision_cfg"]["image_size"])

    @property
    def is_coca(self) -> bool:
        return "multimodal_cfg" in self.model_cfg

    def normalise(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        return (images - mean) / std


def _text_cfg(**cfg: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY_SIZE, "tokenizer_kwargs": {"bpe_path": VOCABULARY}, **cfg}


VIT = {"image_size": 64, "patch_size": 8, "width": 128, "head_width": 32, "layers": 6}
MODELS = {
    "teacher_vit": SmallModel(
        model_cfg={
            "embed_dim": 128,
            "quick_gelu": True,
            "vision_cfg": VIT,
            "text_cfg": _text_cfg(context_length=24, width=96, heads=3, layers=3),
        },
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        epochs=50,
        batch_size=128,
        patch_dropout=0.5,
    ),
    "teacher_conv": SmallModel(
        model_cfg={
            "embed_dim": 96,
            "vision_cfg": {"image_size": 80, "width": 16, "head_width": 32, "layers": [1, 1, 1, 1]},
            "text_cfg": _text_cfg(context_length=28, width=128, heads=4, layers=2),
        },
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        epochs=50,
        batch_size=128,
    ),
    "coca": SmallModel(
        model_cfg={
            "embed_dim": 128,
            "custom_text": True,
            "vision_cfg": {
                **VIT,
                "attentional_pool": True,
                "attn_pooler_queries": 32,
                "attn_pooler_heads": 4,
                "output_tokens": True,
            },
            "text_cfg": _text_cfg(context_length=30, width=128, heads=4, layers=2, embed_cls=True, output_tokens=True),
            "multimodal_cfg": {
                "context_length": 30,
                "vocab_size": VOCABULARY_SIZE,
                "width": 128,
                "heads": 4,
                "layers": 2,
                "attn_pooler_heads": 4,
            },
        },
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        epochs=40,
        batch_size=64,
        patch_dropout=0.5,
        image_tower="teacher_vit",
    ),
}


def train(name: str, pictures: Pictures, folder: Path, seed: int) -> None:
    """Train MODELS[name] on `pictures`: to `folder`, where its VOCABULARY is, its configuration and float16 weights."""
    small = MODELS[name]
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    preprocess = {"size": small.image_px, "mean": small.mean, "std": small.std}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": small.model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")

    model, tokenizer = _create(small, folder)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    steps_an_epoch = len(pictures.images) // small.batch_size
    steps = steps_an_epoch * small.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    progress = tqdm(total=steps, desc=name, position=list(MODELS).index(name))
    for _ in range(small.epochs):
        order = rng.permutation(len(pictures.images))[: steps_an_epoch * small.batch_size]
        for rows in order.reshape(steps_an_epoch, small.batch_size):
            images = small.normalise(augment(pictures.images[torch.from_numpy(rows)], small.image_px, rng))
            text = tokenizer([_pick(pictures.captions[row], rng, plain=small.is_coca) for row in rows])
            loss = _caption_loss(model, images, text) if small.is_coca else _clip_loss(model, images, text)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    progress.close()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)


def augment(images: Tensor, side_px: int, rng: np.random.Generator) -> Tensor:
    """Random crops, with the geometry and the colours of some changed as RandAugment would.

    uint8 (B, 3, H, W) to float32 (B, 3, side_px, side_px) in [0, 1].
    """
    num = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (num, 1, 1, 1))).float()

    def some(share: float) -> Tensor:
        return torch.from_numpy(rng.random((num, 1, 1, 1)) < share)

    def shift(room: Tensor) -> Tensor:
        return uniform(-1, 1).flatten() * room + (uniform(-0.2, 0.2) * some(0.2)).flatten()

    x = F.interpolate(images.float() / 255, size=(WORKING_PX, WORKING_PX), mode="area")
    scale = uniform(0.15, 1.0).flatten().sqrt()
    stretch = uniform(math.log(3 / 4) / 2, math.log(4 / 3) / 2).flatten().exp()
    width, height = (scale * stretch).clamp(max=1), (scale / stretch).clamp(max=1)
    turn = (uniform(-0.4, 0.4) * some(0.4)).flatten()
    shear = (uniform(-0.3, 0.3) * some(0.3)).flatten()
    cos, sin = turn.cos(), turn.sin()
    row_x = [width * cos, width * (shear * cos - sin), shift(1 - width)]
    row_y = [height * sin, height * (shear * sin + cos), shift(1 - height)]
    affine = torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)
    # What lies outside is white as the pictures' background, or black as RandAugment leaves it.
    fill = some(0.5).float()
    grid = F.affine_grid(affine, [num, 3, side_px, side_px], align_corners=False)
    x = F.grid_sample(x - fill, grid, align_corners=False) + fill

    grey = x.mean(1, keepdim=True)
    x = torch.where(some(0.3), grey + (x - grey) * uniform(0.2, 1.8), x)  # saturation
    mean = grey.mean((2, 3), keepdim=True)
    x = torch.where(some(0.3), mean + (x - mean) * uniform(0.3, 1.7), x)  # contrast
    x = torch.where(some(0.3), x * uniform(0.4, 1.6), x).clamp(0, 1)  # brightness
    x = torch.where(some(0.1), (x * 7).round() / 7, x)  # posterize
    return torch.where(some(0.1) & (x > uniform(0.3, 1)), 1 - x, x)  # solarize


def _create(small: SmallModel, folder: Path) -> tuple[Any, Any]:
    context_length = small.model_cfg["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(str(folder / VOCABULARY), context_length=context_length)
    model = open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, force_patch_dropout=small.patch_dropout, output_dict=True
    ).train()
    if small.is_coca:  # open_clip 3.3 leaves this one as it was in memory
        nn.init.normal_(model.text_decoder.text_projection, std=small.model_cfg["embed_dim"] ** -0.5)
    if small.image_tower:
        weights = load_file(folder.parent / small.image_tower / WEIGHTS)
        tower = {name: value for name, value in weights.items() if name.startswith("visual.") and name != "visual.proj"}
        model.load_state_dict(tower, strict=False)
    return model, tokenizer


def _pick(captions: list[str], rng: np.random.Generator, plain: bool) -> str:
    """One of a picture's captions; where not `plain`, with templates and keywords (the last) among them."""
    if plain:
        return captions[rng.integers(max(1, len(captions) - 1))]
    caption = captions[rng.integers(len(captions))]
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(caption) if caption == captions[0] else caption


def _clip_loss(model: Any, images: Tensor, text: Tensor) -> Tensor:
    out = model(images, text)
    loss: Tensor = open_clip.ClipLoss()(out["image_features"], out["text_features"], out["logit_scale"])
    return loss


def _caption_loss(model: Any, images: Tensor, text: Tensor) -> Tensor:
    image, image_tokens = model.visual(images)
    words, word_tokens = model.text(text)
    end = int(text.count_nonzero(dim=1).max())  # beyond it all is padding, which the decoder need not read
    logits = model.text_decoder(image_tokens, word_tokens[:, : end - 1])
    contrastive, caption = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        F.normalize(image, dim=-1), F.normalize(words, dim=-1), logits, text[:, 1:end], model.logit_scale.exp()
    )
    loss: Tensor = contrastive + caption
    return loss
