import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile

from reinforce.data.images import decode
from reinforce.data.status import Status
from reinforce.errors import SampleError
from tests.odd import ARITHMETIC_JPEG, encode, gradient, odd_images, oriented, png, ycck

# pytest replaces the filters of the process, and with them the one that `reinforce.data.images` sets
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

ODD = odd_images()
SIDES = {"one_pixel": (1, 1), "one_row": (4000, 1), "one_column": (1, 4000), "jpeg_arithmetic": (8, 8)}


def near(picture: Image.Image, expected: Image.Image, tolerance: int) -> bool:
    differences = np.abs(np.asarray(picture, np.int16) - np.asarray(expected.convert("RGB"), np.int16))
    return picture.size == expected.size and differences.max() <= tolerance


def colors(data: bytes) -> list[tuple[int, ...]]:
    """Of the first row."""
    return [tuple(map(int, color)) for color in np.asarray(decode(data))[0]]


@pytest.mark.parametrize("key", ODD)
def test_what_comes_of_an_odd_image(key: str) -> None:
    image, expected = ODD[key]
    if expected == Status.GOOD:
        picture = decode(image)
        assert (picture.mode, np.asarray(picture).dtype.name) == ("RGB", "uint8")
        assert picture.size == SIDES[key] if key in SIDES else min(picture.size) > 0
    else:
        with pytest.raises(SampleError) as caught:
            decode(image)
        assert caught.value.status == expected
        assert str(caught.value).startswith("image: ") and ": ;" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, format: str) -> None:
    stored = decode(oriented(1, format))
    x, y = stored.width - 1, stored.height - 1
    # EXIF 2.32, tag 0x0112: which stored pixel is shown in the upper left corner, and which to the right of it
    corner, right = {
        1: ((0, 0), (1, 0)),
        2: ((x, 0), (x - 1, 0)),
        3: ((x, y), (x - 1, y)),
        4: ((0, y), (1, y)),
        5: ((0, 0), (0, 1)),
        6: ((0, y), (0, y - 1)),
        7: ((x, y), (x, y - 1)),
        8: ((x, 0), (x, 1)),
    }[orientation]
    shown = decode(oriented(orientation, format))
    assert shown.size == (stored.size if orientation < 5 else stored.size[::-1])
    assert shown.getpixel((0, 0)) == stored.getpixel(corner)
    assert shown.getpixel((1, 0)) == stored.getpixel(right)


@pytest.mark.parametrize("key", ["jpeg_exif_0", "jpeg_exif_9", "jpeg_exif_broken", "jpeg_exif_cut", "jpeg_icc_garbage"])
def test_metadata_that_means_nothing_turns_nothing(key: str) -> None:
    assert near(decode(ODD[key][0]), decode(oriented(1)), 0)


@pytest.mark.parametrize(
    "key, tolerance",
    [
        ("jpeg_progressive", 20),
        ("jpeg_mpo", 20),
        ("jpeg_mpo_second_frame_cut", 20),
        ("jpeg_trailing_garbage", 20),
        ("png_palette", 80),
        ("png_exif_broken", 0),
        ("png_exif_cut", 0),
        ("png_animated", 0),
        ("png_named_jpg", 0),
        ("webp_lossless", 0),
        ("webp_animated", 20),
        ("webp_named_jpg", 20),
    ],
)
def test_the_picture_and_the_first_of_several(key: str, tolerance: int) -> None:
    assert near(decode(ODD[key][0]), gradient(), tolerance)


def test_colors_of_print() -> None:
    # (255 - C)(255 - K) / 255: no ink is white, all of one is its complement
    for cmyk, rgb in [((0, 0, 0, 0), (255,) * 3), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 155), (100,) * 3)]:
        image = encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
        assert near(decode(image), Image.new("RGB", (16, 16), rgb), 3)
    # Adobe stores inks inverted, and YCCK the complement of what is stored: for red that is cyan, without black
    assert near(decode(ycck(179, 171, 0, 255)), Image.new("RGB", (16, 16), (255, 0, 0)), 3)
    assert near(decode(ARITHMETIC_JPEG), Image.new("RGB", (8, 8), (200, 30, 40)), 2)


