"""On a real Ray of two nodes workers, drivers, nodes and everything are killed and asked to end at random moments, and
the store has the same bytes. `make chaos KILLS=150` does it so often, to 1,000 shards: 100 SIGKILLs and 50 SIGTERMs."""

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from reinforce.store.objects import PARTIAL
from tests import tiny
from tests.processes import Run, TwoNodes, kill

NUM_KILLS = int(os.environ.get("KILLS", 10))
NUM_SHARDS = max(24, NUM_KILLS * 1000 // 150)
KILLED = ("worker", "driver", "node", "everything")  # by SIGKILL
ASKED = ("SIGTERM to worker", "SIGTERM to driver", "SIGTERM to group", "SIGTERM to node")
VICTIMS = (*KILLED, *ASKED, *KILLED)
IN_HAND = 2  # shards of a worker: one is computed, the next is read


def columns(store: Path) -> list[Path]:
    """Metadata of the columns, that of groups left out."""
    return sorted(path for path in store.glob("0*/**/zarr.json") if list(path.parent.glob("c.*")))


def wait_for_a_random_moment(run: Run, nodes: TwoNodes, store: Path, rng: random.Random) -> None:
    """Some while the models are loaded, most in the middle of the writing."""
    while not nodes.workers() and run.process.poll() is None:
        time.sleep(0.02)
    if rng.random() < 0.7:
        partial = store / PARTIAL  # where each object is before it is whole
        before = time.time()
        while not (partial.is_dir() and partial.stat().st_mtime > before) and run.process.poll() is None:
            time.sleep(0.02)
    time.sleep(rng.uniform(0, 4))


def take_half_away(store: Path, rng: random.Random) -> None:
    for metadata in rng.sample(found := columns(store), len(found) // 2):
        metadata.unlink()


def strike(victim: str, run: Run, nodes: TwoNodes) -> None:
    """The driver has ended afterwards where it was hit, and the nodes that were are started again."""
    number = signal.SIGTERM if victim in ASKED else signal.SIGKILL
    if victim.endswith("worker"):
        kill(nodes.workers()[:1], number)
    elif victim.endswith("node"):
        nodes.lose_the_second(number)
    elif victim == "everything":
        kill([run.process.pid])
        nodes.lose_both()
    elif victim == "SIGTERM to group":
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)


@pytest.mark.chaos
@pytest.mark.timeout(4 * 3600)
def test_kills_and_signals_on_two_nodes(recipe: Recipe, tmp_path: Path) -> None:
    store, rng = tmp_path / "s", random.Random(2026)
    for i in range(NUM_SHARDS):
        tiny.tar(tmp_path / f"in/{i:05d}.tar", rng.randrange(2, 9), i % 2, seed=i)
    tars, path = f"{tmp_path}/in/*.tar", tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    driver.run(tars, str(tmp_path / "calm"), recipe, RunOptions(workers="0", device="cpu", max_invalid=0.5))
    wanted = tiny.tree(tmp_path / "calm")
    ended, lost = Counter[str](), list[int]()
    victims = [*VICTIMS * NUM_KILLS][:NUM_KILLS]

    with TwoNodes(tmp_path) as nodes:

        def start() -> Run:
            more = ("--max-invalid", "0.5", "--attempts", "20")
            return Run(tars, store, path, "2", *more, address=nodes.address)

        def end(run: Run) -> tuple[int, str]:
            """Exit code, stderr. What lost workers had in hand is counted."""
            code, _, err = run.wait()
            lost.extend(map(int, re.findall(r"lost a worker with (\d) shards", err)))
            assert max(lost, default=0) <= IN_HAND
            return code, err

        def whole(run: Run) -> None:
            code, err = end(run)
            assert code == 0, err
            assert tiny.tree(store) == wanted
            ended["done"] += 1

        run = start()
        while victims:
            wait_for_a_random_moment(run, nodes, store, rng)
            if run.process.poll() is not None:
                whole(run)
                take_half_away(store, rng)
                run = start()
                continue
            victim = victims.pop(0)
            print(f"{NUM_KILLS - len(victims)}: {victim}", flush=True)
            strike(victim, run, nodes)
            if victim.endswith(("worker", "node")):
                continue  # the run goes on
            code, err = end(run)
            # Python's last moments end as the signal says, which is 143 to a shell; 0: it had just ended.
            assert code in ((143, -15, 0) if victim in ASKED else (-9, 0)), err
            ended[f"{victim}: {code}"] += 1
            nodes.idle()
            run = start()
        whole(run)
    print(f"{ended}; {len(lost)} workers lost {sum(lost)} shards that they had in hand")
