"""Image encoders of timm as teachers: DINOv2 and DINOv3, RADIO, or any other that makes one vector of an image. They
read no texts."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from reinforce import process
from reinforce.config import TIMM, Model
from reinforce.errors import ConfigError
from reinforce.models.weights import loading

with process.model_packages():
    import timm
    from timm.data.config import resolve_model_data_config


class ImageEncoder(nn.Module):
    """An image encoder that is asked as an open_clip model is."""

    def __init__(self, trunk: Any, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.visual = trunk
        self.visual.preprocess_cfg = preprocess_cfg

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) -> (B, D), pooled as its classifier would see it."""
        features: Tensor = self.visual(pixels)
        return features


def check(config: Model) -> None:
    """What can be known to be wrong before anything is downloaded or built. Raises ConfigError."""
    name = config.model.removeprefix(TIMM)
    if not timm.is_model(name):
        near = timm.list_models(f"*{_architecture(config.model)[:12]}*")[:5]
        told = f"it has {', '.join(near)}" if near else "its names: https://huggingface.co/timm"
        raise ConfigError(f"timm has no model '{name}'; {told}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{_architecture(config.model)}.*")]
    if config.pretrained and not os.path.isfile(config.pretrained) and config.pretrained not in tags:
        raise ConfigError(
            f"{config.model}: '{config.pretrained}' is neither a file nor a tag; tags: {', '.join(tags) or 'none'}"
        )


def create(config: Model, random_seed: int | None, image_px: int | None) -> ImageEncoder:
    """With the weights of its file or tag, or of timm's first tag where it names neither. `random_seed`: drawn from it.

    Raises ConfigError where the weights cannot be had or do not fit.
    """
    name, overlay = config.model.removeprefix(TIMM), {}
    if config.pretrained and os.path.isfile(config.pretrained):
        overlay = {"file": config.pretrained}
    elif config.pretrained:
        name = f"{_architecture(config.model)}.{config.pretrained}"
    cfg: Any = timm.get_pretrained_cfg(name)
    sized: dict[str, Any] = {"img_size": image_px} if image_px and cfg.fixed_input_size else {}  # others take any size
    if random_seed is not None:
        torch.manual_seed(random_seed)
    process.timm_without_warnings()
    with loading(config):
        trunk = timm.create_model(
            name,
            pretrained=random_seed is None,
            pretrained_cfg_overlay=overlay,
            num_classes=0,
            **sized,
        )
    data: Any = resolve_model_data_config(trunk)  # type: ignore[no-untyped-call]
    _, height, width = data["input_size"]
    size = (image_px, image_px) if image_px else (height, width)
    kept = {name: data[name] for name in ("mean", "std", "interpolation")}
    return ImageEncoder(trunk, kept | {"size": size, "resize_mode": "squash"})


def architecture(name: str) -> Any:
    """What names that which timm builds."""
    return ["timm", _architecture(name)]


def _architecture(name: str) -> str:
    """timm's name without the tag of its weights."""
    return name.removeprefix(TIMM).partition(".")[0]
