"""Images in, C captions each out: a CoCa with its tokenizer, its preprocessing and its random numbers."""

from itertools import takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image

from reinforce.config import Captioner as CaptionerConfig
from reinforce.data.draws import uniforms
from reinforce.models import coca
from reinforce.models.device import send
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
        self._decoder = self.decoder(graphs=device.type == "cuda")
        if device.type != "cpu":
            self.frozen.hold()
        preprocess_cfg = open_clip.transform.PreprocessCfg(**self.frozen.preprocess_cfg)
        steps = open_clip.transform.image_transform_v2(preprocess_cfg, is_train=False).transforms
        # What comes after is arithmetic for the device, where a quarter of the bytes has to go.
        self._on_pictures = list(takewhile(lambda step: not isinstance(step, open_clip.transform.ToTensor), steps))

    def decoder(self, graphs: bool) -> coca.Decoder:
        """What writes the captions: tokens of images as the model takes them."""
        tokenizer = self.frozen.tokenizer
        return coca.Decoder(self.frozen.model, self.config, tokenizer.sot_token_id, tokenizer.eot_token_id, graphs)

    def preprocess(self, picture: Image.Image) -> np.ndarray:
        """An image as the model was trained to see it, whole: resized and centre-cropped, uint8 (side, side, 3)."""
        for step in self._on_pictures:
            picture = step(picture)
        return np.asarray(picture)

    def caption(self, pixels: np.ndarray, seed: int, set_name: str, keys: list[str]) -> list[list[str]]:
        """uint8 (n, side, side, 3), n at most the batch size -> C lists of n captions. A caption may be empty."""
        tokenizer, num = self.frozen.tokenizer, len(keys)
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], self.batch_size - num, axis=0)])
        numbers = np.zeros((self.batch_size, self.config.num_captions, self.config.max_tokens))
        for i, key in enumerate(keys):
            for index in range(self.config.num_captions):
                numbers[i, index] = uniforms(seed, f"text/{set_name}", key, index, self.config.max_tokens)
        with torch.inference_mode(), self.frozen.autocast():
            images = self.frozen.normalise(send(padded, self.frozen.device))
            tokens = self._decoder.generate(images, numbers)
        sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id
        return [
            [coca.caption_text(tokens[i, index], tokenizer, sot, eot) for i in range(num)]
            for index in range(self.config.num_captions)
        ]

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this captioner."""
        return self.frozen.describe()
