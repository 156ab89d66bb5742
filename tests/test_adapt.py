"""Stage 1 of ComKD-CLIP: prompts learn labelled images; and both stages once at full size."""

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from reinforce.config import ClassSet, Recipe, RunOptions, Teacher, ViewSet
from reinforce.errors import ConfigError, Diverged
from reinforce.models import tensorfile
from reinforce.models.teacher import load_teacher
from reinforce.models.tokenizer import get_tokenizer
from reinforce.run import driver
from reinforce.store.columns import CLASSES
from reinforce.store.store import Store
from tests import tiny
from tests.processes import ROOT
from train import checkpoint
from train.__main__ import app
from train.comkd import classifier
from train.comkd.adapt import AdaptConfig, adapt, epoch_weights, regularised_loss
from train.comkd.base_to_novel import base_to_novel, check_classes, num_base
from train.config import ComkdConfig, TrainConfig
from train.evaluation.sets import EvalSet, write_classification_set

NAMES = ["hat", "shoe", "coat"]


def labelled(folder: Path, labels: list[int], names: list[str] = NAMES) -> str:
    """Pictures of one flat colour a class."""

    def jpg(label: int, n: int) -> bytes:
        file = io.BytesIO()
        colour = [(200, 20 + n, 20), (20, 200, 20 + n), (20 + n, 20, 200)][label]
        Image.new("RGB", (40 + n, 40), colour).save(file, "JPEG")
        return file.getvalue()

    for split in ("train", "test"):
        samples = ((f"{split}-{n:02d}", {"jpg": jpg(label, n)}, label) for n, label in enumerate(labels))
        write_classification_set(str(folder), names, ["a photo of a {}."], samples, split=split)
    return str(folder)


@pytest.fixture
def asked(recipe: Recipe, tmp_path: Path) -> AdaptConfig:
    data = labelled(tmp_path / "data", [0, 1, 2, 0, 1, 2, 0, 1])
    return AdaptConfig(
        teacher=recipe.teachers["vit"],
        data=data,
        shots=2,
        num_tokens=2,
        epochs=8,
        batch_size=4,
        lr=0.1,
        text_l1=0,
        image_l1=0,
        logits_kl=0,
        device="cpu",
        eval_sets={"test": data},
    )


def test_prompts_learn_and_are_found_again(
    asked: AdaptConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.safetensors"
    report = adapt(asked, out)
    assert (report["classes"], report["images"], report["skipped"]) == (3, 6, 0)
    first = adapt(asked.but(epochs=1), tmp_path / "one.safetensors")
    assert report["metrics"]["cross_entropy"] < first["metrics"]["cross_entropy"]
    scores = report["evaluated"]["test"]
    assert scores["frozen"]["num"] == scores["adapted"]["num"] == 8
    written = out.read_bytes()
    assert "came to its end before" not in capsys.readouterr().err
    assert adapt(asked, out) == report and out.read_bytes() == written
    assert "p.safetensors: this training came to its end before; for a new one give" in capsys.readouterr().err
    assert adapt(asked.but(log_every_n_steps=1), out) == report
    with pytest.raises(ConfigError, match=r"made with other settings:\n  seed: it was 0, this run asks for 1"):
        adapt(asked.but(seed=1), out)
    again = tmp_path / "again.safetensors"
    adapt(asked, again)
    assert all(torch.equal(tensor, load_file(again)[name]) for name, tensor in load_file(out).items())


def curve(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "data_wait_share")} for line in lines]


def begun(asked: AdaptConfig, out: Path, folder: Path) -> subprocess.Popen[str]:
    """The command, once it has logged five steps."""
    (folder / "a.json").write_text(asked.model_dump_json())
    command = ["train", "adapt", asked.data, "--recipe", str(folder / "a.json"), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = out.with_suffix("") / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        time.sleep(0.01)
        assert process.poll() is None
    return process


def test_what_a_run_leaves_beside_the_prompts(asked: AdaptConfig, tmp_path: Path) -> None:
    report = adapt(asked.but(log_every_n_steps=1), tmp_path / "p.safetensors")
    run = tmp_path / "p"
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
    }
    *steps, scores = curve(run)
    assert [line["step"] for line in steps] == list(range(1, 17))  # 8 epochs of a batch of 4 and one of 2
    assert steps[-1] == {"step": 16} | report["metrics"]
    assert report["metrics"].keys() == {
        "cross_entropy", "text_l1", "image_l1", "logits_kl", "loss", "grad_norm", "lr"
    }  # fmt: skip
    adapted = report["evaluated"]["test"]["adapted"]  # counts are no curves
    assert scores == {"step": 16} | {f"test/{k}": v for k, v in adapted.items() if not k.startswith("num")}
    assert steps[1]["lr"] == 1e-5 and steps[2]["lr"] > steps[4]["lr"]
    assert json.loads((run / "config.json").read_text())["config"]["epochs"] == 8


