"""Only the wheel is installed, and the user's folder has files that are called like our packages."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from reinforce.config import Recipe
from tests import tiny
from tests.processes import ROOT

BUILT_FROM = ("reinforce", "train", "pipelines", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of a new environment with our wheel. Its other packages are those of this one, which takes seconds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    quiet = {"check": True, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(wheel, **quiet)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], **quiet)
    (built,) = folder.glob("*.whl")
    python = folder / "venv/bin/python"
    subprocess.run([*pip, "--python", str(python), "install", "-q", "--no-deps", str(built)], **quiet)
    (own,) = (folder / "venv/lib").glob("python*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv/bin"


@pytest.fixture
def hers(tmp_path: Path) -> Path:
    """A folder of a user's own, with files that shadow our packages for `python -m`."""
    for name in ("train", "reinforce", "pipelines"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not the package')")
    return tmp_path


def run(bin_folder: Path, cwd: Path, *command: str) -> str:
    """What a command prints; an error is shown as it is."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(
        [str(bin_folder / command[0]), *command[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_wheel_that_runs(bin_folder: Path, hers: Path) -> None:
    where = run(bin_folder, hers, "python", "-P", "-c", "import reinforce, train, pipelines; print(reinforce.__file__)")
    assert str(bin_folder.parent) in where
    assert run(bin_folder, hers, "clip-reinforce", "--version").startswith("clip-reinforce ")


def test_recipes_configs_and_cluster_files_are_in_it(bin_folder: Path, hers: Path) -> None:
    assert set(json.loads(run(bin_folder, hers, "clip-reinforce", "recipes", "--json"))) >= {"datacompdr_12m", "sample"}
    printed = json.loads(run(bin_folder, hers, "clip-reinforce", "recipe", "datacompdr_1b", "--set", "seed=3"))
    assert printed["seed"] == 3 and printed["view_sets"]["base"]["num_views"] == 10
    assert "comkd" in json.loads(run(bin_folder, hers, "clip-train", "recipes", "--json"))
    (pipelines,) = bin_folder.parent.glob("lib/*/site-packages/pipelines")
    assert {path.name for path in (pipelines / "cluster").iterdir()} > {
        "Dockerfile", "rayjob.yaml", "reinforce.sbatch", "runtime_env.yaml", "submit.py"
    }  # fmt: skip
    told = run(bin_folder, hers, "clip-train", "latency", "mamba_tiny", "--size", "64", "--repeats", "2", "--json")
    assert json.loads(told)["rows"][0]["student"] == "mamba_tiny"


def test_from_tars_to_an_export(bin_folder: Path, hers: Path, recipe: Recipe) -> None:
    """A recipe of her own by path, a run on Ray, a training, an evaluation, an export."""
    (hers / "mine.py").write_text(
        "from reinforce.config import Recipe\n\n"
        f"RECIPE: Recipe = Recipe.model_validate_json({recipe.model_dump_json()!r}).but(name='mine')\n"
        "TRAINING = {'steps': 2, 'global_batch_size': 4, 'streams': 2, 'workers': 1, 'report_to': []}\n"
    )
    tiny.tar(hers / "00000.tar", 8)
    student = tiny.student(hers / "small")
    asked = ["00000.tar", "--store", "s.zarr", "--recipe", "./mine.py", "--device", "cpu"]
    told = run(bin_folder, hers, "clip-reinforce", "run", *asked, "--workers", "1")
    assert "8 samples read, 8 good" in told and "Recipe: mine" in told and "coca (local-dir:" in told
    assert "nothing to do" in run(bin_folder, hers, "clip-reinforce", "run", *asked)
    snippet = (
        "import zarr\nimport reinforce.store.bfloat16\n"
        "print(zarr.open_array('s.zarr/00000/view/base/vit', mode='r').dtype)"
    )
    assert run(bin_folder, hers, "python", "-P", "-c", snippet) == "bfloat16\n"
    fit = ["--shards", "00000.tar", "--store", "s.zarr", "--recipe", "./mine.py", "--student", student, "--out", "run"]
    assert json.loads(run(bin_folder, hers, "clip-train", "fit", *fit, "--json"))["steps"] == 2
    assert json.loads(run(bin_folder, hers, "clip-train", "eval", "run/student", "own=00000.tar", "--json"))["own"]
    assert json.loads(run(bin_folder, hers, "clip-train", "export", "run/student", "out", "--json"))["faults"] == []
