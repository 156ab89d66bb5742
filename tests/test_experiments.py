"""Experiments: their data, their steps, grids of trainings with their tables and pictures, and how they are called."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import __main__
from pipelines.experiments import charts, grid, labelled, questions, ready, steps
from pipelines.experiments.grid import Row
from reinforce.config import Recipe
from reinforce.data import shards
from reinforce.errors import ConfigError
from reinforce.store.store import Store
from tests import tiny
from tests.conftest import Reinforced
from tests.processes import ROOT, python_m
from train.config import TrainConfig
from train.evaluation.sets import EvalSet

COARSE = {"apple": "fruit", "pear": "fruit", "milk": "dairy"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise of three classes, of two groups, as somebody's labelled tars. Gives their prefix."""
    prefix = tmp_path_factory.mktemp("data") / "food"
    write(prefix, "{}_{}", {"train": 24, "validation": 6, "test": 9})
    return str(prefix)


def write(prefix: Path, layout: str, sizes: dict[str, int]) -> None:
    for part, num in sizes.items():
        folder = Path(layout.format(prefix, part))
        folder.mkdir(parents=True)
        samples = ((f"{part}{i}", sample(list(COARSE)[i % 3], i)) for i in range(num))
        shards.write(str(folder / "00000.tar"), samples)


