"""A part of a picture as a square: bicubic, as Pillow computes it; with numba the same pixels in less time."""

from functools import cache

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray


def ready(picture: Image.Image) -> Picture:
    """An RGB picture from which many views will be made. With numba it is (H, W) uint32, each the bytes R, G, B and one
    that is not used."""
    return _words(picture) if has_numba() else picture


def mode_and_size(picture: Picture) -> tuple[str, int, int]:
    """Pillow's mode, height and width in pixels."""
    if isinstance(picture, Image.Image):
        return picture.mode, picture.height, picture.width
    return "RGB", *picture.shape


def part(picture: Picture, box: tuple[int, int, int, int]) -> np.ndarray:
    """The part `box` (left, top, right, bottom, in pixels) of an RGB picture, as `ready` would make it with numba."""
    left, top, right, bottom = box
    return _words(picture.crop(box)) if isinstance(picture, Image.Image) else picture[top:bottom, left:right]


def by_pillow(picture: Image.Image, box: tuple[int, int, int, int], side: int) -> Image.Image:
    """That part as a square of `side` pixels, bicubic. data/bicubic.py makes the same of `part`.

    Width first, by our word: from version 13 Pillow would take a tall crop's height first, which rounds differently.
    """
    crop = picture.crop(box)
    narrow = crop.resize((side, crop.height), Image.Resampling.BICUBIC)
    return narrow.resize((side, side), Image.Resampling.BICUBIC)


@cache
def has_numba() -> bool:
    """Loads it: not for a process that makes no views."""
    try:
        from reinforce.data import bicubic, operations  # noqa: F401
    except ImportError:
        return False
    return True


def _words(picture: Image.Image) -> np.ndarray:
    return np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32).reshape(picture.height, picture.width)
