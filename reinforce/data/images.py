"""Bytes of an image in, RGB pixels out; or the reason why not.

Pillow's readers are called by name and not through `Image.open`, which hides why a file was refused, takes formats that
nobody asked for, and warns of an image's size before one can look at it.
"""

import io
import struct

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from reinforce import process
from reinforce.data.shards import Status
from reinforce.errors import SampleError

MAX_PIXELS = 89_478_485  # the limit from which Pillow warns of a decompression bomb: 256 MiB of RGB
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


def decode(image: bytes) -> Image.Image:
    """The image upright, RGB, uint8: its first frame, over white where transparent, 16-bit values scaled to 8.

    Takes JPEG, PNG and WebP, known by their bytes. Raises SampleError for all that cannot be shown whole.
    """
    reader = _reader(image)
    process.pillow_without_half_images()
    try:
        picture = reader(io.BytesIO(image))
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"it has {picture.width} x {picture.height}")
        if reader is PngImageFile:
            reader(io.BytesIO(image)).verify()  # reading pixels does not look at their checksums
        picture.load()
        return _upright(picture, _rgb(picture))
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
