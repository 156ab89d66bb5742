"""kill -9 of a worker, of the driver and of everything, at random moments, ten times; then the same bytes."""

import random
import time
from pathlib import Path

import pytest

from reinforce import driver
from reinforce.config import Recipe, RunOptions
from tests import tiny
from tests.processes import Run, kill

NUM_KILLS = 10


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_ten_kills_at_random_moments(recipe: Recipe, tmp_path: Path) -> None:
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 17, i % 2, seed=i) for i in range(24))
    driver.run(tars, str(tmp_path / "calm"), recipe, RunOptions(workers="0", device="cpu"))
    wanted = tiny.tree(tmp_path / "calm")
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    rng = random.Random(2026)
    victims = (["worker", "driver", "everything"] * NUM_KILLS)[:NUM_KILLS]
    for number, victim in enumerate(victims):
        run = Run(tars, tmp_path / "s", path)
        while not run.workers() and run.process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 12))
        if run.process.poll() is not None:  # it came to its end first: take some of its columns away and go on
            assert tiny.tree(tmp_path / "s") == wanted
            for metadata in rng.sample(sorted((tmp_path / "s").glob("0*/*/*/*/zarr.json")), 40):
                metadata.unlink()
            continue
        if victim == "worker":
            kill(rng.sample(run.workers(), 1) if run.workers() else [])
            code, _, err = run.wait()
            assert code == 0, err
            assert tiny.tree(tmp_path / "s") == wanted
            for metadata in rng.sample(sorted((tmp_path / "s").glob("0*/*/*/*/zarr.json")), 40):
                metadata.unlink()
        else:
            run.kill_driver() if victim == "driver" else run.kill_everything()
            run.gone()
        print(f"kill {number}: {victim}, {len(list((tmp_path / 's').glob('0*/view/base/vit/zarr.json')))} of 24 shards")
    code, _, err = Run(tars, tmp_path / "s", path).wait()
    assert code == 0, err
    assert tiny.tree(tmp_path / "s") == wanted