def sample(label: str, seed: int) -> dict[str, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    told = {"label": label, "coarse": COARSE[label]}
    return {"jpg": labelled.jpeg(Image.fromarray(pixels)), "json": json.dumps(told).encode()}


def test_a_labelled_set_is_folders_of_tars(data: str, tmp_path: Path) -> None:
    found = labelled.read(data, longest_px=30)
    assert found.classes == ["apple", "milk", "pear"] and found.coarse == COARSE
    assert [len(part) for part in (found.train["00000.tar"], found.validation, found.test)] == [24, 6, 9]
    write(tmp_path / "inside", "{}/{}", {"train": 24, "validation": 6, "test": 9})
    assert labelled.read(str(tmp_path / "inside"), longest_px=30) == found
    labelled.write(found, tmp_path / "out", {"clean": 0.0, "noisy": 0.5})
    [test] = shards.expand(f"{tmp_path}/out/test/test/*.tar")
    assert [parts["cls"] for _, parts in shards.read_parts(test, ("cls",))] == [b"0", b"2", b"1"] * 3
    eval_set = EvalSet(f"{tmp_path}/out/test")
    assert eval_set.classnames == found.classes and eval_set.coarse == ["fruit", "dairy", "fruit"]
    written = tiny.tree(tmp_path / "out")
    labelled.write(found, tmp_path / "out", {"clean": 0.0, "noisy": 0.5})
    assert tiny.tree(tmp_path / "out") == written


def test_wrong_captions_are_a_share_of_all_and_name_another_class() -> None:
    classes = ["a", "b", "c"]
    texts = [labelled.caption(f"key{i}", "b", classes, 0.4) for i in range(2000)]
    of = {name: texts.count(f"a photo of a {name}.") for name in classes}
    assert sum(of.values()) == 2000
    assert of["b"] == pytest.approx(1200, abs=90) and of["a"] == pytest.approx(of["c"], abs=90)
    assert labelled.caption("key", "b", classes, 0.0) == "a photo of a b."


def test_a_set_that_is_not_whole_gets_a_sentence(data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tars in nowhere_train or nowhere/train; say where .*--data PREFIX"):
        labelled.read("nowhere")
    write(tmp_path / "half", "{}/{}", {"train": 2, "validation": 2, "test": 3})
    with pytest.raises(ConfigError, match="no training image of the class 'milk'"):
        labelled.read(str(tmp_path / "half"))
    bare = {"jpg": sample("milk", 0)["jpg"], "json": b'{"label": "milk"}'}
    (tmp_path / "mixed/train").mkdir(parents=True)
    shards.write(str(tmp_path / "mixed/train/0.tar"), [("a", sample("apple", 0)), ("b", bare)])
    for part in ("test", "validation"):
        (tmp_path / "mixed" / part).symlink_to(tmp_path / "mixed/train")
    with pytest.raises(ConfigError, match="the class 'milk' has no `coarse`, and others have"):
        labelled.read(str(tmp_path / "mixed"))
    (tmp_path / "bare/train").mkdir(parents=True)
    shards.write(str(tmp_path / "bare/train/0.tar"), [("key7", {"jpg": sample("milk", 0)["jpg"]})])
    (tmp_path / "bare/test").symlink_to(tmp_path / "bare/train")
    (tmp_path / "bare/validation").symlink_to(tmp_path / "bare/train")
    with pytest.raises(ConfigError, match="key7 has no jpg, or no json with a label"):
        labelled.read(str(tmp_path / "bare"))


@pytest.fixture(scope="module")
def plain(data: str, reinforced: Reinforced, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two steps from captions alone; the evaluation sets lie beside its tars."""
    folder = tmp_path_factory.mktemp("grid")
    labelled.write(labelled.read(data), folder, {"clean": 0.0})
    return TrainConfig(
        student=reinforced.student, shards=f"{folder}/clean/*.tar", distill=0, steps=2, global_batch_size=8,
        eval_every_n_steps=1, log_every_n_steps=1, precision="fp32", workers=0, report_to=[],
    )  # fmt: skip


def test_a_grid_is_trained_once_and_compared_seed_by_seed(plain: TrainConfig, tmp_path: Path) -> None:
    folder = Path(plain.shards).parent.parent
    rows = [
        Row("clean", "slow", "slow", plain.but(lr=1e-4), 2),
        Row("clean", "fast", "fast", plain.but(lr=0.1), 3, against="slow"),
    ]
    closed = {"validation": f"{folder}/validation", "test": "nobody opens this"}
    table = grid.run(rows, plain, closed, "validation", 9, tmp_path, 2, "students")
    assert [len(line["scores"]["acc1"]) for line in table] == [2, 3]
    assert table[1]["gains"]["acc1"] == [
        b - a for a, b in zip(*(line["scores"]["acc1"] for line in table), strict=False)
    ]
    assert "gains" not in table[0] and table[1]["as_good_after"] in (None, 8, 16)
    assert {"coarse_acc1", "mean_per_class_recall"} <= table[0]["scores"].keys()
    open_ = {split: f"{folder}/{split}" for split in ("validation", "test")}
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    tested = grid.run(rows, plain, open_, "test", 1, tmp_path, 2, "students")
    assert [line["scores"]["num"] for line in tested] == [[9], [9]] and len(weights) == 10  # students, checkpoints
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == weights
    charts.bars(tmp_path / "bars.png", {"clean": table}, "acc1", "title", "percent")
    assert [list(curve) for curve in table[1]["curves"]] == [[8, 16]] * 3  # samples seen
    charts.curves(tmp_path / "curves.png", table, "title", "percent")
    for name in ("bars.png", "curves.png"):
        assert len(Image.open(tmp_path / name).convert("RGB").getcolors(10**6)) > 20  # something is drawn


def test_the_table_in_words() -> None:
    def line(label: str, acc1: list[float], collapsed: list[bool], **more: Any) -> dict[str, Any]:
        scores = {"acc1": acc1, "coarse_acc1": [0.5] * len(acc1)}
        curves = [{800: 0.3, 1600: 0.4}] * len(acc1)
        return {"label": label, "scores": scores, "curves": curves, "collapsed": collapsed} | more

    rows = [line("λ = 0", [0.4, 0.5, 0.6], [False] * 3), line("λ = 1", [0.41, 0.52, 0.63], [False, True, False])]
    rows[1] |= {"gains": {"acc1": [0.01, 0.02, 0.03]}, "as_good_after": 800}
    rows.append(line("one", [0.7], [False], gains={"acc1": [0.3]}, as_good_after=None))
    assert grid.markdown(rows, {"acc1": "top-1", "absent": "absent", "coarse_acc1": "coarse"}).splitlines() == [
        "|  | top-1 by seed | mean ± sd | gain, paired | coarse | as good after | collapsed |",
        "|---|---|---|---|---|---|---|",
        "| λ = 0 | 40.0 50.0 60.0 | 50.0 ± 10.0 |  | 50.0 ± 0.0 |  | 0 of 3 |",
        "| λ = 1 | 41.0 52.0 63.0 | 52.0 ± 11.0 | +2.0 ± 1.0 | 50.0 ± 0.0 | 800 of 1,600 | 1 of 3 |",
        "| one | 70.0 | 70.0 | +30.0 | 50.0 | not | 0 of 1 |",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_labelled_tars_to_the_table_of_the_sweep(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "TEACHER", ready.TEACHER | {"steps": 2, "global_batch_size": 8})
    monkeypatch.setattr(questions, "SEEDS", {2: {0.0: 2, 0.75: 1}, 3: {0.0: 1, 0.75: 1}})
    asked = ["--data", data, "--out", str(tmp_path / "food/sweep"), "--set", "global_batch_size=8", "--json"]
    questions.main("lambda_sweep", [*asked, "--set", "eval_every_n_steps=1"])
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == [
        f"{noise}_{length}_{weight}" for noise in ("clean", "noisy") for length in (2, 3) for weight in ("0", "0.75")
    ]
    assert found["teachers"].keys() == {"teacher_0", "teacher_1"} and found["teachers"]["teacher_0"]["num"] == 9
    text = (tmp_path / "food/sweep/table.md").read_text()
    assert "2 steps, 40% of captions wrong:" in text and "On test, teachers: teacher_0 top-1 " in text
    assert "\n10 trainings, 0 minutes of one core in all.\n" in text
    drawn = {path.name for path in (tmp_path / "food/sweep").glob("*.png")}
    assert drawn == {"bars.png", *(f"curves_{group}.png" for group in range(4))}


def test_rows_that_are_not_there_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        questions.main("lambda_sweep", ["--data", "x", "--only", "("])
    assert "'(' is no regular expression" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--only dirty: in no row of lambda_sweep is that found"):
        questions.main("lambda_sweep", ["--data", "x", "--only", "dirty"])


def test_the_warm_up_is_a_share_of_every_length(plain: TrainConfig) -> None:
    rows = questions.lambda_sweep(plain.but(steps=400, warmup=100), "clean")
    assert {(row.config.steps, row.config.warmup) for row in rows} == {(400, 100), (800, 200)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ladder_has_a_captioner_of_its_own(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TEACHER", "CAPTIONER"):
        small = {"steps": 2, "global_batch_size": 8}
        monkeypatch.setattr(ready, name, getattr(ready, name) | small)
    asked = ["--data", data, "--out", str(tmp_path / "food/ladder"), "--only", "noisy_mamba", "--seeds", "1", "--json"]
    questions.main("ladder", asked + ["--set", "steps=2", "--set", "global_batch_size=8", "--set", "warmup=0"])
    found = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in found["rows"]] == [
        "plain", "+ synthetic captions", "+ distillation", "+ strong augmentation", "+ a second teacher"
    ]  # fmt: skip
    recipe = Store(str(tmp_path / "food/noisy_captioned.zarr")).promised().parsed_recipe()
    assert recipe.view_sets.keys() == {"base", "light"} and recipe.text_sets == {"original": 1, "coca": 5}


@pytest.mark.parametrize("name", questions.QUESTIONS)
def test_every_question_compares_rows_that_are_there(name: str, plain: TrainConfig) -> None:
    rows = [row for noise in ready.NOISES for row in questions.QUESTIONS[name](plain, noise)]
    folders = [row.name for row in rows]
    assert len(set(folders)) == len(folders)
    for row in rows:
        [base] = [other for other in rows if other.name == (row.against or row.name)]
        assert base.group == row.group and base.num_seeds >= row.num_seeds
    assert {row.group for row in rows} == {row.group for row in rows if row.against is None}
    assert name in __main__.QUESTIONS


def test_experiments_name_themselves_and_refuse_with_a_sentence(tmp_path: Path) -> None:
    code, _, said = python_m("pipelines", "lamda_sweep")
    assert code == 2 and "lambda_sweep" in said and "sample" in said
    code, out, said = python_m("pipelines", "lambda_sweep", "--data", "nowhere", "--out", str(tmp_path))
    assert (code, out) == (2, "") and said.startswith("error: no tars in nowhere_train"), said


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
