"""RandAugment's operations as Pillow computes them, to the bit, in numba: here a thread needs no lock of Python.

`augment.OPS` defines them; of each, what comes here is its id and its numbers.
"""

import math

import numpy as np

from reinforce.data.bicubic import compiled

# Ids, which are places in augment.OPS.
(IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS) = range(10)
POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE = range(10, 14)
MOST_NUMBERS = 6  # of an operation: an affine map has so many


@compiled
def operate(view: np.ndarray, ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The view (side, side, 3) uint8 after n operations: `ids` (n,) int64, `numbers` (n, MOST_NUMBERS) float64. The one
    that is given may be written over."""
    for i in range(ids.shape[0]):
        op, first = ids[i], numbers[i, 0]
        if op == IDENTITY:
            continue
        if op <= ROTATE:
            view = _moved(view, numbers[i])
        elif op == COLOR:
            _colored(view, np.float32(first))
        elif op == SHARPNESS:
            view = _sharpened(view, np.float32(first))
        else:
            _look_up(view, _table(view, op, first))
    return view


@compiled
def _table(view: np.ndarray, op: int, number: float) -> np.ndarray:
    """(3, 256) uint8: what becomes of each value of each band."""
    table = np.empty((3, 256), np.uint8)
    for band in range(3):
        if op in (AUTO_CONTRAST, EQUALIZE):
            counts = np.zeros(256, np.int64)
            for y in range(view.shape[0]):
                for x in range(view.shape[1]):
                    counts[view[y, x, band]] += 1
            if op == EQUALIZE:
                _equal(counts, table[band])
            else:
                _stretched(counts, table[band])
            continue
        grey = _mean_grey(view) if op == CONTRAST and band == 0 else 0
        for value in range(256):
            if band:
                table[band, value] = table[0, value]
            elif op == POSTERIZE:
                table[0, value] = value & ~((1 << (8 - int(number))) - 1)
            elif op == SOLARIZE:
                table[0, value] = value if value < number else 255 - value
            else:
                table[0, value] = _blended(grey, value, np.float32(number))
    return table


@compiled
def _look_up(view: np.ndarray, table: np.ndarray) -> None:
    for y in range(view.shape[0]):
        for x in range(view.shape[1]):
            for band in range(3):
                view[y, x, band] = table[band, view[y, x, band]]


@compiled
def _stretched(counts: np.ndarray, table: np.ndarray) -> None:
    """Of one band: from the darkest value to the lightest becomes from 0 to 255."""
    low, high = 0, 255
    while low < 255 and counts[low] == 0:
        low += 1
    while high > 0 and counts[high] == 0:
        high -= 1
    for value in range(256):
        if high <= low:
            table[value] = value
        else:
            scale = 255.0 / (high - low)
            table[value] = np.uint8(min(max(int(value * scale + -low * scale), 0), 255))


@compiled
def _equal(counts: np.ndarray, table: np.ndarray) -> None:
    """Of one band: every value comes to be as frequent as another."""
    total, last, num = 0, 0, 0
    for value in range(256):
        if counts[value]:
            total, last, num = total + counts[value], counts[value], num + 1
    step = (total - last) // 255
    below = step // 2
    for value in range(256):
        table[value] = np.uint8(min(below // step, 255)) if num > 1 and step else value
        below += counts[value]


@compiled
def _blended(other: int, value: int, factor: np.float32) -> np.uint8:
    """Pillow's Image.blend of one value, in float32."""
    mixed = np.float32(other) + factor * np.float32(np.int32(value) - np.int32(other))
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@compiled
def _grey(red: int, green: int, blue: int) -> np.int32:
    return (np.int32(red) * 19595 + np.int32(green) * 38470 + np.int32(blue) * 7471 + 32768) >> 16


@compiled
def _mean_grey(view: np.ndarray) -> int:
    total = 0
    for y in range(view.shape[0]):
        for x in range(view.shape[1]):
            total += _grey(view[y, x, 0], view[y, x, 1], view[y, x, 2])
    return int(total / (view.shape[0] * view.shape[1]) + 0.5)


@compiled
def _colored(view: np.ndarray, factor: np.float32) -> None:
    height, width = view.shape[:2]
    greys = np.empty((width, 3), np.int32)
    grey = greys.reshape(3 * width)
    for y in range(height):
        for x in range(width):
            greys[x] = _grey(view[y, x, 0], view[y, x, 1], view[y, x, 2])
        line = view[y].reshape(3 * width)
        for i in range(3 * width):
            line[i] = _blended(grey[i], line[i], factor)


@compiled
def _sharpened(view: np.ndarray, factor: np.float32) -> np.ndarray:
    """Blended with its smooth twin: each pixel five times and its eight neighbours once, over 13. The rim stays."""
    height, width = view.shape[:2]
    out = view.copy()
    lines, new = view.reshape(height, 3 * width), out.reshape(height, 3 * width)
    sums = np.empty(3 * width, np.int32)
    left, middle, right = sums[:-6], sums[3:-3], sums[6:]
    for y in range(1, height - 1):
        above, line, below = lines[y - 1], lines[y], lines[y + 1]
        for i in range(3 * width):
            sums[i] = np.int32(above[i]) + np.int32(line[i]) + np.int32(below[i])
        inner, made = lines[y, 3:-3], new[y, 3:-3]
        for i in range(3 * width - 6):
            total = left[i] + middle[i] + right[i] + 4 * np.int32(inner[i])
            # Pillow's float32 gives the same: no sum of bytes over 13 is near a half.
            smooth = np.int32(np.float32(total) * np.float32(1 / 13) + np.float32(0.5))
            made[i] = _blended(smooth, inner[i], factor)
    return out


@compiled
def _moved(view: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixel (x, y) is the nearest one to `matrix` (a, b, c, d, e, f): (a x + b y + c, d x + e y + f); black where there
    is none. In 16 bits after the point, as Pillow's Image.transform."""
    height, width = view.shape[:2]
    out = np.zeros_like(view)
    a, b, c, d, e, f = matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5]
    right_x, down_x, start_x = _fixed(a), _fixed(b), _fixed(c + a * 0.5 + b * 0.5)
    right_y, down_y, start_y = _fixed(d), _fixed(e), _fixed(f + d * 0.5 + e * 0.5)
    for y in range(height):
        for x in range(width):
            from_x = (start_x + y * down_x + x * right_x) >> 16
            from_y = (start_y + y * down_y + x * right_y) >> 16
            if 0 <= from_x < width and 0 <= from_y < height:
                for band in range(3):
                    out[y, x, band] = view[from_y, from_x, band]
    return out


@compiled
def _fixed(number: float) -> int:
    return math.floor(number * 65536.0 + 0.5)
