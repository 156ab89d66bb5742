"""What a user of the trainer types and sees: exit codes, sentences on stderr, exactly one JSON object on stdout."""

import json
from pathlib import Path

import pytest

from pipelines.experiments import lambda_sweep, steps
from tests import processes, tiny
from tests.conftest import Reinforced
from tests.processes import here
from train.__main__ import app

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


def test_journeys_name_themselves() -> None:
    code, _, said = python_m("pipelines", "lamda_sweep")
    assert code == 2 and "lambda_sweep" in said and "sample" in said


def test_a_step_that_is_done_is_skipped_and_a_failed_one_shows_its_words(tmp_path: Path) -> None:
    done = tmp_path / "a/report.json"
    done.parent.mkdir()
    done.touch()
    steps.run([(done, ["train", "no-such-command"])], "nothing")
    with pytest.raises(steps.StepFailed, match=r"(?s)ended with 2.*no-such-command"):
        steps.run([(tmp_path / "b/report.json", ["train", "no-such-command"])], "failing")


def test_the_table_of_the_sweep(tmp_path: Path) -> None:
    """Three seeds, hand-made scores: means, spreads, and gains by seed."""
    scores = {0.0: (0.40, 0.50, 0.60), 0.25: (0.41, 0.52, 0.63), 0.75: (0.50, 0.60, 0.70), 1.0: (0.40, 0.50, 0.60)}
    for noise in lambda_sweep.NOISES:
        for weight, found in scores.items():
            for seed, top1 in enumerate(found):
                folder = tmp_path / lambda_sweep._name(noise, weight, seed)
                folder.mkdir()
                (folder / "report.json").write_text(json.dumps({"evaluated": {"test": {"top1": top1}}}))
    for i in range(2):
        (tmp_path / f"teacher_{i}").mkdir()
        (tmp_path / f"teacher_{i}/report.json").write_text(json.dumps({"evaluated": {"test": {"top1": 0.7}}}))
    table = lambda_sweep._table(tmp_path, 3)
    row = table["rows"][1]
    assert row["mean"] == pytest.approx(52.0) and row["spread"] == pytest.approx(11.0)
    assert row["gain"] == pytest.approx(2.0) and row["gain_spread"] == pytest.approx(1.0)
    text = lambda_sweep.markdown(table)
    assert "| 0% | 0.25 | 41.0, 52.0, 63.0 | 52.0 ± 11.0 | +2.0 ± 1.0 |" in text
    assert "| 40% | 0.0 | 40.0, 50.0, 60.0 | 50.0 ± 10.0 |  |" in text
