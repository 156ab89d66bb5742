"""Images in, C captions each out: a CoCa with its tokenizer, its preprocessing and its random numbers."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reinforce.config import Captioner as CaptionerConfig
from reinforce.data.draws import uniforms
from reinforce.models import coca
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip


class Captioner:
    """One frozen CoCa. Every forward pass has the same shape, as with teachers."""

    def __init__(
        self, config: CaptionerConfig, batch_size: int, device: torch.device, random_seed: int | None = None
    ) -> None:
        """Raises ConfigError where the model is no CoCa that can be decoded here."""
        self.frozen = FrozenModel(config, device, random_seed)
        self.config, self.batch_size = config, batch_size
        coca.check(self.frozen.model, config)
        preprocess_cfg = open_clip.transform.PreprocessCfg(**self.frozen.preprocess_cfg)
        self._transform = open_clip.transform.image_transform_v2(preprocess_cfg, is_train=False)

    def preprocess(self, picture: Image.Image) -> Tensor:
        """An image as the model was trained to see it, whole: resized and centre-cropped, float32 (3, H, W)."""
        pixels: Tensor = self._transform(picture)
        return pixels

    def caption(self, inputs: Tensor, seed: int, set_name: str, keys: list[str]) -> list[list[str]]:
        """float32 (n, 3, H, W), n at most the batch size -> C lists of n captions. A caption may be empty."""
        tokenizer, num = self.frozen.tokenizer, len(keys)
        padded = torch.cat([inputs, inputs[-1:].expand(self.batch_size - num, *inputs.shape[1:])])
        numbers = np.zeros((self.batch_size, self.config.num_captions, self.config.max_tokens))
        for i, key in enumerate(keys):
            for index in range(self.config.num_captions):
                numbers[i, index] = uniforms(seed, f"text/{set_name}", key, index, self.config.max_tokens)
        sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id
        with torch.inference_mode(), self.frozen.autocast():
            tokens = coca.generate(
                self.frozen.model, padded.to(self.frozen.device), self.config, numbers, sot, eot
            ).cpu()
        return [
            [coca.caption_text(tokens[i, index], tokenizer, sot, eot) for i in range(num)]
            for index in range(self.config.num_captions)
        ]

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this captioner."""
        return self.frozen.describe()
