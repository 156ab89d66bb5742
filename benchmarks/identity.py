"""What it costs that a store knows its data: digests in a run, digests and checks of the store in a training's loading.

    python -m benchmarks.identity [--images 256] [--repeats 7] [--json]

Both are shares of the same work without them, on drawn photographs of 375 x 500 and a store made of them with random
teachers. Seconds are of one thread; the median of the repeats.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
import zarr

from benchmarks.augment import SIZE, jpeg, photograph
from reinforce.config import ViewSet
from reinforce.data import augment, images, shards
from reinforce.data.views import replayed
from reinforce.store.columns import DIGEST, KEY
from reinforce.store.store import Store, identity
from reinforce.terminal import show

VIEWS = ViewSet(num_views=2, view_px=224)
WIDTH = 768


def seconds(call: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def measured(folder: Path, num: int, repeats: int) -> dict[str, float]:
    tar = str(folder / "00000.tar")
    shards.write(tar, [(f"{i:06d}", {"jpg": jpeg(photograph(i)), "txt": b"x"}) for i in range(num)])
    places, samples = shards.locate(tar), list(shards.read(shards.expand(tar)[0]))
    params = np.stack([augment.draw(VIEWS, 0, "base", place.key, 0, SIZE) for place in places])
    digests = [shards.image_digest(sample.image) for sample in samples]
    store, rng = Store(str(folder / "store")), np.random.default_rng(0)
    known = {KEY: np.array([place.key for place in places], object), DIGEST: np.array(digests, np.uint64)}
    data = identity(known[KEY].tolist(), known[DIGEST])
    for column, array in known.items():
        store.commit("00000", column, array, data)
    store.commit("00000", "view/base/vit", rng.normal(size=(2, num, WIDTH)).astype(ml_dtypes.bfloat16), data)

    def load(digests: list[int] | list[None]) -> None:
        for place, view, digest in zip(places, params, digests, strict=True):
            replayed(tar, place, view, SIZE, VIEWS.view_px, digest)

    def reinforce_without_models() -> None:
        for sample, view in zip(samples, params, strict=True):
            picture = images.decode(sample.image)
            for _ in range(VIEWS.num_views):
                augment.pixel_hash(augment.replay(picture, view, SIZE, VIEWS.view_px))

    def checked() -> None:
        store.read("00000", DIGEST)
        store.read("00000", "view/base/vit", 0, data)

    def unchecked() -> None:
        for column, index in (("digest", slice(None)), ("view/base/vit", 0)):
            zarr.open_array(str(folder / "store/00000" / column), mode="r")[index]

    plain = seconds(lambda: load([None] * num), repeats)
    hashing = seconds(lambda: [shards.image_digest(sample.image) for sample in samples], repeats)
    columns = seconds(checked, repeats) - seconds(unchecked, repeats)
    return {
        "image_kb": sum(len(sample.image) for sample in samples) / num / 1e3,
        "digest_us": 1e6 * hashing / num,
        "digest_share_of_a_run_without_models": hashing / seconds(reinforce_without_models, repeats),
        "digest_share_of_loading": hashing / plain,
        "loading_with_digests_over_without": seconds(lambda: load(digests), repeats) / plain,
        "checks_of_two_columns_ms_per_shard": 1e3 * columns,
        "checks_share_of_loading_a_shard_of_12500": columns / (plain / num * 12_500),
    }


def main(
    num: Annotated[int, typer.Option("--images")] = 256,
    repeats: int = 7,
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare digests and checks with what a run and a training do anyway."""
    with tempfile.TemporaryDirectory() as folder:
        told = measured(Path(folder), num, repeats)
    show(told, json_)


if __name__ == "__main__":
    typer.run(main)
