"""Views: as torchvision's to the last bit, a function of their name alone, and the same scene at every size."""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reinforce.config import ViewSet
from reinforce.data import augment
from reinforce.errors import ReplayError
from reinforce.process import import_torchvision

import_torchvision()
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop, autoaugment  # noqa: E402
from torchvision.transforms import functional as F  # noqa: E402

PLAIN = ViewSet()
NAMES = [op.name for op in augment.OPS]
SIGNED_OPS = [(i, sign) for i, op in enumerate(augment.OPS) for sign in ((1, -1) if op.signed else (1,))]
GOLDEN = (
    ([39, 53, 269, 352, 4, 0.135951668024, 3, 0.135951668024], 0xA8C1A3474DE7FA84),
    ([55, 241, 241, 223, 12, 0, 1, 0.090000003576], 0x9E26CBE710F7082F),
    ([119, 136, 234, 181, 13, 0, 2, 0.090000003576], 0xBF41A71C9DFDEC01),
    ([4, 195, 311, 305, 4, -0.135951668024, 9, 0.269999980927], 0xBFBED66E7C8159D5),
    ([15, 86, 345, 396, 10, 7, 8, 0.269999980927], 0xAD519F1609EDE382),
    ([3, 50, 354, 409, 5, 9, 5, -9], 0x0FD65F5313C2A0AD),
)
PILLOW = int(PIL.__version__.split(".")[0])