def test_transparent_is_over_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        rgba.putpixel((x, 0), (200, 100, 0, alpha))
    over = [(255, 255, 255), (244, 224, 204), (200, 100, 0)]  # 255 + (color - 255) * alpha / 255
    assert colors(encode(rgba, "PNG")) == over
    assert colors(encode(rgba, "WEBP", lossless=True, exact=True)) == over
    assert colors(encode(rgba.convert("LA"), "PNG"))[0] == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert colors(encode(palette, "PNG")) == [(200, 100, 0), (0, 0, 255)]
    assert colors(encode(palette, "PNG", transparency=0)) == [(255, 255, 255), (0, 0, 255)]
    assert colors(encode(palette, "PNG", transparency=b"\x33\x00")) == [(244, 224, 204), (255, 255, 255)]
    assert colors(ODD["png_rgb_color_key"][0]) == [(255, 255, 255), (3, 4, 5)]


def test_16_bits_are_scaled() -> None:
    grey = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], np.uint16)
    assert [color[0] for color in colors(encode(Image.fromarray(grey), "PNG"))] == [0, 0, 1, 0x12, 0x80, 0xFF]
    assert colors(png(1, 1, 16, 2, b"\0\x12\x34\x80\x00\xff\xff")) == [(0x12, 0x80, 0xFF)]
    assert colors(ODD["png_grey_16_color_key"][0]) == [(255,) * 3, (0xAB,) * 3]
    assert colors(png(2, 1, 16, 6, b"\0" + b"\xff\0" * 3 + b"\0\0" + b"\x12\0" * 3 + b"\xff\xff")) == [
        (255,) * 3,
        (0x12,) * 3,
    ]


def test_grey_and_black_and_white() -> None:
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    assert colors(encode(grey, "PNG")) == [(0,) * 3, (7,) * 3, (255,) * 3]
    assert colors(encode(grey.point(lambda v: v > 100 and 255, "1"), "PNG")) == [(0,) * 3, (0,) * 3, (255,) * 3]


@pytest.mark.parametrize(
    "format, options",
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_a_cut_image_is_whole_or_refused(format: str, options: dict[str, bool]) -> None:
    image = encode(gradient(24, 20), format, **options)
    whole, refused = decode(image), 0
    for end in range(len(image)):
        try:
            assert near(decode(image[:end]), whole, 0)
        except SampleError:
            refused += 1
    assert refused > len(image) - 5  # but for the checksum of PNG's end


def test_a_cut_image_is_refused_where_another_library_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for key in ("jpeg_cut_in_pixels", "png_cut_in_pixels", "png_stream_cut"):
        with pytest.raises(SampleError):
            decode(ODD[key][0])


def test_damage_of_any_kind_has_a_status() -> None:
    rng, statuses = random.Random(0), set()
    images = [image for image, _ in ODD.values() if 0 < len(image) < 10_000]
    for _ in range(600):
        data = bytearray(rng.choice(images))
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(min(len(data), rng.choice([60, 10_000])))] = rng.randrange(256)
        try:
            decode(bytes(data))
        except SampleError as error:
            statuses.add(error.status)
    assert len(statuses) > 3


def test_the_most_pixels_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reinforce.data.images.MAX_PIXELS", 100)
    for format in ("JPEG", "PNG", "WEBP"):
        assert decode(encode(Image.new("RGB", (20, 5)), format)).size == (20, 5)
        with pytest.raises(SampleError, match="over 100 pixels: it has 101 x 1; shrink it"):
            decode(encode(Image.new("RGB", (101, 1)), format))


@pytest.mark.heavy
def test_no_warning_leaks() -> None:
    script = (
        "from tests.odd import odd_images\n"
        "from reinforce import errors\n"
        "from reinforce.data import images\n"
        "for image, _ in odd_images().values():\n"
        "    try: images.decode(image)\n"
        "    except errors.SampleError: pass\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True)
    assert "PIL" not in done.stderr
