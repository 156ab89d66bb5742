"""A real Ray of two nodes on loopback, a job sent with `ray job submit`, one node killed in mid-run: the same bytes."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import uuid
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from pipelines.cluster import submit
from reinforce.config import Recipe, RunOptions
from reinforce.errors import ConfigError
from reinforce.run import driver
from tests import tiny
from tests.processes import BIN, ROOT, Node, TwoNodes, command_line, connects, free_port, kill, marked, wait_for


def test_a_cluster_that_takes_no_job_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The address of its head, which is for something else; one that nobody answers for, after a while in which it may
    be starting; and one that is no dashboard."""
    with pytest.raises(ConfigError, match=r"^localhost:6379 takes no jobs: they go to the cluster's dashboard"):
        submit.submit("localhost:6379", ["true"])
    monkeypatch.setattr(submit, "ANSWER_S", 0.5)
    with pytest.raises(
        ConfigError, match=r"^the cluster at http://127.0.0.1:9 takes no job: Failed to connect .*9; see"
    ):
        submit.submit("http://127.0.0.1:9", ["true"])
    assert capsys.readouterr().err.startswith("waiting for the cluster at http://127.0.0.1:9: Failed to connect")
    handler = type("NoDashboard", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(
            ConfigError, match=r"takes no job: .*; see that it is up .* this is its dashboard's address"
        ):
            submit.submit(f"http://127.0.0.1:{server.server_port}", ["true"])
        server.shutdown()


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
    dashboard = free_port("127.0.0.1")
    with TwoNodes(tmp_path, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}") as nodes:
        wait_for(lambda: connects("127.0.0.1", dashboard), 120, "the dashboard")
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
        wait_for(lambda: nodes.second.workers() and list(tmp_path.glob("s/*/key")), 300, "work on the second node", job)
        nodes.second.kill()
        out, _ = job.communicate(timeout=400)
    assert job.returncode == 0, out
    told = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert told["failed"] == [] and told["workers_lost"] >= 1
    assert tiny.tree(tmp_path / "s") == tiny.tree(tmp_path / "alone")


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


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_cluster_by_hand_as_the_page_types_it(recipe: Recipe, tmp_path: Path) -> None:
    """Its three lines, and a run from a shell of its own; both nodes are on this machine. Ray's own port is used."""
    page = (ROOT / "docs/cluster.md").read_text().partition("## A cluster by hand")[2]
    mode, head, other = [line.partition("#")[0].strip() for line in page.split("```")[1].strip().splitlines()]
    assert head.startswith("ray start --head") and "RAY_ADDRESS=HEAD:6379 clip-reinforce run" in page
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 9, seed=i) for i in range(4))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    mark = uuid.uuid4().hex

    def typed(*lines: str) -> str:
        """In a shell; stdout and stderr."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"NODE_MARK": mark, "PATH": f"{BIN}:{os.environ['PATH']}"}
        told = tmp_path / "told"
        with told.open("w") as out:  # no pipe: what `ray start` leaves behind would keep it open
            done = subprocess.run(
                ["bash", "-ec", "\n".join(lines)], cwd=tmp_path, env=environment, stdout=out, stderr=out, check=False
            )
        assert done.returncode == 0, told.read_text()
        return told.read_text()

    try:
        address = re.search(r"ray start --address='([\d.]+):6379'", typed(mode, head))[1]
        typed(mode, other.replace("HEAD", address))
        run = f"RAY_ADDRESS={address}:6379 clip-reinforce run '{tars}' --store s --recipe recipe.json --workers 2"
        told = typed(mode, run)
    finally:
        kill(marked(mark, "NODE_MARK"))
    assert "Ray: 2 nodes with" in told and "4 of 4 shards reinforced" in told
