"""Whatever befalls the writers of a store, in whatever order: nothing lost, nothing torn, nothing changed.

`make simulate RUNS=10000` asks for more runs. A run that goes wrong says its seed and what happened.
"""

import os

import pytest

from reinforce.store import arrays
from tests import simulation

RUNS = int(os.environ.get("RUNS", 200))
FIRST = int(os.environ.get("FIRST", 0))


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("part", range(4))
def test_simulated_runs(part: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "encode", simulation.encode)
    folder = str(tmp_path_factory.mktemp("tars"))
    for seed in range(FIRST + part, FIRST + RUNS, 4):
        faults, log = simulation.simulate(seed, folder)
        assert not faults, "\n".join([*log[-400:], *faults])
