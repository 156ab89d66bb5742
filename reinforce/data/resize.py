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


def resized(picture: Picture, box: tuple[int, int, int, int], side: int) -> Image.Image:
    """The part `box` (left, top, right, bottom, in pixels) of an RGB picture as a square of `side` pixels.

    Width first, by our word: from version 13 Pillow would take a tall crop's height first, which rounds differently.
    """
    left, top, right, bottom = box
    if isinstance(picture, Image.Image):
        crop = picture.crop(box)
        if not has_numba():
            narrow = crop.resize((side, crop.height), Image.Resampling.BICUBIC)
            return narrow.resize((side, side), Image.Resampling.BICUBIC)
        part = _words(crop)
    else:
        part = picture[top:bottom, left:right]
    from reinforce.data.bicubic import resize

    return Image.fromarray(resize(part, side))


@cache
def has_numba() -> bool:
    """Loads it: not for a process that makes no views."""
    try:
        import reinforce.data.bicubic  # noqa: F401
    except ImportError:
        return False
    return True


def _words(picture: Image.Image) -> np.ndarray:
    return np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32).reshape(picture.height, picture.width)
