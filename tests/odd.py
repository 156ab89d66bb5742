"""Odd images and odd captions, each with the status and captions that are to come of it."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reinforce.data.status import Status

GOOD = Status.GOOD
# 8 x 8 pixels of (200, 30, 40), written by libjpeg-turbo's `cjpeg -arithmetic`.
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAI"
    "AAgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AMkd0UQL2v/Z"
)


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    """RGB with no symmetry, so that every way to turn it shows."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, 255 * x * y // (width * height)], -1).astype(np.uint8)
    )


def encode(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def oriented(orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(gradient(), format, exif=exif)


def ycck(y: int, cb: int, cr: int, k: int) -> bytes:
    """A JPEG of one colour in Adobe's YCCK. Pillow writes only CMYK, inverted, so the mark is put on afterwards."""
    data = encode(Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, 255 - k)), "JPEG", quality=100)
    mark = data.index(b"Adobe") + 11
    return data[:mark] + b"\x02" + data[mark + 1 :]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG put together by hand: `rows` with their filter bytes, `extra` chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def flip(data: bytes, position: int, value: int | None = None) -> bytes:
    """With the byte at `position` inverted, or set."""
    position %= len(data)
    return data[:position] + bytes([data[position] ^ 0xFF if value is None else value]) + data[position + 1 :]


def with_scans(progressive: bytes, num: int) -> bytes:
    """A progressive JPEG with its last scan `num` times."""
    last = progressive.rindex(b"\xff\xda")
    return progressive[:last] + num * progressive[last:-2] + progressive[-2:]


