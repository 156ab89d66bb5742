"""What a user of the trainer types and sees: exit codes, sentences on stderr, exactly one JSON object on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests import processes, tiny
from tests.conftest import Reinforced
from tests.processes import ROOT, here
from train.__main__ import app

SMALL = [
    *("--set", "steps=2", "--set", "global_batch_size=8", "--set", "streams=4", "--set", "workers=0"),
    *("--set", "precision=fp32"),  # what `eval` computes in
]


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
    assert "step 2/2, loss" in said and "samples/s" in said
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
    image, text = json.loads(told)["rows"]
    assert (image["tower"], text["tower"]) == ("image", "text") and image["ms_median"] > 0 and image["params"] > 1e6


def test_wrong_requests_are_exit_2_with_a_sentence(reinforced: Reinforced, trained: Path, tmp_path: Path) -> None:
    asked = ["--shards", reinforced.shards, "--store", reinforced.store, "--out", str(tmp_path / "run"), *SMALL]
    for arguments, told in [
        (["fit", *asked, "--student", "mamba_tinny"], "did you mean mamba_tiny"),
        (["fit", *asked, "--recipe", "sampel"], "did you mean sample"),
        (["fit", *asked, "--set", "leaning_rate=1"], "no key 'leaning_rate'"),
        (["fit", *asked, "--set", 'report_to=["wandb"]'], "wandb is not installed: pip install wandb"),
        (["fit", *asked[4:], "--set", "shards=nowhere.tar", "--set", "store=nowhere"], "nowhere.tar: names no file"),
        (
            ["fit", *asked, "--set", "global_batch_size=9"],
            "places in the data that are read side by side; --set streams=1 fits",
        ),
        (["fit", *asked, "--eval", "a=x", "--eval", "a=y"], "two evaluation sets are called 'a': x and y; rename one"),
        (["adapt", "nowhere", "--teacher", "x", "--eval", "a=x", "--eval", "a=y"], "two evaluation sets are called"),
        (["eval", str(trained / "student"), "a=x", "a=y"], "two evaluation sets are called"),
        (["eval", str(trained), f"a={reinforced.shards.split('::')[0]}"], f"did you mean {trained / 'student'}?"),
        (["export", str(trained), str(tmp_path / "out")], f"did you mean {trained / 'student'}?"),
        (["fit", *asked, "--student", str(trained)], f"did you mean {trained / 'student'}?"),
        (["fit", *asked, "--eval", "heldout"], "NAME=SET"),
        (["eval", str(trained / "student"), "a=nowhere"], "nowhere"),
        (["export", str(trained / "student"), str(trained)], "is there already"),
        (["classify", "nope", "x.jpg"], "nope is no folder of a student trained with comkd"),
    ]:
        code, out, said = python_m("train", *arguments)
        assert (code, out) == (2, "") and told in said and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_a_teacher_to_adapt_has_to_be_named() -> None:
    for arguments, told in [
        (["adapt", "nowhere", "--pretrained", "openai"], "--pretrained openai needs --teacher"),
        (["adapt", "nowhere"], "name the CLIP to adapt: --teacher MODEL"),
    ]:
        code, out, said = python_m("train", *arguments)
        assert (code, out) == (2, "") and told in said


def test_a_package_that_is_not_installed_gets_a_sentence() -> None:
    program = "import sys; sys.modules['safetensors'] = None; from train.__main__ import main; main()"
    for arguments in (["fit", "--shards", "x.tar", "--set", "distill=0"], ["classify", "x", "y.jpg"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "safetensors is not installed; the writer needs: pip install" in done.stderr
