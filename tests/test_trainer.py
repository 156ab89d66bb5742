"""A training as its user sees it: a kill changes no curve, ranks agree with one process, faults get a sentence."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reinforce.errors import ConfigError, Corrupt, Diverged, NotCommitted, ReplayError, StoreError
from reinforce.models import tensorfile
from tests import tiny
from tests.conftest import Reinforced
from tests.processes import ROOT
from train import checkpoint, students
from train.config import TrainConfig, load_training, taking_the_place
from train.folder import check_folder
from train.trainer import _Fit, fit, lr_at

WEIGHTS = "student/open_clip_model.safetensors"


def config(made: Reinforced, **changes: object) -> TrainConfig:
    return TrainConfig(
        student=made.student,
        shards=made.shards,
        store=made.store,
        global_batch_size=8,
        streams=4,
        steps=10,
        warmup=2,
        precision="fp32",
        workers=0,
        log_every_n_steps=1,
        report_to=[],
    ).but(**changes)


def curve(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def same_weights(left: Path, right: Path) -> bool:
    a, b = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(config: TrainConfig, out: Path, folder: Path) -> list[str]:
    recipe = folder / "training.json"
    recipe.write_text(config.model_dump_json())
    asked = ["--shards", config.shards, "--store", str(config.store), "--out", str(out), "--recipe", str(recipe)]
    return ["train", "fit", *asked]


def test_what_a_run_leaves(reinforced: Reinforced, tmp_path: Path) -> None:
    asked = config(reinforced, eval_sets={"own": reinforced.shards.split("::")[0]}, report_to=["tensorboard"])
    report = fit(asked, tmp_path / "run")
    assert report["steps"] == 10 and report["samples_seen"] == 80 and report["skipped"] == 2
    assert 0 <= report["evaluated"]["own"]["text_retrieval_recall@1"] <= 1
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert TrainConfig.model_validate(saved["config"]) == asked and saved["software"]["torch"]
    assert json.loads((tmp_path / "run/report.json").read_text()) == report
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 11))
    curves = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert len(curves.Scalars("loss")) == 10
    [shown] = curves.Images("batch/images")
    assert shown.step == 0 and shown.width >= 32 and curves.Tensors("batch/keys/text_summary")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000010.safetensors"]
    again = students.create(str(tmp_path / "run/student"), seed=9)
    assert torch.equal(
        again.model.state_dict()["visual.conv1.weight"], load_file(tmp_path / "run" / WEIGHTS)["visual.conv1.weight"]
    )


@pytest.mark.parametrize(
    "setting",
    ["lr=1e38", "min_lr=1e38", "wd=1e38", "eps=1e-300", "epochs=1e300", "steps=10000000000000", "feature_mse=1e300"]
    + ["dist_logit_scale.vit=1e300", "grad_clip_norm=1e-300"],
)
def test_numbers_that_float32_cannot_hold_are_refused_at_once(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting.split('=')[0]}.*should be (less|greater) than or equal to"):
        load_training(None, [setting])


@pytest.mark.parametrize(
    ("shards", "store", "data", "becomes"),
    [
        (None, None, None, ("own.tar", "own.zarr", [])),
        ("a.tar", None, None, ("a.tar", "own.zarr", [])),
        (None, "s.zarr", None, ("own.tar", "s.zarr", [])),
        ("a.tar", "s.zarr", None, ("a.tar", "s.zarr", [])),
        (None, None, [{"shards": "b.tar"}], ("", None, ["b.tar"])),
    ],
)
def test_what_a_request_names_takes_the_place_of_the_recipe_s(
    shards: str | None, store: str | None, data: list[dict[str, str]] | None, becomes: tuple[object, ...]
) -> None:
    recipe = TrainConfig(shards="own.tar", store="own.zarr").model_dump()
    asked = ({"data": data} if data else {}) | taking_the_place(shards, store, data)
    found = TrainConfig.model_validate(recipe | asked)
    assert (found.shards, found.store, [part.shards for part in found.data]) == becomes
    of_parts = TrainConfig(data=[{"shards": "c.tar"}]).model_dump()
    if shards:
        assert not TrainConfig.model_validate(of_parts | taking_the_place(shards, store, None)).data


class FakeWandb(ModuleType):
    """What is asked of wandb, which has no server here."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.Image = lambda pixels, caption: (pixels.shape, caption)

    def init(self, **asked: Any) -> "FakeWandb":
        self.begun.append(asked)
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None: ...