def picture(seed: int, height: int, width: int, noise: float = 8) -> Image.Image:
    """Soft shapes of all colours, with some noise of a camera."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((soft + random.normal(0, noise, soft.shape)).clip(0, 255).astype(np.uint8))


def draw(
    index: int = 0, key: str = "00000017", size: tuple[int, int] = (375, 500), view_set: ViewSet = PLAIN
) -> np.ndarray:
    return augment.draw(view_set, 0, "base", key, index, size)


def whole(side: int, *ops: float) -> np.ndarray:
    """Parameters of a view that shows all of a square image."""
    return np.array([0, 0, side, side, *ops], dtype=np.float32)


def torchvision_op(view: Image.Image, op_id: int, bin_of_31: int, negative: bool) -> Image.Image:
    magnitudes, _ = RandAugment()._augmentation_space(31, (view.height, view.width))[NAMES[op_id]]
    magnitude = float(magnitudes[bin_of_31].item()) if magnitudes.ndim else 0.0
    magnitude = -magnitude if negative else magnitude
    return autoaugment._apply_op(view, NAMES[op_id], magnitude, InterpolationMode.NEAREST, None)


# As torchvision


def test_the_operations_are_torchvisions_in_order() -> None:
    space = RandAugment()._augmentation_space(31, (224, 224))
    assert list(space) == NAMES
    assert [op.signed for op in augment.OPS] == [signed for _, signed in space.values()]
    for op, (magnitudes, _) in zip(augment.OPS, space.values(), strict=True):
        assert len(op.levels) == 31
        if not op.name.startswith("Translate"):  # there pixels, here a share
            assert list(op.levels) == magnitudes.expand(31).tolist(), op.name


@pytest.mark.parametrize("side", [64, 96, 224, 256, 331])
@pytest.mark.parametrize("bin_of_31", [9, 20, 30])
def test_every_operation_equals_torchvisions(side: int, bin_of_31: int) -> None:
    for seed in range(2):
        image = picture(seed, side, side)
        for op_id, sign in SIGNED_OPS:
            params = whole(side, op_id, sign * augment.OPS[op_id].levels[bin_of_31])
            expected = torchvision_op(image, op_id, bin_of_31, sign < 0)
            view = augment.replay(image, params, (side, side), side)
            np.testing.assert_array_equal(view, np.asarray(expected), err_msg=f"{NAMES[op_id]} {sign}")


def test_translation_is_cut_to_whole_pixels_as_torchvisions_at_every_size() -> None:
    for side in range(8, 1100):
        expected = torch.linspace(0, 150 / 331 * side, 31)
        shares = np.array(augment.OPS[3].levels, dtype=np.float32).tolist()
        assert [augment._pixels(share, side) for share in shares] == [int(pixels) for pixels in expected.tolist()]


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (128, 128), (60, 45)])
@pytest.mark.parametrize("view_px", [96, 224])
def test_whole_views_equal_torchvisions(size: tuple[int, int], view_px: int) -> None:
    num_tall = 0
    for seed in range(12):
        image, params = picture(seed, *size), draw(seed, size=size)
        top, left, height, width = map(int, params[:4])
        one_axis_then_the_other = F.resize(F.crop(image, top, left, height, width), [height, view_px], 3)
        expected = F.resize(one_axis_then_the_other, [view_px, view_px], 3)
        in_one = F.resized_crop(image, top, left, height, width, [view_px, view_px], 3)
        if PILLOW < 13 or height <= width:
            np.testing.assert_array_equal(expected, in_one)
        else:  # Pillow may have taken the height first
            num_tall += 1
            assert np.abs(np.asarray(expected, dtype=int) - np.asarray(in_one)).max() <= 4
        for op_id, magnitude in zip(params[4::2], params[5::2], strict=True):
            expected = torchvision_op(expected, int(op_id), 9, magnitude < 0)
        np.testing.assert_array_equal(augment.replay(image, params, size, view_px), np.asarray(expected))
    assert num_tall < 12


@pytest.mark.parametrize(
    ("size", "view_set"),
    [((375, 500), PLAIN), ((40, 1000), PLAIN), ((900, 300), ViewSet(scale=(0.3, 0.6), ratio=(0.5, 3.0)))],
)
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], view_set: ViewSet) -> None:
    torch.manual_seed(0)
    image, num = Image.new("RGB", size[::-1]), 3000
    scale, ratio = list(view_set.scale), list(view_set.ratio)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(num)], dtype=float)
    ours = np.array([draw(i, size=size, view_set=view_set)[:4] for i in range(num)], dtype=float)
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "area": lambda crop: crop[:, 2] * crop[:, 3],
        "ratio": lambda crop: crop[:, 3] / crop[:, 2],
        "centre, down": lambda crop: crop[:, 0] + crop[:, 2] / 2,
        "centre, across": lambda crop: crop[:, 1] + crop[:, 3] / 2,
    }
    for name, measure in measures.items():
        # Two-sample Kolmogorov-Smirnov at p = 0.001.
        mine, other = np.sort(measure(ours)), np.sort(measure(theirs))
        at = np.concatenate([mine, other])
        distance = np.abs(np.searchsorted(mine, at, "right") - np.searchsorted(other, at, "right")).max() / num
        assert distance < 1.95 * math.sqrt(2 / num), name


def test_the_central_crop_when_no_try_fits_is_torchvisions() -> None:
    all_of_it = ViewSet(scale=(1, 1))
    for size, expected in (((11, 1000), (0, 492, 11, 15)), ((1000, 11), (492, 0, 15, 11))):
        assert RandomResizedCrop.get_params(Image.new("RGB", size[::-1]), [1, 1], [3 / 4, 4 / 3]) == expected
        assert tuple(draw(size=size, view_set=all_of_it)[:4]) == expected
    # Where torchvision's has no pixel, ours has one.
    assert tuple(draw(size=(1, 1), view_set=ViewSet(scale=(1, 1), ratio=(9, 16)))[:4]) == (0, 0, 1, 1)
    assert tuple(draw(size=(1, 1), view_set=ViewSet(scale=(1, 1), ratio=(1 / 16, 1 / 9)))[:4]) == (0, 0, 1, 1)


def test_operations_and_signs_are_drawn_evenly() -> None:
    params = np.array([draw(i) for i in range(6000)])
    first, second = params[:, 4].astype(int), params[:, 6].astype(int)
    for ops, pairs in ((first, 14), (second, 14), (first * 14 + second, 14 * 14)):
        counts = np.bincount(ops, minlength=pairs)
        chi_square = ((counts - len(ops) / pairs) ** 2 / (len(ops) / pairs)).sum()
        assert chi_square < pairs - 1 + 3.3 * math.sqrt(2 * (pairs - 1))  # three sigma and a little
    for op_id, op in enumerate(augment.OPS):
        signs = np.sign(params[:, [5, 7]][params[:, [4, 6]] == op_id])
        assert abs(signs.mean()) < 3.3 / math.sqrt(len(signs)) if op.signed else (signs >= 0).all()


# A function of its name


@pytest.mark.heavy
def test_a_draw_is_the_same_in_any_order_and_in_another_process() -> None:
    alone = np.array([draw(i) for i in range(8)])
    np.testing.assert_array_equal([draw(i) for i in reversed(range(8))], alone[::-1])
    code = (
        "import sys, json; from reinforce.data import augment; from reinforce.config import ViewSet;"
        "heavy = {'torch', 'torchvision', 'zarr', 'ray'} & set(sys.modules);"
        "draws = [augment.draw(ViewSet(), 0, 'base', '00000017', i, (375, 500)).tolist() for i in range(8)];"
        "print(json.dumps([draws, sorted(heavy)]))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == [alone.tolist(), []]  # and loaders need nothing heavy for it


def test_every_part_of_the_name_and_the_size_matter() -> None:
    one = augment.draw(PLAIN, 0, "base", "a", 0, (375, 500))
    others = [(1, "base", "a", 0), (0, "more", "a", 0), (0, "base", "b", 0), (0, "base", "a", 1)]
    for seed, set_name, key, index in others:
        other = augment.draw(PLAIN, seed, set_name, key, index, (375, 500))
        assert (one[:4] != other[:4]).any()
    assert (one[:4] != augment.draw(PLAIN, 0, "base", "a", 0, (750, 1000))[:4]).any()


def test_more_operations_leave_the_crop_and_the_first_ones_alone() -> None:
    np.testing.assert_array_equal(draw(view_set=ViewSet(num_ops=4))[:8], draw())
    np.testing.assert_array_equal(draw(view_set=ViewSet(num_ops=0)), draw()[:4])


def test_fields_name_every_parameter() -> None:
    table = augment.fields(PLAIN)
    assert [field["name"] for field in table] == [
        "top", "left", "height", "width", "op_1", "magnitude_1", "op_2", "magnitude_2",
    ]  # fmt: skip
    assert len(table) == len(draw())
    assert "11 Solarize" in table[4]["unit"] and "Rotate degrees" in table[7]["unit"]
    assert len(augment.fields(ViewSet(num_ops=0))) == 4


def test_golden_draws_and_pixels() -> None:
    # A change here is a change of the format. Pillow 11.0, 12.0, 12.3 and 13.0 (x86) give these pixels.
    y, x = np.mgrid[:375, :500]
    channels = [(x * 7 + y * 3) % 256, (x * x + y * y) // 97 % 256, (x ^ y) % 256]
    image = Image.fromarray(np.stack(channels, -1).astype(np.uint8))
    for index, (expected, pixels) in enumerate(GOLDEN):
        params = draw(index)
        np.testing.assert_array_equal(params, np.array(expected, dtype=np.float32))
        view = augment.replay(image, params, (375, 500), 224)
        assert augment.pixel_hash(view, augment.OLD_PIXEL_HASH) == pixels


# Replay


sides = st.tuples(st.integers(1, 40), st.integers(1, 1500)).flatmap(lambda sides: st.permutations(sides).map(tuple))
shares = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(lambda pair: tuple(sorted(pair)))
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(lambda pair: tuple(sorted(pair)))
view_sets = st.builds(
    ViewSet,
    view_px=st.integers(8, 64),
    scale=shares,
    ratio=ratios,
    num_ops=st.integers(0, 4),
    magnitude=st.integers(0, 30),
)


@settings(max_examples=100, deadline=None)
@given(view_set=view_sets, size=sides, index=st.integers(0, 1000), view_px=st.integers(8, 64))
def test_any_image_and_any_view_set_give_a_view(
    view_set: ViewSet, size: tuple[int, int], index: int, view_px: int
) -> None:
    params = draw(index, size=size, view_set=view_set)
    assert params.dtype == np.float32 and params.shape == (len(augment.fields(view_set)),)
    top, left, height, width = params[:4]
    assert 0 <= top < top + height <= size[0] and 0 <= left < left + width <= size[1]
    image = picture(index, *size)
    for side in (view_set.view_px, view_px):
        view = augment.replay(image, params, size, side)
        assert view.shape == (side, side, 3) and view.dtype == np.uint8 and view.flags.writeable
        np.testing.assert_array_equal(augment.replay(image, params, size, side), view)


numbers = st.floats(width=32) | st.integers(-2, 40).map(float)


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.integers(0, 7), numbers, min_size=1, max_size=3), num=st.integers(0, 8))
def test_damaged_parameters_are_refused_or_legal(changes: dict[int, float], num: int) -> None:
    params = whole(30, 5, 9, 10, 7)
    params[list(changes)] = list(changes.values())
    with contextlib.suppress(ReplayError):
        assert augment.replay(picture(0, 30, 30), params[:num], (30, 30), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (0, math.nan, "no parameters of a view"),
        (3, math.inf, "no parameters of a view"),
        (1, 0.5, "no parameters of a view"),
        (4, math.nan, "no parameters of a view"),
        (5, math.nan, "magnitude nan of Rotate"),
        (0, -1, "not in an image of 30 x 40"),
        (0, 1, "not in an image of 30 x 40"),
        (1, 1, "not in an image of 30 x 40"),
        (2, 0, "not in an image of 30 x 40"),
        (3, 0, "not in an image of 30 x 40"),
        (4, -1, "no operation has id -1"),
        (6, 14, "no operation has id 14"),
        (5, 31, "magnitude 31.0 of Rotate"),
        (7, -7, "magnitude -7.0 of Posterize"),
    ],
)
def test_what_is_no_view_is_refused(place: int, value: float, says: str) -> None:
    params = np.array([0, 0, 30, 40, 5, 9, 10, 7], dtype=np.float32)
    augment.replay(picture(0, 30, 40), params, (30, 40), 16)
    params[place] = value
    with pytest.raises(ReplayError, match=says):
        augment.replay(picture(0, 30, 40), params, (30, 40), 16)


def test_an_image_of_another_size_is_refused_and_both_sizes_are_said() -> None:
    for size in ((374, 500), (375, 501), (500, 375), (750, 1000)):
        with pytest.raises(ReplayError, match=f"375 x 500 .* {size[0]} x {size[1]}"):
            augment.replay(picture(0, *size), draw(), (375, 500), 224)
    pixels = np.array(picture(0, 375, 500))
    for array in (pixels, pixels[:, :, 0], pixels[:, :, 0].astype(np.int64)):
        with pytest.raises(ReplayError, match=r"of an array: Image\.fromarray"):
            augment.replay(array, draw(), (375, 500), 224)
    with pytest.raises(ReplayError, match=r"RGB .* is L of"):
        augment.replay(picture(0, 375, 500).convert("L"), draw(), (375, 500), 224)


def difference(one: np.ndarray, two: np.ndarray) -> float:
    """Mean absolute difference in grey levels of a view and a larger one of the same scene."""
    small = Image.fromarray(two).resize(one.shape[1::-1], Image.Resampling.BOX)
    return float(np.abs(one.astype(float) - np.asarray(small)).mean())


SAME_SCENE = 1.5  # grey levels; measured: at most 0.93


@pytest.mark.parametrize(("op_id", "sign"), SIGNED_OPS, ids=lambda value: NAMES[value] if value > 1 else str(value))
def test_another_size_of_view_shows_the_same_scene(op_id: int, sign: int) -> None:
    image = picture(3, 400, 600, noise=0)
    params = np.array([30, 40, 300, 310, op_id, sign * augment.OPS[op_id].levels[9]], dtype=np.float32)
    small, large = (augment.replay(image, params, (400, 600), side) for side in (224, 448))
    assert difference(small, large) < SAME_SCENE


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translation_in_pixels_would_show_another_scene(name: str) -> None:
    image = picture(3, 400, 600, noise=0)
    crop = np.array([30, 40, 300, 310], dtype=np.float32)
    views = [Image.fromarray(augment.replay(image, crop, (400, 600), side)) for side in (224, 448)]
    in_pixels = [np.asarray(autoaugment._apply_op(v, name, 30.45, InterpolationMode.NEAREST, None)) for v in views]
    assert difference(*in_pixels) > 10 * SAME_SCENE


@pytest.mark.parametrize(("kind", "golden"), [("xxh3_64", 8310970137452902836), ("blake2b", 350137241774576881)])
def test_pixel_hash_sees_every_pixel_and_the_shape(kind: str, golden: int) -> None:
    view = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    one = augment.pixel_hash(view, kind)
    assert one == golden == augment.pixel_hash(view.copy(), kind) == augment.pixel_hash(np.asfortranarray(view), kind)
    changed = view.copy()
    changed[7, 7, 2] ^= 1
    hashes = {augment.pixel_hash(v, kind) for v in (changed, view.reshape(4, 16, 3), view.transpose(1, 0, 2))}
    assert len({one, *hashes}) == 4


def test_a_hash_of_a_newer_version_gets_a_sentence() -> None:
    with pytest.raises(ReplayError, match="pixels were hashed by md6, which this version does not know"):
        augment.pixel_hash(np.zeros((1, 1, 3), np.uint8), "md6")
