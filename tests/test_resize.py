"""A view's pixels do not depend on whether numba is there."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reinforce.data import bicubic, resize

sides = st.integers(1, 70)


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Noise; or, for odd seeds, black and white, which bicubic sums go beyond."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height, width, 3))
    return Image.fromarray((noise // 128 * 255 if seed % 2 else noise).astype(np.uint8))


def compiled(image: resize.Picture, box: tuple[int, int, int, int], side: int) -> np.ndarray:
    return np.asarray(bicubic.resize(resize.part(image, box), side))


@given(sides, sides, st.data(), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_every_part_at_every_size(height: int, width: int, data: st.DataObject, side: int, seed: int) -> None:
    image = picture(height, width, seed)
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    expected = np.asarray(resize.by_pillow(image, box, side))
    np.testing.assert_array_equal(compiled(image, box, side), expected)
    np.testing.assert_array_equal(compiled(resize.ready(image), box, side), expected)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1536, 2048), (2000, 3), (3, 2000)])
def test_photographs_and_strips(height: int, width: int) -> None:
    image = picture(height, width, 2)
    box = (width // 9, height // 7, width, height)
    expected = np.asarray(resize.by_pillow(image, box, 224))
    np.testing.assert_array_equal(compiled(resize.ready(image), box, 224), expected)


def test_where_numba_can_write_nowhere_it_compiles_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def nowhere(**options: bool) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert bicubic.compiled(lambda x: x + 1)(1) == 2
