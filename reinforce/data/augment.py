"""Views of an image: parameters drawn once, and the pixels they stand for, the same on any machine.

A view is a RandomResizedCrop and then RandAugment (Cubuk et al. 2020, arXiv 1909.13719), pixel for pixel as torchvision
makes them of PIL images: bicubic resizing, then operations with nearest interpolation and black fill. But the width is
resized first, whatever Pillow's version (data/resize.py). And a translation is a share of the view's side, where
torchvision has pixels: so parameters drawn for one size of view show the same scene at every other.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image, ImageEnhance, ImageOps

from reinforce.config import ViewSet
from reinforce.data import draws
from reinforce.data.resize import Picture, by_pillow, has_numba, mode_and_size, part
from reinforce.errors import ReplayError

# A column of hashes names the first; those of format 1 and of its upgrades name none. A view of 224 px takes 5 us by
# the one and 186 us, a sixth of all that a view costs, by the other.
PIXEL_HASH, OLD_PIXEL_HASH = "xxh3_64", "blake2b"
NUM_TRIES = 10  # for a crop that fits in the image, before the central one is taken


@dataclass(frozen=True)
class Op:
    """An operation of RandAugment. `levels` are its magnitudes, in `unit`, at the 31 bins; a signed one is negated in
    half of the draws. `numbers` are those that Pillow takes, of a magnitude and the view's side in pixels; `apply` asks
    Pillow with them. data/operations.py does the same without it."""

    name: str
    unit: str
    signed: bool
    levels: tuple[float, ...]
    numbers: Callable[[float, int], tuple[float, ...]]
    apply: Callable[..., Image.Image]


def ramp(start: float, end: float) -> tuple[float, ...]:
    # torch.linspace(start, end, 31) to the last bit of its float32: Pillow truncates, so that bit shows in pixels.
    first, last = float(np.float32(start)), float(np.float32(end))
    step = float(np.float32(last - first) / np.float32(30))
    level = np.arange(31.0)
    from_the_nearer_end = np.where(level < 15, first + step * level, last - step * (30 - level))
    return tuple(from_the_nearer_end.astype(np.float32).tolist())


def _affine(view: Image.Image, *matrix: float) -> Image.Image:
    return view.transform(view.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _rotation(degrees: float, side_px: int) -> tuple[float, ...]:
    """The matrix of Pillow's Image.rotate, about the middle, to the last bit."""
    angle, middle = -math.radians(degrees), side_px / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return (
        cos, sin, cos * -middle + sin * -middle + middle,
        -sin, cos, -sin * -middle + cos * -middle + middle,
    )  # fmt: skip


def _pixels(share: float, side_px: int) -> int:
    # Less than a thousandth of a pixel is float32's noise, which would make 44 of 45 pixels in a view of 331.
    return int(round(share * side_px, 3))


def _nothing(magnitude: float, side_px: int) -> tuple[float, ...]:
    return ()


def _factor(magnitude: float, side_px: int) -> tuple[float, ...]:
    return (1 + magnitude,)


