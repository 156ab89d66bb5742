"""RandAugment's operations in numba give Pillow's pixels: any operation, on any view."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reinforce.data import augment, operations, resize

NAMES = [op.name for op in augment.OPS]


def view(side: int, kind: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "one color":  # of which no histogram can be stretched
        return np.broadcast_to(random.integers(0, 256, 3, dtype=np.uint8), (side, side, 3)).copy()
    if kind == "dark":  # a few values at one end
        return random.integers(0, 4, (side, side, 3), dtype=np.uint8)
    if kind == "black and white":  # sums go beyond
        return random.integers(0, 2, (side, side, 3), dtype=np.uint8) * np.uint8(255)
    return random.integers(0, 256, (side, side, 3), dtype=np.uint8)


def compiled(pixels: np.ndarray, *ops: tuple[int, tuple[float, ...]]) -> np.ndarray:
    table = np.zeros((len(ops), operations.MOST_NUMBERS))
    for i, (_, numbers) in enumerate(ops):
        table[i, : len(numbers)] = numbers
    return np.asarray(operations.operate(pixels.copy(), np.array([op for op, _ in ops], np.int64), table))


@pytest.mark.parametrize("op_id", range(len(NAMES)), ids=NAMES)
@given(
    st.integers(1, 80),
    st.sampled_from(["one color", "dark", "black and white", "noise"]),
    st.integers(0, 9),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_an_operation_at_every_magnitude(op_id: int, side: int, kind: str, seed: int, data: st.DataObject) -> None:
    op, pixels = augment.OPS[op_id], view(side, kind, seed)
    low, high = sorted((op.levels[0], op.levels[-1]))
    magnitude = data.draw(st.floats(-high if op.signed else low, high, width=32))
    numbers = op.numbers(magnitude, side)
    expected = np.asarray(op.apply(Image.fromarray(pixels), *numbers))
    np.testing.assert_array_equal(compiled(pixels, (op_id, numbers)), expected)


def test_rotation_is_pillows() -> None:
    for side in (1, 2, 7, 64, 224, 331):
        picture = Image.fromarray(view(side, "noise", side))
        for degrees in np.float32([-30, -9, -1e-3, 0, 0.5, 9, 30]).tolist():
            turned = picture.rotate(degrees, Image.Resampling.NEAREST)
            numbers = augment._rotation(degrees, side)
            np.testing.assert_array_equal(np.asarray(augment._affine(picture, *numbers)), np.asarray(turned))


def test_whole_views_with_and_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    pairs = [(first, second) for first in range(len(NAMES)) for second in range(len(NAMES))]
    params = [
        np.array(
            [5, 3, 61, 50, first, augment.OPS[first].levels[9], second, augment.OPS[second].levels[20]], np.float32
        )
        for first, second in pairs
    ]
    with_numba = [augment.replay(picture, row, (90, 70), 32) for row in params]
    monkeypatch.setattr(augment, "has_numba", lambda: False)
    monkeypatch.setattr(resize, "has_numba", lambda: False)
    for pair, row, made in zip(pairs, params, with_numba, strict=True):
        np.testing.assert_array_equal(made, augment.replay(picture, row, (90, 70), 32), err_msg=str(pair))


def test_parameters_may_be_whole_numbers() -> None:
    picture, row = Image.fromarray(view(40, "noise", 0)), [5, 3, 30, 31, 5, 9, 13, 0]
    expected = augment.replay(picture, np.array(row, np.float32), (40, 40), 16)
    np.testing.assert_array_equal(augment.replay(picture, np.array(row), (40, 40), 16), expected)