def test_a_training_is_one_run_of_wandb(
    reinforced: Reinforced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it goes on; and another one in a folder of the same name is another run."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    asked = config(reinforced, report_to=["wandb"], steps=4, save_every_n_steps=2)
    fit(asked, tmp_path / "a/latest")
    for path in (tmp_path / "a/latest/report.json", tmp_path / "a/latest/checkpoints/step_00000004.safetensors"):
        path.unlink()
    fit(asked, tmp_path / "a/latest")
    fit(asked, tmp_path / "b/latest")
    ids = [begun["id"] for begun in fake.begun]
    assert ids[0] == ids[1] != ids[2] and {begun["name"] for begun in fake.begun} == {"latest"}
    shown = [(step, metrics["batch"]) for step, metrics in fake.logged if "batch" in metrics]
    assert [step for step, _ in shown] == [0, 2, 0] and all(len(batch) == 8 for _, batch in shown)
    assert [step for step, metrics in fake.logged if "loss" in metrics] == [1, 2, 3, 4, 3, 4, 1, 2, 3, 4]


def test_it_learns(reinforced: Reinforced, tmp_path: Path) -> None:
    fit(config(reinforced, steps=60, distill=0.5, feature_mse=1.0, lr=3e-3), tmp_path)
    losses = [loss for _, loss in curve(tmp_path)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_run_again_finds_that_all_is_done(
    reinforced: Reinforced, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fit(config(reinforced), tmp_path)
    before = tiny.tree(tmp_path)
    assert "came to its end before" not in capsys.readouterr().err
    assert fit(config(reinforced), tmp_path) == first
    assert tiny.tree(tmp_path) == before
    assert f"{tmp_path}: this training came to its end before; for a new one give another --out" in (
        capsys.readouterr().err
    )


def test_a_folder_of_other_things_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """One of a training is not, in whatever state it was left."""
    out = tmp_path / "out"
    asked = TrainConfig(shards=str(tmp_path / "none.tar"), store=str(tmp_path / "none"))
    for name, text, refused in [
        ("00000.tar", "x", True),
        ("config.json", '{"model_cfg": {}}', True),  # of an open_clip model
        ("config.json", "[]", True),
        ("log.txt", "WARNING ..", False),  # of a training that failed as it began, `2>> out/log.txt`
        ("config.json", "", False),
        ("config.json", '{\n "config": {\n  "eval_ev', False),  # killed as it wrote it
        ("metrics.jsonl", "{}", False),
        ("diverged_step_0_rank_0.json", "{}", False),
        ("tensorboard/events", "x", False),
        ("checkpoints/step_00000001.safetensors", "x", False),
        ("checkpoints/best.pt", "x", True),
    ]:
        path = out / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        told = "out holds other things, such as .*, and no training; give another --out" if refused else "none"
        with pytest.raises((ConfigError, StoreError), match=told):
            fit(asked, out)
        assert tiny.tree(out) == {name: text.encode()}
        shutil.rmtree(out)
    out.write_text("")
    with pytest.raises(ConfigError, match="out is a file"):
        fit(asked, out)


def test_a_training_that_left_only_its_settings_goes_on(reinforced: Reinforced, tmp_path: Path) -> None:
    fit(config(reinforced, steps=1), tmp_path)
    for left in (path for path in tmp_path.iterdir() if path.name != "config.json"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    check_folder(tmp_path)  # it knows the file as one of a training


def test_where_steps_are_given_epochs_do_not_count(reinforced: Reinforced, tmp_path: Path) -> None:
    """As when a recipe sets epochs, and --set steps=2 tries it."""
    first = fit(config(reinforced, steps=2, epochs=2), tmp_path)
    assert first["steps"] == 2 and fit(config(reinforced, steps=2), tmp_path) == first
    with pytest.raises(ConfigError, match="epochs: it was 2.0, .* 3.0\n  steps: it was 2, this run asks for None"):
        fit(config(reinforced, steps=None, epochs=3), tmp_path)


def test_what_scans_a_student_takes_has_a_line_of_its_own(
    reinforced: Reinforced, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(reinforced, student="mamba_tiny", steps=1), tmp_path)
    scans, begun, *_ = capsys.readouterr().err.splitlines()
    assert scans.startswith("selective scan: ") and begun.startswith("mamba_tiny on ") and len(begun) < 80


def test_without_git_and_outside_the_main_thread(
    reinforced: Reinforced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with ThreadPoolExecutor(1) as thread:
        report = thread.submit(fit, config(reinforced, steps=2), tmp_path / "run").result()
    assert report["steps"] == 2
    assert json.loads((tmp_path / "run/config.json").read_text())["commit"] is None


def test_killed_before_its_report_it_keeps_the_metrics_of_its_last_step(reinforced: Reinforced, tmp_path: Path) -> None:
    metrics = fit(config(reinforced, steps=2), tmp_path)["metrics"]
    (tmp_path / "report.json").unlink()
    assert fit(config(reinforced, steps=2), tmp_path)["metrics"] == metrics
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_training_is_evaluated_on_sets_that_are_new_to_it(reinforced: Reinforced, tmp_path: Path) -> None:
    """Its averaged weights, and only these sets; what it was evaluated on before stays in the report."""
    tars = reinforced.shards.split("::")
    asked = config(reinforced, steps=2, ema_decay=0.5)
    at_once = fit(asked.but(eval_sets={"a": tars[0], "b": tars[1]}), tmp_path / "at_once")["evaluated"]
    fit(asked.but(eval_sets={"a": tars[0]}), tmp_path / "later")
    weights = (tmp_path / "later" / WEIGHTS).read_bytes()
    later = fit(asked.but(eval_sets={"b": tars[1]}), tmp_path / "later")
    assert later["evaluated"] == at_once and (tmp_path / "later" / WEIGHTS).read_bytes() == weights
    assert json.loads((tmp_path / "later/report.json").read_text()) == later
    moved = fit(asked.but(eval_sets={"a": tars[1]}), tmp_path / "later")  # another set under a known name
    assert moved["evaluated"] == {"a": at_once["b"], "b": at_once["b"]}
    assert fit(asked, tmp_path / "later") == moved


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_killed_in_mid_epoch_and_resumed_it_is_the_same_curve(
    reinforced: Reinforced, tmp_path: Path, ema_decay: float
) -> None:
    asked = config(reinforced, steps=40, save_every_n_steps=3, ema_decay=ema_decay, feature_mse=0.5)
    fit(asked, tmp_path / "whole")
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", *command(asked, run, tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (run / "report.json").exists()
    fit(asked.but(workers=2), run)
    assert curve(run) == curve(tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_asked_to_stop_it_finishes_the_step_and_says_how_to_go_on(
    reinforced: Reinforced, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """To the process alone; or to it and its loader's workers, as a terminal does, `timeout` and some schedulers."""
    asked = config(reinforced, steps=2000, workers=workers)
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", *command(asked, run, tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
        time.sleep(0.01)
    if workers:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "run the same command again to go on" in told
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.stem.removeprefix("step_")) == len(curve(run))


def test_two_ranks_are_one_with_twice_the_batch(reinforced: Reinforced, tmp_path: Path) -> None:
    """Stated tolerance: losses within 1e-4 of each other over 12 steps in float32, weights within 1e-3."""
    asked = config(reinforced, steps=12, distill=0.5, feature_mse=0.5, accum_freq=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    subprocess.run(
        [*torchrun, *command(asked, tmp_path / "two", tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=200,
        capture_output=True,
    )
    fit(asked.but(accum_freq=1), tmp_path / "one")
    for (step, two), (_, one) in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-4), step
    a, b = load_file(tmp_path / "two" / WEIGHTS), load_file(tmp_path / "one" / WEIGHTS)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3)


def test_one_store_serves_many_students_untouched(reinforced: Reinforced, tmp_path: Path) -> None:
    before = tiny.tree(reinforced.store)
    for student in ("mamba_tiny", "mobileclip_s0_tiny", reinforced.student):
        report = fit(config(reinforced, student=student, steps=2), tmp_path / Path(student).name)
        assert report["metrics"]["loss"] > 0
    assert tiny.tree(reinforced.store) == before


def test_a_loss_that_is_nan_stops_with_its_samples(reinforced: Reinforced, tmp_path: Path) -> None:
    told = r"step \d+: .*nan.*; its 8 samples, from 0000.* are listed in .*Lower lr or lengthen warmup"
    with pytest.raises(Diverged, match=f"{told}$"):
        fit(config(reinforced, lr=1e30, warmup=0, grad_clip_norm=None), tmp_path)
    (path,) = tmp_path.glob("diverged_step_*")
    assert len(json.loads(path.read_text())["keys"]) == 8
    assert not list((tmp_path / "checkpoints").glob("*"))
    with pytest.raises(Diverged, match=f"{told}; the newest checkpoint is from before$"):
        fit(config(reinforced, lr=1e30, warmup=0, grad_clip_norm=None, save_every_n_steps=1), tmp_path)


def test_a_weight_that_is_infinite_is_not_saved(
    reinforced: Reinforced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the last step, after which no loss would tell; nor is it kept where a checkpoint has it already."""
    asked = config(reinforced, steps=1)
    with monkeypatch.context() as broken:
        broken.setattr(_Fit, "after_step", lambda self: self.model.lasting.logit_scale.data.fill_(torch.inf))
        told = "^step 0: it made model.logit_scale NaN or infinite; nothing of it was saved. Lower lr or lengthen"
        with pytest.raises(Diverged, match=told):
            fit(asked, tmp_path / "run")
        assert not (tmp_path / "run/student").exists() and not (tmp_path / "run/checkpoints").exists()
        broken.setattr(checkpoint, "not_finite", lambda *_: None)
        fit(asked, tmp_path / "run")
    (tmp_path / "run/report.json").unlink()
    with pytest.raises(Corrupt, match="logit_scale is NaN or infinite; remove it to go on from the one before"):
        fit(asked, tmp_path / "run")


@pytest.mark.parametrize("fault", ["of a step", "of an image", "of a shard"])
def test_an_error_leaves_no_worker_behind(reinforced: Reinforced, tmp_path: Path, fault: str) -> None:
    """Not even while somebody holds it: Python waits at its exit for those that are left, and they ignore signals."""
    asked = config(reinforced, workers=1)
    if fault == "of a step":
        asked = asked.but(lr=1e30, warmup=0, grad_clip_norm=None)
    elif fault == "of a shard":
        shutil.copytree(reinforced.store, tmp_path / "s")
        for metadata in (tmp_path / "s").glob("0*/size/zarr.json"):
            metadata.unlink()
        asked = asked.but(store=str(tmp_path / "s"))
    else:
        tars = [shutil.copy(tar, tmp_path) for tar in reinforced.shards.split("::")]
        for tar in tars:
            damaged = bytearray(Path(tar).read_bytes())
            damaged[1000:1200] = bytes(200)
            Path(tar).write_bytes(damaged)
        asked = asked.but(shards="::".join(tars))
    expected = {"of a step": Diverged, "of an image": ReplayError, "of a shard": NotCommitted}[fault]
    with pytest.raises(expected) as held:
        fit(asked, tmp_path / "run")
    assert held.value.__traceback__ and not multiprocessing.active_children()


def test_the_average_is_what_is_evaluated_and_kept(reinforced: Reinforced, tmp_path: Path) -> None:
    fit(config(reinforced, ema_decay=0.5, steps=1, lr=0.1, warmup=0), tmp_path / "average")
    fit(config(reinforced, steps=1, lr=0.1, warmup=0), tmp_path / "last")
    start = students.create(reinforced.student, 0).model.state_dict()
    average, last = (load_file(tmp_path / name / WEIGHTS) for name in ("average", "last"))
    for name in ("visual.conv1.weight", "logit_scale"):
        torch.testing.assert_close(average[name], (start[name] + last[name]) / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_checkpointing": True},
        {"accum_freq": 4},
        {"precision": "amp_bf16"},
        pytest.param({"torchcompile": True}, marks=pytest.mark.slow),
    ],
)
def test_how_it_is_computed_changes_rounding_only(
    reinforced: Reinforced, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tolerance = 0.05 if "precision" in changes else 1e-4
    fit(config(reinforced), tmp_path / "plain")
    fit(config(reinforced, **changes), tmp_path / "other")
    for (_, plain), (_, other) in zip(curve(tmp_path / "plain"), curve(tmp_path / "other"), strict=True):
        assert other == pytest.approx(plain, abs=tolerance)


def test_a_warm_up_that_is_too_long_is_told(
    reinforced: Reinforced, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for warmup, told in ((1, False), (2, True)):
        report = fit(config(reinforced, steps=1, warmup=warmup), tmp_path / str(warmup))
        assert ("the learning rate never reaches lr" in caplog.text) == (report["metrics"]["lr"] < 1e-3) == told


def test_a_student_that_is_gone_is_written_again(
    reinforced: Reinforced, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(reinforced, ema_decay=0.5, steps=1, warmup=0)
    report = fit(asked, tmp_path / "run")
    shutil.move(tmp_path / "run/student", tmp_path / "before/student")
    assert fit(asked, tmp_path / "run") == report
    assert tiny.tree(tmp_path / "run/student") == tiny.tree(tmp_path / "before/student")
    assert "run/student was gone, and is written again from the last checkpoint" in capsys.readouterr().err


def test_the_schedule() -> None:
    asked = TrainConfig(lr=1.0, min_lr=0.1, warmup=10)
    assert [lr_at(step, 110, asked) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert lr_at(60, 110, asked) == pytest.approx(0.55)
    assert lr_at(10, 110, asked) == 1.0 and lr_at(109, 110, asked) == pytest.approx(0.1, abs=1e-3)


def test_a_checkpoint_of_another_training(reinforced: Reinforced, tmp_path: Path) -> None:
    fit(config(reinforced, steps=2), tmp_path)
    with pytest.raises(ConfigError, match=r"lr: it was 0.001, this run asks for 0.1"):
        fit(config(reinforced, steps=2, lr=0.1), tmp_path)
    fewer = config(reinforced, steps=2, shards=reinforced.shards.rpartition("::")[0])
    with pytest.raises(ConfigError, match=r"the data: other samples, other content"):
        fit(fewer, tmp_path)
    (path,) = (tmp_path / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Corrupt, match="^checkpoint .*cannot be read.*; remove it to go on from the one before"):
        fit(config(reinforced, steps=2), tmp_path)


def test_a_flipped_bit_of_a_checkpoint_or_a_cut_report_is_no_traceback(reinforced: Reinforced, tmp_path: Path) -> None:
    whole = fit(config(reinforced, steps=2), tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(whole)[:200])
    again = fit(config(reinforced, steps=2), tmp_path)  # the training has ended: only its report is made again
    assert again["metrics"] == whole["metrics"] and again["steps"] == 2
    (path,) = (tmp_path / "checkpoints").iterdir()
    written, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(written)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(Corrupt, match="^checkpoint .*; remove it to go on from the one before"):
            fit(config(reinforced, steps=2), tmp_path)


def test_a_checkpoint_from_before_there_was_a_setting(reinforced: Reinforced, tmp_path: Path) -> None:
    """It counts as trained with that setting's default."""
    whole = fit(config(reinforced, save_every_n_steps=5), tmp_path)
    (tmp_path / "report.json").unlink()
    half, last = sorted((tmp_path / "checkpoints").iterdir())
    last.unlink()
    tensors, metadata = tensorfile.load(half)
    assert {name.partition("/")[0] for name in tensors} == {"model", "exp_avg", "exp_avg_sq", "step"}
    saved = json.loads(metadata["config"])
    del saved["captions"], saved["report_to"]
    tensorfile.save(tensors, half, metadata | {"config": json.dumps(saved)})
    with pytest.raises(ConfigError, match="captions: it was each, this run asks for mix"):
        fit(config(reinforced, captions="mix"), tmp_path)
    assert fit(config(reinforced), tmp_path)["metrics"] == whole["metrics"]


def test_the_largest_seed_is_taken(reinforced: Reinforced, tmp_path: Path) -> None:
    assert fit(config(reinforced, steps=1, warmup=0, accum_freq=2, seed=2**63 - 1), tmp_path)["steps"] == 1


def test_only_the_newest_checkpoints_are_kept(reinforced: Reinforced, tmp_path: Path) -> None:
    fit(config(reinforced, save_every_n_steps=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000008.safetensors",
        "step_00000010.safetensors",
    ]


def test_ranks_and_pieces_that_do_not_divide(reinforced: Reinforced, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot share the work evenly"):
        fit(config(reinforced, accum_freq=3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_trainings_do_not_share_a_folder(reinforced: Reinforced, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from train.folder import alone\n"
        "with alone(Path(sys.argv[1])):\n"
        "    print('there', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout and other.stdout.readline() == b"there\n"
        with pytest.raises(ConfigError, match=f"another process trains into {tmp_path}"):
            fit(config(reinforced, steps=1), tmp_path)
        other.kill()
    assert fit(config(reinforced, steps=1), tmp_path)["steps"] == 1
