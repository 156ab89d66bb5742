"""kill -9 of a worker, of the driver and of everything, SIGTERM to the driver and to its group, at random moments; then
the same bytes. `make chaos KILLS=150` does it so often."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from tests import tiny
from tests.processes import Run, kill

NUM_KILLS = int(os.environ.get("KILLS", 10))
VICTIMS = ("worker", "driver", "everything", "SIGTERM to the driver", "SIGTERM to the group")


def columns(store: Path) -> list[Path]:
    """Metadata of the columns, that of groups left out."""
    return sorted(path for path in store.glob("0*/**/zarr.json") if list(path.parent.glob("c.*")))


def wait_for_a_random_moment(run: Run, store: Path, rng: random.Random) -> None:
    """Some while the models are loaded, most in the middle of the writing."""
    while not run.workers() and run.process.poll() is None:
        time.sleep(0.02)
    if rng.random() < 0.7:
        before = len(columns(store))
        while len(columns(store)) == before and run.process.poll() is None:
            time.sleep(0.02)
    time.sleep(rng.uniform(0, 4))


def take_half_away(store: Path, rng: random.Random) -> None:
    for metadata in rng.sample(columns(store), len(columns(store)) // 2):
        metadata.unlink()


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_kills_at_random_moments(recipe: Recipe, tmp_path: Path) -> None:
    store = tmp_path / "s"
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 17, i % 2, seed=i) for i in range(24))
    driver.run(tars, str(tmp_path / "calm"), recipe, RunOptions(workers="0", device="cpu"))
    wanted = tiny.tree(tmp_path / "calm")
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    rng = random.Random(2026)
    victims = [*VICTIMS * NUM_KILLS][:NUM_KILLS]
    while victims:
        run = Run(tars, store, path)
        wait_for_a_random_moment(run, store, rng)
        killed, victim = run.process.poll() is None, ""
        if killed:
            victim = victims.pop(0)
            print(f"{victim}, with {len(columns(store))} columns written")
            if victim == "worker":
                kill(run.workers()[:1])
            elif victim == "driver":
                run.kill_driver()
            elif victim == "everything":
                run.kill_everything()
            elif victim == "SIGTERM to the driver":
                run.process.send_signal(signal.SIGTERM)
            else:
                os.killpg(run.process.pid, signal.SIGTERM)
        code, _, err = run.wait()
        if victim.startswith("SIGTERM") and code:
            assert code == 128 + signal.SIGTERM, err
        elif code >= 0:  # it came to its end, whether or not a worker was killed
            assert code == 0, err
            assert tiny.tree(store) == wanted
            take_half_away(store, rng)
        run.gone()
    code, _, err = Run(tars, store, path).wait()
    assert code == 0, err
    assert tiny.tree(store) == wanted
