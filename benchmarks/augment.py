"""What a view costs: to draw, to replay, to hash; and torchvision's time for the same views of the same images.

    python -m benchmarks.augment [--json] [--views 300] [--rounds 7] [--view-px 224]
    python -m benchmarks.augment --at-once 2

Every round times ours and torchvision's one after the other, the first of them in turn, on one thread. A ratio is taken
within a round, so that a machine that slows down slows both. Times are those of the CPU, whoever else is using it.
`--at-once N` asks another question: how many views a second a worker gets from one thread and from N, by the clock, in
turns; the cores must be idle.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
from PIL import Image

from reinforce.config import ViewSet
from reinforce.data import augment, resize
from reinforce.data.shards import Sample
from reinforce.process import import_torchvision
from reinforce.run.batches import Batch, View, views
from reinforce.terminal import show

import_torchvision()
from torchvision.transforms import InterpolationMode, autoaugment  # noqa: E402
from torchvision.transforms import functional as F  # noqa: E402

SIZE = (375, 500)
Drawn = tuple[Image.Image, np.ndarray]  # a picture and parameters
T = TypeVar("T")


def photograph(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC))
    return Image.fromarray((soft + random.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()


def by_torchvision(image: Image.Image, params: np.ndarray, view_px: int) -> np.ndarray:
    top, left, height, width = (int(value) for value in params[:4])
    view = F.resized_crop(image, top, left, height, width, [view_px, view_px], InterpolationMode.BICUBIC)
    for op_id, magnitude in zip(params[4::2].astype(int).tolist(), params[5::2].tolist(), strict=True):
        name = augment.OPS[op_id].name
        pixels = magnitude * view_px if name.startswith("Translate") else magnitude
        view = autoaugment._apply_op(view, name, pixels, InterpolationMode.NEAREST, None)
    return np.array(view)


def cpu_seconds(work: Callable[[T], object], views: Iterable[T]) -> float:
    start = time.thread_time()
    for view in views:
        work(view)
    return time.thread_time() - start


def measure(num_views: int, num_rounds: int, view_px: int) -> dict[str, object]:
    view_set = ViewSet(view_px=view_px)
    images = [photograph(seed) for seed in range(10)]
    many = [(images[i % 10], augment.draw(view_set, 0, "base", "key", i, SIZE)) for i in range(num_views)]
    pixels = augment.replay(*many[0], SIZE, view_px)
    works: dict[str, Callable[[Drawn], object]] = {
        "replay": lambda view: augment.replay(*view, SIZE, view_px),
        "torchvision": lambda view: by_torchvision(*view, view_px),
        "draw": lambda view: augment.draw(view_set, 0, "base", "key", 0, SIZE),
        "pixel_hash": lambda view: augment.pixel_hash(pixels),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for num_round in range(num_rounds):
        for name in list(works)[:: 1 if num_round % 2 else -1]:
            times[name].append(cpu_seconds(works[name], many) / num_views)
    ratios = [ours / theirs for ours, theirs in zip(times["replay"], times["torchvision"], strict=True)]
    return {
        "image_size": SIZE,
        "view_px": view_px,
        "num_views": num_views,
        "num_rounds": num_rounds,
        "draw_us": round(median(times["draw"]) * 1e6, 1),
        "pixel_hash_us": round(median(times["pixel_hash"]) * 1e6, 1),
        "replay_ms": round(median(times["replay"]) * 1e3, 3),
        "torchvision_ms": round(median(times["torchvision"]) * 1e3, 3),
        "replay_over_torchvision": {
            "median": round(median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
    }


def at_once(num: int, num_rounds: int, view_px: int) -> dict[str, object]:
    """Views a second of a batch of 64 pictures, 10 views each."""
    view_set = ViewSet(num_views=10, view_px=view_px)
    pictures = [photograph(seed) for seed in range(64)]
    samples = [Sample(f"{i}", jpeg(picture), ()) for i, picture in enumerate(pictures)]
    sizes = [(picture.height, picture.width) for picture in pictures]
    batch = Batch(list(range(64)), samples, sizes, [{}] * 64, list(map(resize.ready, pictures)))

    def in_threads(count: int) -> Iterator[View]:
        with ThreadPoolExecutor(count) as pool:
            yield from views(batch, view_set, "base", 0, {view_px}, pool, 0)

    ways: dict[str, Callable[[], Iterator[View]]] = {
        "one thread": partial(in_threads, 1),
        f"{num} threads": partial(in_threads, num),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            made = sum(len(view.params) for view in way())
            if number:  # the first warms up
                rates[name].append(made / (time.perf_counter() - start))
    told: dict[str, object] = {f"{name}, views/s": round(median(of)) for name, of in rates.items()}
    ratios = [many / one for many, one in zip(rates[f"{num} threads"], rates["one thread"], strict=True)]
    return told | {"threads over one": {"median": round(median(ratios), 2), "min": round(min(ratios), 2)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=300, help="views timed in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--view-px", type=int, default=224)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--at-once", type=int, help="compare so many threads with one")
    options = parser.parse_args()
    if options.at_once:
        result = at_once(options.at_once, options.rounds, options.view_px)
    else:
        result = measure(options.views, options.rounds, options.view_px)
    show(result, options.json)


if __name__ == "__main__":
    main()