# fmt: off
OPS = (  # An operation's place is its id in every store: never move one.
    Op("Identity", "none", False, ramp(0, 0), _nothing, lambda view: view),
    Op("ShearX", "tangent", True, ramp(0, 0.3), lambda m, side: (1, m, 0, 0, 1, 0), _affine),
    Op("ShearY", "tangent", True, ramp(0, 0.3), lambda m, side: (1, 0, 0, m, 1, 0), _affine),
    Op("TranslateX", "share of the view's side", True, ramp(0, 150 / 331),
       lambda m, side: (1, 0, -_pixels(m, side), 0, 1, 0), _affine),
    Op("TranslateY", "share of the view's side", True, ramp(0, 150 / 331),
       lambda m, side: (1, 0, 0, 0, 1, -_pixels(m, side)), _affine),
    Op("Rotate", "degrees", True, ramp(0, 30), _rotation, _affine),
    Op("Brightness", "factor - 1", True, ramp(0, 0.9), _factor,
       lambda view, f: ImageEnhance.Brightness(view).enhance(f)),
    Op("Color", "factor - 1", True, ramp(0, 0.9), _factor,
       lambda view, f: ImageEnhance.Color(view).enhance(f)),
    Op("Contrast", "factor - 1", True, ramp(0, 0.9), _factor,
       lambda view, f: ImageEnhance.Contrast(view).enhance(f)),
    Op("Sharpness", "factor - 1", True, ramp(0, 0.9), _factor,
       lambda view, f: ImageEnhance.Sharpness(view).enhance(f)),
    Op("Posterize", "bits", False, tuple(8.0 - round(level / 7.5) for level in range(31)),
       lambda m, side: (int(m),), ImageOps.posterize),
    Op("Solarize", "threshold of 255", False, ramp(255, 0), lambda m, side: (math.ceil(m),), ImageOps.solarize),
    Op("AutoContrast", "none", False, ramp(0, 0), _nothing, ImageOps.autocontrast),
    Op("Equalize", "none", False, ramp(0, 0), _nothing, ImageOps.equalize),
)
# fmt: on


def fields(view_set: ViewSet) -> list[dict[str, str]]:
    """Name and unit of each of the P = 4 + 2 * num_ops parameters of a view, in order."""
    ids = ", ".join(f"{op_id} {op.name}" for op_id, op in enumerate(OPS))
    units = ", ".join(f"{op.name} {op.unit}" for op in OPS)
    table = [{"name": name, "unit": "pixels of the image"} for name in ("top", "left", "height", "width")]
    for i in range(1, view_set.num_ops + 1):
        table += [{"name": f"op_{i}", "unit": f"id: {ids}"}, {"name": f"magnitude_{i}", "unit": f"by op_{i}: {units}"}]
    return table


