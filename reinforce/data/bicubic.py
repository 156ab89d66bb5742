"""Pillow's bicubic resizing of RGB, to the bit, in numba: the columns first, then the rows.

Pillow computes in integers: weights of 22 bits, a pass over the columns and one over the rows, and 8 bits between them
(Resample.c). So every order of the same sums gives the same pixels, and here they are taken for many pixels at once.
Loading this takes a third of a second. It is compiled once, for all processes, where numba finds a folder to write to.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

BITS = 22  # of a weight, after the point
TILE = 16  # rows that go through the first pass together


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        made = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder that numba may write to
        made = numba.njit(nogil=True)(function)
    return made  # type: ignore[no-any-return]


@compiled
def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@compiled
def _weights(length: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `side` new pixels: the first old one that it is made of, how many, and the weight of each."""
    scale = length / side
    wide = max(scale, 1.0)
    reach = 2.0 * wide
    first, num = np.empty(side, np.int64), np.empty(side, np.int64)
    table = np.zeros((side, math.ceil(reach) * 2 + 1), np.int32)
    row = np.empty(table.shape[1])
    for i in range(side):
        center = (i + 0.5) * scale
        first[i] = max(int(center - reach + 0.5), 0)
        num[i] = min(int(center + reach + 0.5), length) - first[i]
        total = 0.0
        for j in range(num[i]):
            row[j] = _bicubic((j + first[i] - center + 0.5) * (1.0 / wide))
            total += row[j]
        for j in range(num[i]):
            weight = row[j] / total if total != 0 else row[j]
            table[i, j] = int((-0.5 if weight < 0 else 0.5) + weight * (1 << BITS))
    return first, num, table


@compiled
def _mix(lines: np.ndarray, first: int, num: int, weight: np.ndarray, sums: np.ndarray, mixed: np.ndarray) -> None:
    """The weighted sum of `num` lines (of n bytes each) from `first` on: n bytes."""
    n = sums.shape[0]
    for i in range(n):
        sums[i] = 1 << (BITS - 1)
    j = 0
    while j + 4 <= num:  # four at a time: the sums are read and written a quarter as often
        a, b, c, d = lines[first + j], lines[first + j + 1], lines[first + j + 2], lines[first + j + 3]
        wa, wb, wc, wd = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
        for i in range(n):
            sums[i] += np.int32(a[i]) * wa + np.int32(b[i]) * wb + np.int32(c[i]) * wc + np.int32(d[i]) * wd
        j += 4
    while j < num:
        a, wa = lines[first + j], weight[j]
        for i in range(n):
            sums[i] += np.int32(a[i]) * wa
        j += 1
    for i in range(n):
        mixed[i] = np.uint8(min(max(sums[i] >> BITS, 0), 255))


@compiled
def resize(part: np.ndarray, side: int) -> np.ndarray:
    """(h, w) uint32, whose bytes are R, G, B and one that is not used -> (side, side, 3) uint8."""
    height, width = part.shape
    narrow = np.empty((height, side), np.uint32)
    first, num, table = _weights(width, side)
    # Columns of a few rows lie side by side, so that a sum over columns is one over lines of memory.
    tile, line = np.zeros((width, TILE), np.uint32), np.empty(TILE, np.uint32)
    columns, mixed, sums = tile.view(np.uint8), line.view(np.uint8), np.empty(4 * TILE, np.int32)
    for top in range(0, height, TILE):
        rows = min(TILE, height - top)
        for y in range(rows):
            row = part[top + y]
            for x in range(width):
                tile[x, y] = row[x]
        for i in range(side):
            _mix(columns, first[i], num[i], table[i], sums, mixed)
            for y in range(rows):
                narrow[top + y, i] = line[y]
    first, num, table = _weights(height, side)
    out, lines = np.empty((side, side, 3), np.uint8), narrow.view(np.uint8)
    mixed, sums = np.empty(4 * side, np.uint8), np.empty(4 * side, np.int32)
    for i in range(side):
        _mix(lines, first[i], num[i], table[i], sums, mixed)
        for x in range(side):
            for band in range(3):
                out[i, x, band] = mixed[4 * x + band]
    return out
