"""What a user of the trainer types and sees: exit codes, sentences on stderr, exactly one JSON object on stdout."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from pipelines.experiments import lambda_sweep, steps
from reinforce.config import Recipe
from reinforce.errors import ConfigError
from tests import processes, tiny
from tests.conftest import Reinforced
from tests.processes import ROOT, here
from train.__main__ import app
from train.config import TrainConfig

SMALL = ["--set", "steps=2", "--set", "global_batch_size=8", "--set", "streams=4", "--set", "workers=0"]


def python_m(package: str, *arguments: str) -> tuple[int, str, str]:
    """Those of `train` in this process, which saves loading torch each time."""
    return here(app, *arguments) if package == "train" else processes.python_m(package, *arguments)


@pytest.fixture(scope="module")
def trained(reinforced: Reinforced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run made at the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    asked = ["--shards", reinforced.shards, "--store", reinforced.store, "--student", reinforced.student]
    own = f"own={reinforced.shards.split('::')[0]}"
    code, told, said = python_m("train", "fit", *asked, "--out", str(out), "--eval", own, *SMALL, "--json")
    assert code == 0, said
    report = json.loads(told)
    assert (report["steps"], report["samples"], report["skipped"]) == (2, 32, 2)
    assert "scans" in report and report["evaluated"]["own"]["num_images"] == 13
    assert "step 2/2, loss" in said and "samples/s" in said and "waiting for data" in said
    return out


def test_in_a_process_of_its_own_it_is_the_same(trained: Path, reinforced: Reinforced) -> None:
    for eval_set in (f"a={reinforced.shards.split('::')[0]}", "a=nowhere"):
        arguments = ["eval", str(trained / "student"), eval_set, "--json"]
        assert processes.python_m("train", *arguments) == here(app, *arguments)


def test_eval(trained: Path, reinforced: Reinforced) -> None:
    tars = reinforced.shards.split("::")
    code, told, _ = python_m("train", "eval", str(trained / "student"), f"a={tars[0]}", f"b={tars[1]}", "--json")
    assert code == 0
    found = json.loads(told)
    assert found["a"] == json.loads((trained / "report.json").read_text())["evaluated"]["own"]
    assert found["b"]["num_skipped"] == 2


def test_eval_in_half_precision_is_near(trained: Path, reinforced: Reinforced) -> None:
    asked = ["eval", str(trained / "student"), f"a={reinforced.shards.split('::')[0]}", "--device", "cpu", "--json"]
    ran = CliRunner().invoke(app, [*asked, "--precision", "amp_bf16", "--batch-size", "3"])
    assert ran.exit_code == 0, ran.stderr
    full = json.loads((trained / "report.json").read_text())["evaluated"]["own"]
    assert json.loads(ran.stdout)["a"] == pytest.approx(full, abs=0.2)  # 13 images: two of them may move


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    """The folder, the set and the image do not exist either."""
    nowhere = str(tmp_path / "nowhere")
    for arguments in (["eval", nowhere, f"a={nowhere}"], ["classify", nowhere, nowhere], ["latency", nowhere]):
        ran = CliRunner().invoke(app, [*arguments, "--device", "cuda"])
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert "device cuda was asked for, and torch" in ran.stderr and "finds no GPU" in ran.stderr


def test_every_option_of_the_commands_for_students_has_help() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in ("eval", "export", "classify", "latency"):
        assert commands[name].help
        missing = [parameter.name for parameter in commands[name].params if not getattr(parameter, "help", None)]
        assert not missing, (name, missing)


def test_export(trained: Path, tmp_path: Path) -> None:
    code, told, said = python_m("train", "export", str(trained / "student"), str(tmp_path / "out"), "--json")
    assert code == 0, said
    assert json.loads(told)["faults"] == []
    assert {"image.onnx", "text.onnx", "open_clip_model.safetensors"} <= set(tiny.tree(tmp_path / "out"))


def test_latency() -> None:
    code, told, said = python_m("train", "latency", "vit_tiny", "--size", "64", "--repeats", "2", "--json")
    assert code == 0, said
    image, text = json.loads(told)
    assert (image["tower"], text["tower"]) == ("image", "text") and image["ms_median"] > 0 and image["params"] > 1e6


def test_wrong_requests_are_exit_2_with_a_sentence(reinforced: Reinforced, trained: Path, tmp_path: Path) -> None:
    asked = ["--shards", reinforced.shards, "--store", reinforced.store, "--out", str(tmp_path / "run"), *SMALL]
    for arguments, told in [
        (["fit", *asked, "--student", "mamba_tinny"], "did you mean mamba_tiny"),
        (["fit", *asked, "--recipe", "sampel"], "did you mean sample"),
        (["fit", *asked, "--set", "leaning_rate=1"], "no key 'leaning_rate'"),
        (["fit", *asked, "--set", "global_batch_size=9"], "multiple of streams"),
        (["fit", *asked, "--eval", "heldout"], "NAME=SET"),
        (["eval", str(trained / "student"), "a=nowhere"], "nowhere"),
        (["export", str(trained / "student"), str(trained)], "is there already"),
    ]:
        code, out, said = python_m("train", *arguments)
        assert (code, out) == (2, "") and told in said and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_experiments_name_themselves_and_refuse_with_a_sentence(tmp_path: Path) -> None:
    code, _, said = python_m("pipelines", "lamda_sweep")
    assert code == 2 and "lambda_sweep" in said and "sample" in said
    code, out, said = python_m("pipelines", "lambda_sweep", "--data", "nowhere", "--out", str(tmp_path))
    assert (code, out) == (2, "") and said.startswith("error: nowhere: no tars") and "Traceback" not in said, said


@pytest.mark.parametrize("name", ["comkd", "sample"])
def test_outside_a_checkout_it_is_said_where_the_samples_are(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines", name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: no samples/train here")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def training(reinforced: Reinforced) -> TrainConfig:
    return TrainConfig(
        shards=reinforced.shards,
        store=reinforced.store,
        student=reinforced.student,
        steps=2,
        global_batch_size=8,
        streams=4,
        workers=0,
        report_to=[],
    )


def test_trainings_side_by_side_are_done_once(training: TrainConfig, tmp_path: Path) -> None:
    runs = {f"seed_{seed}": training.but(seed=seed) for seed in range(2)}
    reports = steps.fit_all(runs, tmp_path, "students", at_once=2)
    assert [(name, reports[name]["out"]) for name in runs] == [(name, str(tmp_path / name)) for name in runs]
    assert reports["seed_0"]["metrics"] != reports["seed_1"]["metrics"]
    assert "step 2/2" in (tmp_path / "seed_1/log.txt").read_text()
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = {"seed_0": runs["seed_0"]}
    assert steps.fit_all(again, tmp_path, "students", at_once=1) == {"seed_0": reports["seed_0"]}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == weights
    with pytest.raises(ConfigError, match="belongs to a training with other settings"):
        steps.fit_all({"seed_0": training.but(steps=3)}, tmp_path, "students", at_once=1)


def test_a_job_that_is_killed_gets_a_sentence_and_no_other_begins(tmp_path: Path) -> None:
    killed, other = partial(signal.raise_signal, signal.SIGKILL), partial(print, "begun")
    with pytest.raises(steps.StepFailed, match=f"{tmp_path}/a: its process was killed"):
        steps.side_by_side({tmp_path / "a": killed, tmp_path / "b": other, tmp_path / "c": other}, "jobs", at_once=1)
    assert not (tmp_path / "c").exists()


def test_a_store_whose_shards_fail_gets_a_sentence(recipe: Recipe, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 2, 2)
    with pytest.raises(steps.StepFailed, match="1 shards failed; of 00000 it says: 2 of 4 samples are invalid"):
        steps.write_store(tar, str(tmp_path / "store"), recipe, workers=0)


def test_the_table_of_the_sweep() -> None:
    """Three seeds, hand-made scores: means, spreads, and gains by seed."""
    scores = {0.0: (40.0, 50.0, 60.0), 0.25: (41.0, 52.0, 63.0), 0.75: (50.0, 60.0, 70.0), 1.0: (40.0, 50.0, 60.0)}
    top1 = {f"teacher_{i}": 70.0 for i in range(2)} | {
        lambda_sweep._name(noise, weight, seed): top1
        for noise in lambda_sweep.NOISES
        for weight, found in scores.items()
        for seed, top1 in enumerate(found)
    }
    table = lambda_sweep._table(top1, 3)
    row = table["rows"][1]
    assert row["mean"] == pytest.approx(52.0) and row["spread"] == pytest.approx(11.0)
    assert row["gain"] == pytest.approx(2.0) and row["gain_spread"] == pytest.approx(1.0)
    text = lambda_sweep.markdown(table)
    assert "| 0% | 0.25 | 41.0, 52.0, 63.0 | 52.0 ± 11.0 | +2.0 ± 1.0 |" in text
    assert "| 40% | 0.0 | 40.0, 50.0, 60.0 | 50.0 ± 10.0 |  |" in text