def draw(view_set: ViewSet, seed: int, set_name: str, key: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """Parameters (P,) float32 of view `index` of sample `key`, whose image has `size` (height, width) in pixels.

    Of the uniforms of this name, 20 are area and ratio of ten tries at a crop, two are its top and left, and two more
    for each operation are its id and sign.
    """
    num_crop = 2 * NUM_TRIES + 2
    uniforms = draws.uniforms(seed, f"view/{set_name}", key, index, num_crop + 2 * view_set.num_ops).tolist()
    params: list[float] = [*_crop(view_set, size, uniforms[:num_crop])]
    for u_op, u_sign in zip(uniforms[num_crop::2], uniforms[num_crop + 1 :: 2], strict=True):
        op_id = int(u_op * len(OPS))
        magnitude = OPS[op_id].levels[view_set.magnitude]
        params += [op_id, -magnitude if OPS[op_id].signed and u_sign < 0.5 else magnitude]
    return np.array(params, dtype=np.float32)


def _crop(view_set: ViewSet, size: tuple[int, int], uniforms: list[float]) -> tuple[int, int, int, int]:
    (full_height, full_width), (low, high), (narrow, wide) = size, view_set.scale, view_set.ratio
    *tries, u_top, u_left = uniforms
    for u_area, u_ratio in zip(tries[::2], tries[1::2], strict=True):
        area = full_height * full_width * (low + u_area * (high - low))
        ratio = narrow * (wide / narrow) ** u_ratio
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= full_height and 0 < width <= full_width:
            return int(u_top * (full_height - height + 1)), int(u_left * (full_width - width + 1)), height, width
    # As torchvision falls back; but where that leaves no pixel, one.
    height = min(full_height, max(1, round(full_width / narrow)))
    width = min(full_width, max(1, round(full_height * wide)))
    return (full_height - height) // 2, (full_width - width) // 2, height, width


def replay(image: Picture, params: np.ndarray, size: tuple[int, int], view_px: int) -> np.ndarray:
    """The view (view_px, view_px, 3) uint8 that `params` (P,) stand for. `image` is a picture, or what `resize.ready`
    makes of it once for many views.

    `size` is (height, width) in pixels of the image they were drawn for. Raises ReplayError if `image` is not RGB of
    this size, or if `params` are no view of such an image.
    """
    if view_px < 1:
        raise ReplayError(f"view_px {view_px}: a view has at least one pixel")
    mode, height, width = mode_and_size(image)
    if mode != "RGB" or (height, width) != tuple(size):
        raise ReplayError(
            f"the view was drawn for an RGB image of {size[0]} x {size[1]} pixels (height x width), and this one is "
            f"{mode} of {height} x {width}: give the image as it was, not a resized copy"
        )
    (top, left, height, width), ops = _parse(params, size, view_px)
    box = (left, top, left + width, top + height)
    if not isinstance(image, Image.Image) or has_numba():
        return _compiled(part(image, box), view_px, ops)
    view = by_pillow(image, box, view_px)
    for op_id, numbers in ops:
        view = OPS[op_id].apply(view, *numbers)
    return np.array(view)


def _compiled(words: np.ndarray, view_px: int, ops: list[tuple[int, tuple[float, ...]]]) -> np.ndarray:
    from reinforce.data import bicubic, operations

    ids, table = np.empty(len(ops), np.int64), np.zeros((len(ops), operations.MOST_NUMBERS))
    for i, (op_id, numbers) in enumerate(ops):
        ids[i] = op_id
        table[i, : len(numbers)] = numbers
    return np.asarray(operations.operate(bicubic.resize(words, view_px), ids, table))


def _parse(
    params: np.ndarray, size: tuple[int, int], view_px: int
) -> tuple[list[int], list[tuple[int, tuple[float, ...]]]]:
    """The crop (top, left, height, width), and of each operation its id and its numbers."""
    values: list[float] = np.asarray(params, dtype=np.float64).tolist()
    if len(values) < 4 or len(values) % 2 or not all(value.is_integer() for value in values[:4] + values[4::2]):
        raise ReplayError(f"{values} are no parameters of a view; verify the store they come from")
    top, left, height, width = crop = [int(value) for value in values[:4]]
    if min(top, left, height - 1, width - 1) < 0 or top + height > size[0] or left + width > size[1]:
        raise ReplayError(f"crop (top, left, height, width) {crop} is not in an image of {size[0]} x {size[1]} pixels")
    ops = []
    for op_id, magnitude in zip(values[4::2], values[5::2], strict=True):
        if not 0 <= op_id < len(OPS):
            raise ReplayError(f"no operation has id {op_id:.0f}, they end at {len(OPS) - 1}; verify the store")
        op = OPS[int(op_id)]
        low, high = sorted((op.levels[0], op.levels[-1]))
        if not low <= (abs(magnitude) if op.signed else magnitude) <= high:
            raise ReplayError(f"magnitude {magnitude} of {op.name} is not in {low} to {high} {op.unit}")
        ops.append((int(op_id), op.numbers(magnitude, view_px)))
    return crop, ops


def pixel_hash(view: np.ndarray, kind: str = PIXEL_HASH) -> int:
    """Replay proof of a view (H, W, 3) uint8: 64 bits over its shape and bytes. `kind` is PIXEL_HASH, or that of
    columns which do not name theirs, OLD_PIXEL_HASH. Raises ReplayError for another."""
    parts = np.array(view.shape, dtype="<u8").tobytes(), np.ascontiguousarray(view).data
    if kind == PIXEL_HASH:
        fast = xxhash.xxh3_64(parts[0])
        fast.update(parts[1])
        return fast.intdigest()
    if kind != OLD_PIXEL_HASH:
        raise ReplayError(f"pixels were hashed by {kind}, which this version does not know; install a newer one")
    slow = hashlib.blake2b(parts[0], digest_size=8)
    slow.update(parts[1])
    return int.from_bytes(slow.digest(), "little")
