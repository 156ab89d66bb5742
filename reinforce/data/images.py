"""Bytes of an image in, RGB pixels out; or the reason why not.

Pillow's readers are called by name and not through `Image.open`, which hides why a file was refused, takes formats that
nobody asked for, and warns of an image's size before one can look at it.
"""

import io
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from reinforce import process
from reinforce.data.status import Status
from reinforce.errors import SampleError

MAX_PIXELS = 89_478_485  # the limit from which Pillow warns of a decompression bomb: 256 MiB of RGB
WORKING = 25  # bytes a pixel that decoding takes at its worst, of a WebP with transparency, and `resize.ready` after it
AT_ONCE = 1 << 30  # bytes that one process takes for it, in all its threads; a larger picture is decoded alone
WIDE = 1 << 25  # pixels of a row; of more, Pillow may not be able to count the bits, and says that there is no memory
LARGE = 1 << 22  # pixels of a picture after which what a thread has freed goes back to the machine
MAX_SCANS = 100  # of a JPEG: encoders write about ten; each costs a pass over all its pixels, and takes 95 bytes
T = TypeVar("T")
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # of a JPEG, within its pixels
_ARITHMETIC = Counter(bytes([0xC0 + kind]) for kind in (9, 10, 11, 13, 14, 15))
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on broken bytes; found by fuzzing. Not MemoryError: that is no fault of the image.
_FAULTS = (OSError, SyntaxError, ValueError, IndexError, AssertionError, struct.error)

process.pillow_without_warnings()


class _Gate:
    """Lets threads in as long as what they take together stays within `limit`; one is always let in."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def passed(self, num: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + num <= self._limit)
            self._taken += num
        try:
            yield
        finally:
            with self._changed:
                self._taken -= num
                self._changed.notify_all()


_gate = _Gate(AT_ONCE)


def decode(image: bytes) -> Image.Image:
    """The image upright, RGB, uint8: its first frame, over white where transparent, 16-bit values scaled to 8.

    Takes JPEG, PNG and WebP, known by their bytes. Raises SampleError for all that cannot be shown whole.
    """
    return decode_for(lambda picture: picture, image)


def decode_for(use: Callable[[Image.Image], T], image: bytes) -> T:
    """What `use` makes of the image as `decode` gives it. While it works and does not keep the picture, that is within
    the memory that one process takes for decoding. It must not decode another."""
    reader = _reader(image)
    with _faults(reader, image):
        opened = reader(io.BytesIO(image))
        num_pixels = opened.width * opened.height
        if num_pixels > MAX_PIXELS:
            raise Image.DecompressionBombError(f"it has {opened.width} x {opened.height}")
        if reader is JpegImageFile:
            _check_jpeg(image, num_pixels)
    with _gate.passed(WORKING * num_pixels):
        with _faults(reader, image):
            if reader is PngImageFile:
                reader(io.BytesIO(image)).verify()  # reading pixels does not look at their checksums
            _load(opened)
            picture = _upright(opened, _rgb(opened))
        del opened
        used = use(picture)
        del picture
        if num_pixels > LARGE:
            process.give_memory_back()
        return used


@contextmanager
def _faults(reader: type[ImageFile.ImageFile], image: bytes) -> Iterator[None]:
    """What Pillow raises, as SampleError."""
    process.pillow_without_half_images()
    try:
        yield
    except Image.DecompressionBombError as error:
        raise SampleError(Status.TOO_MANY_PIXELS, f"image: over {MAX_PIXELS} pixels: {error}; shrink it") from error
    except _FAULTS as error:
        status = Status.BROKEN_IMAGE if _has_end(image) else Status.TRUNCATED_IMAGE
        fault = str(error) or type(error).__name__
        raise SampleError(status, f"image: {reader.format} cannot be decoded: {fault}; fetch it again") from error


def _reader(image: bytes) -> type[ImageFile.ImageFile]:
    if not image:
        raise SampleError(Status.EMPTY_IMAGE, "image: has no bytes; fetch it again")
    if image.startswith(b"\xff\xd8\xff"):
        return JpegImageFile  # and the first frame of an MPO
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return WebPImageFile
    raise SampleError(
        Status.UNKNOWN_IMAGE_FORMAT, f"image: starts with {image[:12]!r}, and is no JPEG, PNG or WebP; convert it"
    )


def _check_jpeg(image: bytes, num_pixels: int) -> None:
    """Raises ValueError for more scans than an encoder writes, and for more pixels than its bytes can hold, which
    libjpeg would fill up. Only where there may be so many are its segments looked at, one by one."""
    if 512 * len(image) < num_pixels and not _markers(image) & _ARITHMETIC:  # a block of 64 takes a bit at least
        raise ValueError(f"its header says that it has {num_pixels} pixels, and {len(image)} bytes cannot hold so many")
    # Those of a thumbnail, or behind its end, are none of its scans.
    if image.count(b"\xff\xda") > MAX_SCANS and _markers(image)[b"\xda"] > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")


def _markers(image: bytes) -> Counter[bytes]:
    """How often each marker begins a segment of a JPEG, up to its end."""
    found, position = Counter[bytes](), 2
    while (segment := _MARKER.search(image, position)) and segment[1] != b"\xd9":
        found[segment[1]] += 1
        position = segment.end() + int.from_bytes(image[segment.end() : segment.end() + 2], "big")
    return found


def _load(opened: ImageFile.ImageFile) -> None:
    try:
        opened.load()
    except MemoryError:
        if opened.width < WIDE:
            raise
        raise ValueError(f"its rows of {opened.width} pixels are too wide for Pillow") from None


def _has_end(image: bytes) -> bool:
    if image.startswith(b"RIFF"):
        return len(image) >= 8 + int.from_bytes(image[4:8], "little")
    return (b"\xff\xd9" if image.startswith(b"\xff") else b"IEND\xaeB`\x82") in image[-64:]  # some writers pad


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "I;16":  # Pillow would clip
        wide = np.asarray(picture)
        high = (wide >> 8).astype(np.uint8)  # as Pillow does with 16-bit colour
        high[wide == picture.info.get("transparency", -1)] = 255
        return Image.fromarray(high).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer)
    return picture.convert("RGB")


def _upright(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION)
    except _FAULTS:  # broken metadata turns nothing
        return rgb
    turn = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)
