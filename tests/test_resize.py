"""A view's pixels do not depend on whether numba is there."""

import os
import subprocess
import sys
from pathlib import Path

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


VIEW = """
import numpy as np
from PIL import Image
from reinforce.data import augment, resize
picture = Image.fromarray(np.arange(60 * 50 * 3, dtype=np.uint32).reshape(60, 50, 3).astype(np.uint8))
row = np.array([5, 3, 40, 41, 9, 0.3, 13, 0], np.float32)
print(augment.pixel_hash(augment.replay(resize.ready(picture), row, (60, 50), 24)), resize.has_numba())
"""


def test_views_are_made_where_what_numba_has_compiled_cannot_be_read(tmp_path: Path) -> None:
    def view() -> tuple[list[str], str]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", VIEW], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split(), done.stderr

    (pixels, compiled), err = view()
    assert compiled == "True" and not err
    compiled_files = sorted([*tmp_path.rglob("*.nbc"), *tmp_path.rglob("*.nbi")])
    for keep in (500, 0):  # bytes of each
        for file in compiled_files:
            os.truncate(file, keep)
        told, err = view()
        assert told == [pixels, "False"]
        assert "delete that folder" in err and str(tmp_path) in err