def odd_images() -> dict[str, tuple[bytes, Status]]:
    """Image bytes and their status, by key."""
    rgb, red = gradient(), Image.new("RGB", (16, 16), (200, 30, 40))
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    jpg, plain, webp = encode(rgb, "JPEG"), encode(rgb, "PNG"), encode(rgb, "WEBP")
    many = {"save_all": True, "append_images": [rgb.rotate(180)]}
    wide16 = np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 42
    bomb_text = PngInfo()
    bomb_text.add_text("comment", "a" * (2 << 20), zip=True)
    sof, idat, iend = jpg.index(b"\xff\xc0"), plain.index(b"IDAT"), plain[-12:]
    good = {
        "jpeg_grey": encode(rgb.convert("L"), "JPEG"),
        "jpeg_cmyk": encode(red.convert("CMYK"), "JPEG"),
        "jpeg_ycck": ycck(128, 128, 128, 255),
        "jpeg_progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg_of_many_scans": with_scans(encode(rgb, "JPEG", progressive=True), 90),
        "jpeg_with_a_film_behind": jpg + 200 * b"\xff\xda" + b"film",
        "jpeg_of_many_scans_and_a_film": with_scans(encode(rgb, "JPEG", progressive=True), 90) + 200 * b"\xff\xda",
        "jpeg_arithmetic": ARITHMETIC_JPEG,
        "jpeg_mpo": encode(rgb, "MPO", **many),
        "jpeg_mpo_second_frame_cut": encode(rgb, "MPO", **many)[:-100],
        "jpeg_icc_garbage": encode(rgb, "JPEG", icc_profile=b"no profile"),
        "jpeg_exif_broken": encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "jpeg_exif_cut": encode(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff"),
        "jpeg_trailing_garbage": jpg + b"\0garbage" * 30,
        **{f"jpeg_exif_{orientation}": oriented(orientation) for orientation in range(10)},
        "png_palette": encode(rgb.quantize(16), "PNG"),
        "png_palette_transparent": encode(rgb.quantize(16), "PNG", transparency=3),
        "png_palette_alphas": encode(rgb.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        "png_rgba": encode(rgba, "PNG"),
        "png_grey_alpha": encode(rgba.convert("LA"), "PNG"),
        "png_grey_16": encode(Image.fromarray(wide16), "PNG"),
        "png_grey_16_color_key": png(2, 1, 16, 0, b"\0\x12\x34\xab\xcd", chunk(b"tRNS", b"\x12\x34")),
        "png_rgb_16": png(2, 1, 16, 2, b"\0" + bytes(range(12))),
        "png_rgba_16": png(2, 1, 16, 6, b"\0" + bytes(range(16))),
        "png_rgb_color_key": png(2, 1, 8, 2, b"\0" + bytes(range(6)), chunk(b"tRNS", b"\0\0\0\1\0\2")),
        "png_1_bit": encode(rgb.convert("1"), "PNG"),
        "png_animated": encode(rgb, "PNG", **many),
        "png_exif_6": oriented(6, "PNG"),
        "png_exif_broken": encode(rgb, "PNG", exif=b"garbage!"),
        "png_exif_cut": encode(rgb, "PNG", exif=b"II*\0"),
        "webp_exif_6": oriented(6, "WEBP"),
        "webp_lossless": encode(rgb, "WEBP", lossless=True),
        "webp_alpha": encode(rgba, "WEBP"),
        "webp_animated": encode(rgb, "WEBP", **many),
        "one_pixel": encode(Image.new("RGB", (1, 1)), "PNG"),
        "one_row": encode(Image.new("RGB", (4000, 1)), "JPEG"),
        "one_column": encode(Image.new("RGB", (1, 4000)), "WEBP"),
        "png_named_jpg": plain,
        "webp_named_jpg": webp,
    }
    return {
        **{key: (image, Status.GOOD) for key, image in good.items()},
        "zero_bytes": (b"", Status.EMPTY_IMAGE),
        "gif_named_jpg": (encode(rgb, "GIF"), Status.UNKNOWN_IMAGE_FORMAT),
        "bmp_named_jpg": (encode(rgb, "BMP"), Status.UNKNOWN_IMAGE_FORMAT),
        "tiff_named_jpg": (encode(rgb, "TIFF"), Status.UNKNOWN_IMAGE_FORMAT),
        "ico_named_jpg": (encode(rgb, "ICO"), Status.UNKNOWN_IMAGE_FORMAT),
        "html_named_jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", Status.UNKNOWN_IMAGE_FORMAT),
        "svg_named_jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', Status.UNKNOWN_IMAGE_FORMAT),
        "text_named_jpg": (b"not an image", Status.UNKNOWN_IMAGE_FORMAT),
        "random_named_jpg": (np.random.default_rng(0).bytes(999), Status.UNKNOWN_IMAGE_FORMAT),
        "nul_named_jpg": (bytes(999), Status.UNKNOWN_IMAGE_FORMAT),
        "wav_named_webp": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), Status.UNKNOWN_IMAGE_FORMAT),
        "jpeg_cut_in_mark": (jpg[:2], Status.UNKNOWN_IMAGE_FORMAT),
        "jpeg_cut_in_header": (jpg[:30], Status.TRUNCATED_IMAGE),
        "jpeg_cut_in_tables": (jpg[: sof + 4], Status.TRUNCATED_IMAGE),
        "jpeg_cut_in_pixels": (jpg[: len(jpg) * 4 // 5], Status.TRUNCATED_IMAGE),
        "jpeg_cut_before_end": (jpg[:-2], Status.TRUNCATED_IMAGE),
        "jpeg_progressive_cut": (encode(rgb, "JPEG", progressive=True)[:-200], Status.TRUNCATED_IMAGE),
        "jpeg_without_frame": (b"\xff\xd8\xff\xd9", Status.BROKEN_IMAGE),
        "jpeg_of_endless_scans": (with_scans(encode(rgb, "JPEG", progressive=True), 100), Status.BROKEN_IMAGE),
        "jpeg_12_bit": (flip(jpg, sof + 4, 12), Status.BROKEN_IMAGE),
        "jpeg_zero_height": (flip(flip(jpg, sof + 5, 0), sof + 6, 0), Status.BROKEN_IMAGE),
        "jpeg_five_components": (flip(jpg, sof + 9, 5), Status.BROKEN_IMAGE),
        "jpeg_bomb": (jpg[: sof + 5] + b"\xff\xf0\xff\xf0" + jpg[sof + 9 :], Status.TOO_MANY_PIXELS),
        "png_cut_in_header": (plain[:20], Status.TRUNCATED_IMAGE),
        "png_cut_in_pixels": (plain[: len(plain) // 2], Status.TRUNCATED_IMAGE),
        "png_cut_before_end": (plain[:-12], Status.TRUNCATED_IMAGE),
        "png_wrong_crc_of_header": (flip(plain, 29), Status.BROKEN_IMAGE),
        "png_wrong_crc_of_pixels": (flip(plain, -13), Status.BROKEN_IMAGE),
        "png_wrong_crc_and_padding": (flip(plain, -13) + bytes(20), Status.BROKEN_IMAGE),
        "png_flipped_pixel": (flip(plain, idat + 40), Status.BROKEN_IMAGE),
        "png_stream_cut": (plain[: idat - 4] + chunk(b"IDAT", plain[idat + 4 : -99]) + iend, Status.BROKEN_IMAGE),
        "png_without_palette": (png(4, 1, 8, 3, bytes(5)), Status.BROKEN_IMAGE),
        "png_unknown_color": (png(4, 1, 8, 5, bytes(5)), Status.BROKEN_IMAGE),
        "png_without_pixels": (plain[: idat - 4] + iend, Status.BROKEN_IMAGE),
        "png_of_one_row": (png((1 << 26) + 2, 1, 16, 6, bytes(9)), Status.BROKEN_IMAGE),
        "png_text_bomb": (encode(red, "PNG", pnginfo=bomb_text), Status.BROKEN_IMAGE),
        "png_bomb": (png(60000, 60000, 8, 2, bytes(9)), Status.TOO_MANY_PIXELS),
        "png_one_pixel_too_many": (png(89_478_486, 1, 1, 0, bytes(9)), Status.TOO_MANY_PIXELS),
        "webp_cut_in_header": (webp[:13], Status.TRUNCATED_IMAGE),
        "webp_cut_in_pixels": (webp[: len(webp) // 2], Status.TRUNCATED_IMAGE),
        "webp_cut_before_end": (webp[:-1], Status.TRUNCATED_IMAGE),
        "webp_unknown_chunk": (webp[:12] + b"VP9 " + webp[16:], Status.BROKEN_IMAGE),
        "webp_flipped_header": (flip(webp, 23), Status.BROKEN_IMAGE),
        "webp_bomb": (webp[:26] + b"\xff\x3f\xff\x3f" + webp[30:], Status.TOO_MANY_PIXELS),
    }


def odd_captions() -> dict[str, tuple[dict[str, bytes], Status, tuple[str, ...]]]:
    """Caption files by extension, their status, and the captions that come out, by key."""
    deep, half = b"[" * 100_000, b'["\\ud800"]'
    return {
        "txt": ({"txt": b"a dog"}, GOOD, ("a dog",)),
        "white_space": ({"txt": b"  a\tdog\r\n on\xc2\xa0grass \n"}, GOOD, ("a dog on grass",)),
        "byte_order_mark": ({"txt": b"\xef\xbb\xbfa dog"}, GOOD, ("a dog",)),
        "unicode": ({"txt": "犬 🐕 כלב e\u0301".encode()}, GOOD, ("犬 🐕 כלב e\u0301",)),
        "very_long": ({"txt": b"word " * 100_000}, GOOD, (("word " * 100_000).strip(),)),
        "json_list": ({"json": b'["a dog", " a  cat", "a dog", ""]'}, GOOD, ("a dog", "a cat")),
        "json_caption": ({"json": b'{"caption": "a dog", "url": 3}'}, GOOD, ("a dog",)),
        "json_captions": ({"json": b'{"captions": ["b", "c"], "caption": "a"}'}, GOOD, ("a", "b", "c")),
        "json_utf16": ({"json": '["a dog"]'.encode("utf-16")}, GOOD, ("a dog",)),
        "txt_and_json": ({"json": b'["a cat", "a dog"]', "txt": b"a dog"}, GOOD, ("a dog", "a cat")),
        "txt_and_metadata": ({"txt": b"a dog", "json": b'{"width": 3}'}, GOOD, ("a dog",)),
        "txt_and_broken_json": ({"txt": b"a dog", "json": b"{"}, GOOD, ("a dog",)),
        "txt_and_deep_json": ({"txt": b"a dog", "json": deep}, GOOD, ("a dog",)),
        "empty_txt_and_json": ({"txt": b" ", "json": b'["a cat"]'}, GOOD, ("a cat",)),
        "upper_case": ({"TXT": b"a dog"}, GOOD, ("a dog",)),
        "none": ({}, Status.MISSING_CAPTION, ()),
        "only_metadata": ({"json": b'{"width": 3}'}, Status.MISSING_CAPTION, ()),
        "json_null_caption": ({"json": b'{"caption": null}'}, Status.MISSING_CAPTION, ()),
        "other_extension": ({"cls": b"3", "text": b"a dog"}, Status.MISSING_CAPTION, ()),
        "empty": ({"txt": b""}, Status.EMPTY_CAPTION, ()),
        "only_white_space": ({"txt": b" \n\t "}, Status.EMPTY_CAPTION, ()),
        "only_byte_order_mark": ({"txt": b"\xef\xbb\xbf"}, Status.EMPTY_CAPTION, ()),
        "json_empty_caption": ({"json": b'{"caption": ""}'}, Status.EMPTY_CAPTION, ()),
        "latin_1": ({"txt": "un café".encode("latin-1")}, Status.CAPTION_NOT_UTF8, ()),
        "latin_1_and_json": ({"txt": b"caf\xe9", "json": b'["a cat"]'}, Status.CAPTION_NOT_UTF8, ()),
        "utf_16": ({"txt": "a dog".encode("utf-16")}, Status.CAPTION_NOT_UTF8, ()),
        "utf_16_without_mark": ({"txt": "a dog".encode("utf-16-le")}, Status.CAPTION_NOT_TEXT, ()),
        "nul": ({"txt": b"a dog\0"}, Status.CAPTION_NOT_TEXT, ()),
        "json_broken": ({"json": b'{"caption": "a dog"'}, Status.CAPTION_JSON_BROKEN, ()),
        "json_broken_and_empty_txt": ({"json": b"[", "txt": b""}, Status.CAPTION_JSON_BROKEN, ()),
        "json_empty": ({"json": b""}, Status.CAPTION_JSON_BROKEN, ()),
        "json_number": ({"json": b"3"}, Status.CAPTION_JSON_BROKEN, ()),
        "json_of_numbers": ({"json": b'["a", 3]'}, Status.CAPTION_JSON_BROKEN, ()),
        "json_deep": ({"json": deep}, Status.CAPTION_JSON_BROKEN, ()),
        "json_half_surrogate": ({"json": half}, Status.CAPTION_JSON_BROKEN, ()),
        "json_nul": ({"json": b'["a\\u0000"]'}, Status.CAPTION_JSON_BROKEN, ()),
        "json_latin_1": ({"json": b'["caf\xe9"]'}, Status.CAPTION_JSON_BROKEN, ()),
    }
