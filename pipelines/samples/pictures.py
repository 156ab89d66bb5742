"""Small tars held in memory whole: pictures of one size as a tensor, and the captions of each."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import webdataset
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Pictures:
    keys: list[str]
    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[list[str]]

    def whole(self, side_px: int) -> Tensor:
        """Every picture at `side_px`, float32 (N, 3, side_px, side_px) in [0, 1]."""
        size = (side_px, side_px)
        return F.interpolate(self.images.float() / 255, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def read_pictures(tars: Sequence[Path]) -> Pictures:
    """The `jpg` and the json's `caption` list of every sample, in order."""
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode("rgb8"))
    return Pictures(
        keys=[sample["__key__"] for sample in samples],
        images=torch.stack([torch.tensor(sample["jpg"]).permute(2, 0, 1) for sample in samples]),
        captions=[sample["json"]["caption"] for sample in samples],
    )