def test_killed_and_resumed_it_gives_the_same_prompts(asked: AdaptConfig, tmp_path: Path) -> None:
    asked = asked.but(epochs=100, log_every_n_steps=1, save_every_n_steps=3)
    adapt(asked.but(save_every_n_steps=1000), tmp_path / "whole.safetensors")
    out = tmp_path / "killed.safetensors"
    process = begun(asked, out, tmp_path)
    process.kill()
    process.communicate()
    assert not out.exists() and list((tmp_path / "killed/checkpoints").iterdir())
    with pytest.raises(ConfigError, match=r"belongs to a training with other settings:\n  shots: it was 2"):
        adapt(asked.but(shots=1), out)
    adapt(asked, out)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    whole, again = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_asked_to_stop_it_says_how_to_go_on(asked: AdaptConfig, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    process = begun(asked.but(epochs=2000, log_every_n_steps=1), out, tmp_path)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143 and "run the same command again to go on" in told
    (saved,) = (tmp_path / "p/checkpoints").iterdir()
    assert int(saved.stem.removeprefix("step_")) == len(curve(tmp_path / "p")) and not out.exists()


def test_the_result_is_the_weighted_mean_of_epochs(
    asked: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a slow definition, from the checkpoints at the ends of epochs."""
    monkeypatch.setattr(checkpoint, "KEPT", 100)
    adapt(asked.but(save_every_n_steps=2), tmp_path / "p.safetensors")
    ends = [load_file(path) for path in sorted((tmp_path / "p/checkpoints").iterdir())]
    assert len(ends) == 8
    assert {name.partition("/")[0] for name in ends[0]} == {"model", "average", "momentum_buffer"}
    for name, tensor in load_file(tmp_path / "p.safetensors").items():
        weighted = [w * end[f"model/tokens.{name}"].double() for w, end in zip(epoch_weights(8), ends, strict=True)]
        torch.testing.assert_close(tensor.double(), torch.stack(weighted).sum(0), rtol=1e-6, atol=1e-6)
        assert not torch.equal(tensor, ends[-1][f"model/tokens.{name}"])
    last = tmp_path / "last.safetensors"
    adapt(asked.but(average=False), last)
    assert all(torch.equal(tensor, ends[-1][f"model/tokens.{n}"]) for n, tensor in load_file(last).items())


def test_a_loss_that_is_nan_stops_with_its_samples(asked: AdaptConfig, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step \d+: .*nan.* its [24] samples, .* are listed in .*Lower lr$"):
        adapt(asked.but(lr=1e30), tmp_path / "p.safetensors")
    (path,) = (tmp_path / "p").glob("diverged_step_*")
    assert all(key.startswith("train-") for key in json.loads(path.read_text())["keys"])
    assert not (tmp_path / "p.safetensors").exists()


def test_prompts_made_before_there_was_a_setting_are_found(asked: AdaptConfig, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    report = adapt(asked, out)
    tensors, metadata = tensorfile.load(out)
    about = json.loads(metadata["about"])
    for newer in ("log_every_n_steps", "save_every_n_steps", "eval_every_n_steps", "report_to", "average"):
        del about["config"][newer]
    tensorfile.save(tensors, out, metadata | {"about": json.dumps(about)})
    assert adapt(asked, out) == report
    with pytest.raises(ConfigError, match="average: it was True, this run asks for False"):
        adapt(asked.but(average=False), out)


def test_prompts_that_have_not_moved_say_the_template(asked: AdaptConfig, tmp_path: Path) -> None:
    """In the first layer they begin as the words "a photo of a", so that the class's name has to follow them whole."""
    num = int(get_tokenizer(asked.teacher.model)(["a photo of a"])[0].argmax()) - 1
    changes = {"num_tokens": num, "depth": 1, "epochs": 1, "lr": 1e-9}
    report = adapt(asked.but(**changes), tmp_path / "p.safetensors")
    assert report["metrics"]["text_l1"] < 1e-6


def test_base_classes_only(asked: AdaptConfig, tmp_path: Path) -> None:
    """The first half, rounded up; of the other classes no image is needed."""
    data = labelled(tmp_path / "base", [0, 1, 0])
    report = adapt(asked.but(classes="base", data=data), tmp_path / "p.safetensors")
    assert (report["classes"], report["images"]) == (2, 3)  # a class with one sample gives one


def test_regularisers_hold_the_prompts_near_the_frozen_model(asked: AdaptConfig, tmp_path: Path) -> None:
    free = adapt(asked, tmp_path / "free.safetensors")["metrics"]
    held = adapt(asked.but(text_l1=25.0, image_l1=10.0), tmp_path / "held.safetensors")["metrics"]
    assert held["text_l1"] < free["text_l1"]


def test_the_loss_is_the_slow_definition() -> None:
    def units(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

    torch.manual_seed(0)
    u, w, u0, w0, labels = units(4, 6), units(3, 6), units(4, 6), units(3, 6), torch.tensor([0, 2, 1, 1])
    config = AdaptConfig(teacher=Teacher(model="x"), text_l1=3, image_l1=5, logits_kl=7)
    loss, parts = regularised_loss(u, w, u0, w0, labels, 10.0, config)
    p, p0 = ((10 * a @ b.T).softmax(-1).numpy() for a, b in ((u, w), (u0, w0)))
    slow = {
        "cross_entropy": -np.mean([math.log(row[label]) for row, label in zip(p, labels, strict=True)]),
        "text_l1": np.abs((w - w0).numpy()).mean(),
        "image_l1": np.abs((u - u0).numpy()).mean(),
        "logits_kl": (p0 * np.log(p0 / p)).sum() / 12,
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(slow)
    assert loss.item() == pytest.approx(sum(v * c for v, c in zip(slow.values(), (1, 3, 5, 7), strict=True)))


def test_epochs_weigh_as_a_gaussian() -> None:
    weights = epoch_weights(20)
    assert sum(weights) == pytest.approx(1) and weights.index(max(weights)) == 14
    assert weights[15] / weights[14] == pytest.approx(math.exp(-0.5))
    assert epoch_weights(1) == [1.0] and max(epoch_weights(4)) == epoch_weights(4)[2]


def test_a_folder_of_other_things_beside_the_prompts_stays_as_it_is(asked: AdaptConfig, tmp_path: Path) -> None:
    before = tiny.tree(asked.data)
    with pytest.raises(ConfigError, match="data holds other things, such as test, and no training"):
        adapt(asked, tmp_path / "data.safetensors")
    assert tiny.tree(asked.data) == before


def test_wrong_requests_get_a_sentence(asked: AdaptConfig, tmp_path: Path) -> None:
    def told(message: str, **changes) -> None:
        with pytest.raises(ConfigError, match=message):
            adapt(asked.but(**changes), tmp_path / "never.safetensors")
        assert not (tmp_path / "never.safetensors").exists()

    told("no good image of class 2, 'coat'", data=labelled(tmp_path / "two", [0, 1]))
    told(r"train/nshards.txt: not found; labelled images to adapt with are a folder", data=str(tmp_path))
    told(r"tar/train/nshards.txt: not found; labelled images to adapt with", data=f"{asked.data}/train/0.tar")
    told("names 2 classes", eval_sets={"x": labelled(tmp_path / "few", [0, 1], NAMES[:2])})
    with pytest.raises(ConfigError, match=r"end it in \.safetensors"):
        adapt(asked, tmp_path / "never")
    told("has prompts already", teacher=asked.teacher.but(prompts="p.safetensors"))
    told("open_clip's ViT", teacher=Teacher(model=asked.teacher.model.replace("vit", "conv")))


def test_from_the_command_line_to_a_store(asked: AdaptConfig, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(asked.but(epochs=1).model_dump_json())
    out = tmp_path / "p.safetensors"
    ran = CliRunner().invoke(app, ["adapt", asked.data, "--recipe", f"{tmp_path}/a.json", "--out", str(out), "--json"])
    assert ran.exit_code == 0 and json.loads(ran.stdout)["prompts"] == str(out)
    recipe = Recipe(
        name="adapted",
        teachers={"vit": asked.teacher.but(prompts=str(out)), "plain": asked.teacher},
        view_sets={"base": ViewSet(num_views=1, view_px=32)},
        captioners={},
        num_original_captions=0,
        class_sets={"kinds": ClassSet(classnames=f"{asked.data}/classnames.txt", templates=("{}.",))},
    )
    driver.run(f"{asked.data}/train/*.tar", str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    store = Store(str(tmp_path / "s"))
    for group, column in ((CLASSES, "kinds"), ("0", "view/base")):
        adapted, plain = (store.read(group, f"{column}/{name}").astype(np.float32) for name in ("vit", "plain"))
        assert adapted.shape == plain.shape and np.abs(adapted - plain).max() > 0.01


def test_what_is_said_of_a_teacher_holds_for_the_one_that_reinforces(asked: AdaptConfig, tmp_path: Path) -> None:
    """Its class texts from a store, its images by the model that the store was made with."""
    out = tmp_path / "p.safetensors"
    said = adapt(asked, out)["evaluated"]["test"]["adapted"]
    adapted = asked.teacher.but(prompts=str(out))
    recipe = Recipe(
        name="adapted",
        teachers={"vit": adapted},
        view_sets={"base": ViewSet(num_views=1, view_px=32)},
        captioners={},
        num_original_captions=0,
        class_sets={"kinds": ClassSet(classnames=tuple(NAMES), templates=("{}.",))},
    )
    driver.run(f"{asked.data}/train/*.tar", str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    model = load_teacher(adapted, torch.device("cpu"))
    seen = EvalSet(asked.data).load(model.preprocess_cfg)
    pixels = model.normalise(torch.stack(list(seen.images)).permute(0, 2, 3, 1))
    with torch.no_grad():
        features = F.normalize(model.model.encode_image(pixels), dim=-1)
    texts = classifier.class_texts(str(tmp_path / "s"), "kinds", "vit").features
    assert base_to_novel(features, torch.tensor(seen.truth), texts) == pytest.approx(said)


def test_base_to_novel_by_hand() -> None:
    """Five classes: three are base. One base image is wrong among base; among all, a novel one too."""
    assert [num_base(n) for n in (2, 5, 10)] == [1, 3, 5]
    classes = torch.eye(5)
    features = torch.eye(5)[[0, 1, 1, 3, 4]] + 2 * torch.eye(5)[[0, 1, 1, 0, 4]]
    scores = base_to_novel(F.normalize(features, dim=-1), torch.tensor([0, 1, 2, 3, 4]), classes)
    assert scores == pytest.approx({"acc1": 0.6, "base": 2 / 3, "novel": 1.0, "hm": 0.8, "num": 5})
    only = base_to_novel(torch.eye(5)[:1], torch.tensor([0]), classes)
    assert only == {"acc1": 1.0, "base": 1.0, "num": 1}


def test_class_files_are_compared(tmp_path: Path) -> None:
    opened = EvalSet(labelled(tmp_path / "d", [0, 1, 2]))
    check_classes(opened, NAMES, "the store")
    with pytest.raises(ConfigError, match="names 3 classes, and the store 2"):
        check_classes(opened, NAMES[:2], "the store")
    with pytest.raises(ConfigError, match="class 1 is 'shoe' there and 'coat' in the store"):
        check_classes(opened, ["hat", "coat", "shoe"], "the store")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size_takes_a_step_in_both_stages(tmp_path: Path) -> None:
    """ViT-L/14 with 4 + 4 prompts nine layers deep, ViT-B/16 with 4 visual ones, 224 px, random weights.

    The second, a process of its own, never holds as much memory as the teacher's 428 M weights alone would take.
    """
    data = labelled(tmp_path / "data", [0, 1, 2])
    out = tmp_path / "p.safetensors"
    teacher = Teacher(model="ViT-L-14")
    report = adapt(AdaptConfig(teacher=teacher, data=data, epochs=1, weights="random", device="cpu"), out)
    assert all(map(math.isfinite, report["metrics"].values()))
    assert {n: tuple(t.shape) for n, t in load_file(out).items()} == {"image": (9, 4, 1024), "text": (9, 4, 768)}
    recipe = Recipe(
        name="full",
        teachers={"clip": teacher.but(prompts=str(out))},
        view_sets={"base": ViewSet(num_views=1)},
        captioners={},
        num_original_captions=0,
        class_sets={"kinds": ClassSet(classnames=tuple(NAMES), templates=("{}.",))},
        batch_size=3,
        weights="random",
    )
    tars = f"{data}/train/*.tar"
    driver.run(tars, str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    config = TrainConfig(
        student="vit_b_16",
        shards=tars,
        store=str(tmp_path / "s"),
        comkd=ComkdConfig(class_set="kinds", num_prompts=4),
        global_batch_size=2,
        streams=1,
        steps=1,
        precision="fp32",
        workers=0,
        device="cpu",
        report_to=[],
    )
    (tmp_path / "c.json").write_text(config.model_dump_json())
    code = (
        "import json; from pathlib import Path; from train.config import load_training; from train.trainer import fit;"
        f"report = fit(load_training({str(tmp_path / 'c.json')!r}), Path({str(tmp_path / 'run')!r}));"
        "peak = Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0];"
        "print(json.dumps([report['metrics'], int(peak) * 1024]))"
    )
    metrics, peak_bytes = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert peak_bytes < 428e6 * 4
    assert all(map(math.isfinite, metrics.values())) and metrics["grad_norm"] > 0
    loaded = classifier.load(tmp_path / "run/student")
    assert loaded.head.classes.shape == (3, 768) and loaded.prompts is not None
    assert loaded.prompts.tokens["image"].shape == (9, 4, 768)
