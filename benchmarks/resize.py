"""Cutting a view out of a picture: numba against Pillow, the same pixels.

    python -m benchmarks.resize [--json] [--views 30] [--rounds 5] [--view-px 224]

For each size of picture, the views of one RandomResizedCrop (a twelfth of the area to all of it). Every round times
both one after the other, on one thread, by its CPU time; a ratio is taken within a round. `ready` is what numba needs
once for a picture; `a view alone` pays it for the part of one view, as a training does.
"""

import argparse
import json
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.augment import cpu_seconds
from reinforce.config import ViewSet
from reinforce.data import augment, bicubic, resize

SIZES = ((256, 256), (375, 500), (512, 512), (1500, 2000))
Box = tuple[int, int, int, int]


def boxes(size: tuple[int, int], num: int) -> list[Box]:
    drawn = (augment.draw(ViewSet(num_ops=0), 0, "benchmark", "key", index, size)[:4] for index in range(num))
    return [(left, top, left + width, top + height) for top, left, height, width in (map(int, row) for row in drawn)]


def by_numba(picture: resize.Picture, box: Box, side: int) -> np.ndarray:
    return np.asarray(bicubic.resize(resize.part(picture, box), side))


def measure(size: tuple[int, int], num: int, rounds: int, side: int) -> dict[str, float]:
    """Milliseconds of a view by each, and what part of Pillow's time numba takes."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture, asked = Image.fromarray(noise), boxes(size, num)
    words = resize.ready(picture)
    ways = {
        "pillow": lambda box: resize.by_pillow(picture, box, side),
        "numba": lambda box: by_numba(words, box, side),
        "a view alone": lambda box: by_numba(picture, box, side),
        "ready": lambda box: resize.ready(picture),
    }
    for box in asked:
        if resize.by_pillow(picture, box, side).tobytes() != by_numba(words, box, side).tobytes():
            raise SystemExit(f"other pixels: {box} of {size} at {side}")
    found = [{name: cpu_seconds(way, asked) / num * 1e3 for name, way in ways.items()} for _ in range(rounds)]
    return {name: median(times[name] for times in found) for name in ways} | {
        "ratio": median(times["numba"] / times["pillow"] for times in found),
        "ratio alone": median(times["a view alone"] / times["pillow"] for times in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--view-px", type=int, default=224)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = {f"{h} x {w}": measure((h, w), options.views, options.rounds, options.view_px) for h, w in SIZES}
    if options.json:
        print(json.dumps(table))
        return
    for name, row in table.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in row.items()))


if __name__ == "__main__":
    main()
