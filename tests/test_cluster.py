"""A real Ray of two nodes on loopback, a job sent with `ray job submit`, one node killed in mid-run: the same bytes."""

import json
import os
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from tests import tiny
from tests.processes import ROOT, Node, command_line, connects, free_port, kill, wait_for


def test_a_job_takes_the_code_along_and_no_data(tmp_path: Path) -> None:
    """As Ray packs it. `data` is also the name of two folders of code."""
    for name in ("data/00000.tar", "runs/x", "docs/x.md", ".venv/x", "reinforce/data/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    for name in (wanted := ["reinforce/data/shards.py", "train/data/order.py", "mine.py", "samples/train/00000.tar"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    environment = yaml.safe_load((ROOT / "pipelines/cluster/runtime_env.yaml").read_text())
    create_package(
        str(tmp_path), tmp_path.parent / "sent.zip", include_gitignore=True, excludes=environment["excludes"]
    )
    with zipfile.ZipFile(tmp_path.parent / "sent.zip") as sent:
        assert sorted(name for name in sent.namelist() if not name.endswith("/")) == sorted(wanted)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_outlives_one_of_its_two_nodes(recipe: Recipe, tmp_path: Path) -> None:
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 30, seed=i) for i in range(16))
    driver.run(tars, str(tmp_path / "alone"), recipe, RunOptions(workers="0", device="cpu"))
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    port, dashboard = free_port("127.0.0.2"), free_port("127.0.0.1")
    temp = Path(f"/tmp/ray-{uuid.uuid4().hex[:8]}")  # short: Ray puts sockets there, whose paths have a limit
    temp.mkdir()
    head = Node(
        tmp_path,
        "--head",
        "--node-ip-address=127.0.0.2",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--temp-dir={temp}",
    )
    nodes = [head]
    try:
        wait_for(lambda: connects("127.0.0.1", dashboard), 120, "the dashboard")
        second = Node(tmp_path, f"--address=127.0.0.2:{port}", "--node-ip-address=127.0.0.3")
        nodes.append(second)
        job = subprocess.Popen(
            [
                "make",
                "submit",
                f"RAY_ADDRESS=http://127.0.0.1:{dashboard}",
                f"SHARDS={tars}",
                f"STORE={tmp_path / 's'}",
                f"RECIPE={path}",
                "SUBMIT_WORKERS=2",
                "ARGS=--json --device cpu",
            ],
            cwd=ROOT,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(lambda: second.workers() and list(tmp_path.glob("s/*/key")), 300, "work on the second node", job)
        second.kill()
        out, _ = job.communicate(timeout=400)
        assert job.returncode == 0, out
        told = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
        assert told["failed"] == [] and told["workers_lost"] >= 1
        assert tiny.tree(tmp_path / "s") == tiny.tree(tmp_path / "alone")
    finally:
        for node in nodes:
            node.kill()


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_head_that_is_lost_is_a_sentence_and_the_next_run_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 30, seed=i) for i in range(6))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    port, temp = free_port("127.0.0.2"), Path(f"/tmp/ray-{uuid.uuid4().hex[:8]}")
    temp.mkdir()
    head = Node(tmp_path, "--head", "--node-ip-address=127.0.0.2", f"--port={port}", f"--temp-dir={temp}")
    asked = ["run", tars, "--store", str(tmp_path / "s"), "--recipe", str(tmp_path / "recipe.json"), "--device", "cpu"]
    command = [sys.executable, "-m", "reinforce", *asked, "--workers"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.2:{port}"}
    try:
        wait_for(lambda: connects("127.0.0.2", port), 120, "the head")
        run = subprocess.Popen([*command, "1"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: list(tmp_path.glob("s/*/key")), 300, "the first shard")
        kill([pid for pid in head.pids() if "gcs_server" in command_line(pid)])
        _, told = run.communicate(timeout=60)
    finally:
        head.kill()
    assert run.returncode == 1 and told.count("error:") == 1, told
    assert f"error: Ray's head at 127.0.0.2:{port} is lost" in told and "Traceback" not in told and "***" not in told
    again = subprocess.run([*command, "0"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "6 shards" in again.stdout
