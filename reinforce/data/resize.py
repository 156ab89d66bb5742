"""A part of a picture as a square: bicubic, as Pillow computes it; with numba the same pixels in less time."""

import logging
from functools import cache

import numpy as np
from PIL import Image

from reinforce.errors import ReplayError

log = logging.getLogger(__name__)

Picture = Image.Image | np.ndarray


def ready(picture: Image.Image) -> Picture:
    """An RGB picture from which many views will be made. With numba it is (H, W) uint32, each the bytes R, G, B and one
    that is not used."""
    return _words(picture) if has_numba() else picture


def mode_and_size(picture: Picture) -> tuple[str, int, int]:
    """Pillow's mode, height and width in pixels. Raises ReplayError where it is no picture."""
    if isinstance(picture, Image.Image):
        return picture.mode, picture.height, picture.width
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint32 or picture.ndim != 2:
        raise ReplayError("a picture is Pillow's, or what `resize.ready` made of one; of an array: Image.fromarray")
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
    """Whether numba makes views. Loads it and what it has compiled: not for a process that makes no views.

    Its files on the disk may be half written, after a power cut or on a full disk. Then Pillow makes the same views,
    in more time.
    """
    try:
        from reinforce.data import bicubic, operations
    except ImportError:
        return False
    whole = _words(Image.new("RGB", (2, 2)))
    try:
        for words in (whole, whole[:, :1]):  # numba compiles for lines that follow each other, and for others
            operations.operate(bicubic.resize(words, 1), np.zeros(0, np.int64), np.zeros((0, operations.MOST_NUMBERS)))
    except Exception as error:  # of files that are not whole, pickle raises nearly anything
        folder = operations.operate.stats.cache_path  # type: ignore[attr-defined]
        log.warning(
            "numba cannot read or write what it has compiled in %s (%s: %s), so views take twice the time; delete that "
            "folder, or name another in NUMBA_CACHE_DIR",
            *(folder, type(error).__name__, error),
        )
        return False
    return True


def _words(picture: Image.Image) -> np.ndarray:
    return np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32).reshape(picture.height, picture.width)
