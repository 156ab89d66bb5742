"""The image and the Slurm script of pipelines/cluster, as far as they go without Docker and Slurm.

The image's steps are taken one by one: what it copies, and its `pip install` in a new environment. The Slurm script
runs whole, on a real Ray of two nodes on loopback; `srun` and `scontrol` are the few lines below.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from tests import tiny
from tests.processes import BIN, ROOT, free_port, kill, marked, wait_for

CLUSTER = ROOT / "pipelines/cluster"
SLURM = {
    "scontrol": "#!/bin/sh\nprintf '127.0.0.2\\n127.0.0.3\\n'\n",
    "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
}


def steps() -> list[list[str]]:
    """The lines of the Dockerfile, as words."""
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    return [shlex.split(line, posix=not line.startswith("CMD")) for line in lines if line and not line.startswith("#")]


def taken() -> list[tuple[str, str]]:
    """What the image copies, and where to."""
    return [(source, step[-1]) for step in steps() if step[0] == "COPY" for source in step[1:-1]]


def test_the_builder_is_sent_what_the_image_takes_and_no_data() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {source for source, _ in taken()} and all((ROOT / source).exists() for source in kept)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_the_image_installs_runs_without_the_checkout(tmp_path: Path) -> None:
    for source, to in taken():
        into = tmp_path / "image" / to / ("" if (ROOT / source).is_dir() else source)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, into)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    [install] = [step[1:] for step in steps() if step[:2] == ["RUN", "pip"]]
    subprocess.run([tmp_path / "venv/bin" / install[0], *install[1:]], cwd=tmp_path / "image", check=True)
    shutil.rmtree(tmp_path / "image")
    (tmp_path / "data").mkdir()
    shutil.copytree(ROOT / "samples", tmp_path / "data/samples")
    command = [tmp_path / "venv/bin/clip-reinforce", "run", "samples/train/00000.tar", "--store", "s"]
    done = subprocess.run(
        [*command, "--recipe", "sample", "--workers", "1", "--set", "view_sets.base.num_views=1"],
        cwd=tmp_path / "data",
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job of two nodes; gives the mark of all its processes."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    mark = uuid.uuid4().hex
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("RUN_MARK", mark)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[2-3]")
    monkeypatch.setenv("RAY_PORT", str(free_port("127.0.0.2")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return mark


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_slurm_job_is_a_run_on_all_its_nodes_and_goes_on_when_it_is_sent_again(
    recipe: Recipe, tmp_path: Path, slurm: str
) -> None:
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 30, seed=i) for i in range(12))
    driver.run(tars, str(tmp_path / "alone"), recipe, RunOptions(workers="0", device="cpu"))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    asked = {"SHARDS": tars, "STORE": str(tmp_path / "s"), "RECIPE": str(tmp_path / "recipe.json"), "WORKERS": "2"}
    log = (tmp_path / "log").open("w+")

    def send() -> subprocess.Popen:
        script = ["bash", str(CLUSTER / "reinforce.sbatch")]
        return subprocess.Popen(script, cwd=tmp_path, env=os.environ | asked, stdout=log, stderr=log)

    try:
        first = send()
        wait_for(lambda: list(tmp_path.glob("s/0*/zarr.json")) or first.poll() is not None, 200, "a shard")
        first.send_signal(signal.SIGTERM)  # as Slurm does, two minutes before the time is over
        code = first.wait(60)
        assert code == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
        wait_for(lambda: not marked(slurm), 60, "the end of Ray")
        assert send().wait(300) == 0, (tmp_path / "log").read_text()
        assert tiny.tree(tmp_path / "s") == tiny.tree(tmp_path / "alone")
        wait_for(lambda: not marked(slurm), 60, "the end of Ray")
    finally:
        kill(marked(slurm))
        log.close()


@pytest.mark.parametrize(("given", "message"), [({}, "name the tars"), ({"SHARDS": "a.tar"}, "name the store")])
def test_a_slurm_job_without_shards_or_store_says_so(given: dict[str, str], message: str) -> None:
    done = subprocess.run(
        ["bash", str(CLUSTER / "reinforce.sbatch")], env=os.environ | given, capture_output=True, text=True, check=False
    )
    assert done.returncode and message in done.stderr
