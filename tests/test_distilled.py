"""Stage 2 of ComKD-CLIP: a student learns a teacher's classes from a store, alone."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reinforce.config import ClassSet, Recipe, RunOptions
from reinforce.data import shards
from reinforce.data.images import decode
from reinforce.errors import ConfigError, StoreError
from reinforce.models import tensorfile
from reinforce.run import driver
from reinforce.store.columns import CLASSES
from reinforce.store.store import Store
from tests import tiny
from train import students
from train.__main__ import app
from train.comkd import classifier
from train.comkd.trainee import ComkdTrainee
from train.config import ComkdConfig, TrainConfig
from train.data.loader import Batch, Loader
from train.data.mixture import source_of
from train.evaluation.sets import EvalSet, write_classification_set
from train.objective import backward
from train.trained import load
from train.trainer import fit

NAMES = ["hat", "shoe", "skirt"]


@dataclass(frozen=True)
class Made:
    shards: str
    store: str
    student: str
    test: str


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Twelve uncaptioned pictures in two tars, a store with class texts, a tiny ViT, a test set with one sample of the
    last class."""
    folder = tmp_path_factory.mktemp("comkd")
    for i in range(2):
        samples = [(f"{i}-{n}", {"jpg": tiny.picture(10 * i + n)}) for n in range(6)]
        shards.write(str(folder / f"{i:05d}.tar"), samples)
    asked = Recipe.model_validate(
        recipe.model_dump()
        | {"num_original_captions": 0, "captioners": {}, "class_sets": {"kinds": ClassSet(classnames=tuple(NAMES))}}
    )
    tars = str(folder / "*.tar")
    driver.run(tars, str(folder / "store"), asked, RunOptions(workers="0", device="cpu"))
    labels = [0, 1, 0, 1, 2]
    test = ((f"t-{n}", {"jpg": tiny.picture(50 + n)}, label) for n, label in enumerate(labels))
    write_classification_set(str(folder / "test"), NAMES, ["a photo of a {}."], test)
    return Made(tars, str(folder / "store"), tiny.student(folder / "student"), str(folder / "test"))


def config(made: Made, **changes) -> TrainConfig:
    comkd = ComkdConfig.model_validate({"class_set": "kinds"} | changes.pop("comkd", {}))
    asked = {
        "student": made.student, "shards": made.shards, "store": made.store, "teachers": ["vit"], "comkd": comkd,
        "global_batch_size": 4, "streams": 2, "steps": 4, "warmup": 0, "lr": 1e-2, "precision": "fp32", "workers": 0,
        "device": "cpu", "report_to": [],
    }  # fmt: skip
    return TrainConfig.model_validate(asked | changes)


def trainee(asked: TrainConfig) -> ComkdTrainee:
    made = ComkdTrainee(students.create(asked.student), source_of(asked).teachers, asked, {})
    made.train()
    return made


def batches(asked: TrainConfig, accum_freq: int = 1) -> list[Batch]:
    student = students.create(asked.student)
    loader = Loader(
        source_of(asked), student.image_px, student.tokenizer, asked.global_batch_size, asked.streams, 0, accum_freq
    )
    return list(islice(loader.batches(0, 1), accum_freq))


def tree_hash(folder: str) -> str:
    return hashlib.sha256(b"".join(k.encode() + v for k, v in tiny.tree(folder).items())).hexdigest()


def test_a_student_learns_is_kept_and_says_the_same_when_loaded(made: Made, tmp_path: Path) -> None:
    asked = config(made, eval_sets={"test": made.test}, steps=30)
    report = fit(asked, tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    scores = report["evaluated"]["test"]
    assert set(scores) == {"acc1", "base", "novel", "hm", "num", "num_skipped"}
    assert scores["novel"] == 1.0  # one class of the second half: told apart from nothing
    loaded = classifier.load(tmp_path / "a/student")
    assert loaded.names == NAMES and loaded.head.attention is not None and loaded.head.attention.alpha != 0
    assert loaded.evaluate({"test": EvalSet(made.test)}) == report["evaluated"]
    again = tmp_path / "again"
    loaded.save(again)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(classifier.load(again).logits(pixels), loaded.logits(pixels))
    assert students.create(str(tmp_path / "a/student")).model is not None  # open_clip's folder is whole too


def test_an_export_gives_the_same_logits(made: Made, tmp_path: Path) -> None:
    """With prompts, with attention that counts, alone and in a batch."""
    fit(config(made, steps=2, lr=0.1, comkd={"num_prompts": 2}), tmp_path / "a")
    assert classifier.load(tmp_path / "a/student").head.attention.alpha.abs() > 0.01
    ran = CliRunner().invoke(app, ["export", str(tmp_path / "a/student"), str(tmp_path / "x"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert set(json.loads(ran.stdout)["agreement"]) == {"folder/logits", "onnx/logits"}
    assert json.loads((tmp_path / "x/export.json").read_text())["classes"] == NAMES
    assert (tmp_path / "x/classifier.onnx").is_file() and (tmp_path / "x" / classifier.FILE).is_file()


def test_classify_and_eval_from_the_command_line(made: Made, tmp_path: Path) -> None:
    fit(config(made, steps=2, comkd={"num_prompts": 2}), tmp_path / "a")
    (tmp_path / "x.jpg").write_bytes(tiny.picture(3))
    student = str(tmp_path / "a/student")
    ran = CliRunner().invoke(app, ["classify", student, str(tmp_path / "x.jpg"), "--json"])
    found = json.loads(ran.stdout)
    shares = found["classified"][str(tmp_path / "x.jpg")]
    assert set(shares) == set(NAMES) and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert found["failed"] == {} and ran.exit_code == 0
    scores = json.loads(CliRunner().invoke(app, ["eval", student, f"test={made.test}", "--json"]).stdout)
    assert "hm" in scores["test"]
    wrong = CliRunner().invoke(app, ["classify", made.student, str(tmp_path / "x.jpg")])
    assert wrong.exit_code == 2 and "student trained with comkd" in wrong.stderr


def test_an_image_that_cannot_be_read_costs_no_other(made: Made, tmp_path: Path) -> None:
    trainee(config(made)).save(tmp_path / "a")
    names = ["cut.jpg", "a.jpg", "none.jpg", "text.jpg", "b.jpg"]
    cut, first, _, text, last = paths = [tmp_path / name for name in names]
    cut.write_bytes(tiny.picture(1)[:300])
    text.write_text("<html>")
    first.write_bytes(tiny.picture(2))
    last.write_bytes(tiny.picture(3))
    ran = CliRunner().invoke(app, ["classify", str(tmp_path / "a"), *map(str, paths), "--device", "cpu", "--json"])
    found = json.loads(ran.stdout)
    assert ran.exit_code == 1
    assert list(found["classified"]) == [str(first), str(last)]
    assert list(found["failed"]) == [str(tmp_path / name) for name in ("cut.jpg", "none.jpg", "text.jpg")]
    assert f"error: {tmp_path}/none.jpg: No such file or directory; give image files" in ran.stderr
    loaded = classifier.load(tmp_path / "a")
    expected = loaded.classify([decode(last.read_bytes())])[0]
    shares = found["classified"][str(last)]
    assert shares == {NAMES[i]: pytest.approx(expected[i].item(), abs=1e-4) for i in range(3)}
    plain = CliRunner().invoke(app, ["classify", str(tmp_path / "a"), *map(str, paths), "--device", "cpu"])
    assert plain.exit_code == 1 and plain.stdout.startswith(f"{first}:") and "none.jpg" not in plain.stdout


def test_nobody_asks_which_kind_of_student_it_is(made: Made, tmp_path: Path) -> None:
    trainee(config(made)).save(tmp_path / "a")
    loaded = load(str(tmp_path / "a"))
    assert isinstance(loaded, classifier.Classifier) and not any(module.training for module in loaded.modules())
    scores = [loaded.evaluate({"test": EvalSet(made.test)}, batch_size)["test"] for batch_size in (1, 256)]
    assert scores[0] == scores[1]
    loaded.save(tmp_path / "b")
    (ours, said), (again, said_again) = (tensorfile.load(tmp_path / name / classifier.FILE) for name in "ab")
    assert said == said_again and ours.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())
    plain = load(made.student)
    assert isinstance(plain, students.Student) and not plain.module.training


def test_a_damaged_classifier_gets_a_sentence(made: Made, tmp_path: Path) -> None:
    trainee(config(made)).save(tmp_path / "a")
    path = tmp_path / "a" / classifier.FILE
    tensors, metadata = tensorfile.load(path)
    for content in ({}, metadata | {"classnames": "hat, shoe"}):
        tensorfile.save(tensors, path, content)
        with pytest.raises(ConfigError, match=r"comkd.safetensors cannot be used: .*student trained with comkd"):
            load(str(tmp_path / "a"))
    path.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"comkd.safetensors cannot be used: .*student trained with comkd"):
        load(str(tmp_path / "a"))


def test_a_student_begun_from_a_classifier_is_none_itself(made: Made, tmp_path: Path) -> None:
    trainee(config(made)).save(tmp_path / "a")
    students.create(str(tmp_path / "a")).save(tmp_path / "b")
    of_a, of_b = ({path.name for path in (tmp_path / name).iterdir()} for name in "ab")
    assert of_a - of_b == {classifier.FILE} and of_b <= of_a


def test_stage_2_holds_no_teacher(made: Made, tmp_path: Path) -> None:
    """Neither its code nor its weights: what the trainee holds is the student, the parts on it and the class texts."""
    (tmp_path / "c.json").write_text(config(made, steps=1).model_dump_json())
    code = (
        "import sys; from pathlib import Path; from train.config import load_training; from train.trainer import fit;"
        f"fit(load_training({str(tmp_path / 'c.json')!r}), Path({str(tmp_path / 'a')!r}));"
        "held = {'reinforce.models.teacher', 'reinforce.models.frozen', 'reinforce.run', 'ray'} & set(sys.modules);"
        "assert not held, held"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = trainee(config(made))
    of_student = {f"classifier.model.{name}" for name in students.create(made.student).model.state_dict()}
    held = set(whole.state_dict())
    assert of_student < held and all(name.startswith("classifier.head.") for name in held - of_student)


def test_two_students_from_one_store_that_stays_as_it_is(made: Made, tmp_path: Path) -> None:
    before = tree_hash(made.store)
    fit(config(made, steps=2), tmp_path / "a")
    fit(config(made, steps=2, student="mamba_tiny", comkd={"attention": False}), tmp_path / "b")
    assert tree_hash(made.store) == before
    assert classifier.load(tmp_path / "b/student").head.attention is None
    with pytest.raises(ConfigError, match="did you mean .*/b/student?"):
        classifier.load(tmp_path / "b")


def test_an_interrupted_training_with_an_average_ends_as_the_whole_one(made: Made, tmp_path: Path) -> None:
    asked = config(made, steps=6, save_every_n_steps=3, ema_decay=0.5)
    fit(asked, tmp_path / "a")
    fit(asked, tmp_path / "b")
    newest = max((tmp_path / "b/checkpoints").iterdir())
    newest.unlink()
    (tmp_path / "b/report.json").unlink()
    fit(asked, tmp_path / "b")
    one, two = (classifier.load(tmp_path / name / "student").state_dict() for name in "ab")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_prompts_learn_and_the_trunk_stays(made: Made, tmp_path: Path) -> None:
    asked = config(made, comkd={"num_prompts": 2, "prompt_depth": 9}, steps=3, wd=0.1)
    fit(asked, tmp_path / "a")
    fresh = students.create(made.student).model.state_dict()
    loaded = classifier.load(tmp_path / "a/student")
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in loaded.model.state_dict().items())
    begun = trainee(asked)
    assert begun.classifier.prompts is not None and loaded.prompts is not None
    assert not torch.equal(begun.classifier.prompts.tokens["image"], loaded.prompts.tokens["image"])
    learns = {name for name, p in begun.named_parameters() if p.requires_grad}
    assert not [name for name in learns if name.startswith("classifier.model.")]


def test_trained_whole_the_image_tower_learns_and_the_text_tower_does_not(made: Made) -> None:
    begun = trainee(config(made))
    learns = {n for n, p in begun.named_parameters() if p.requires_grad and n.startswith("classifier.model.")}
    assert {name.split(".")[2] for name in learns} == {"visual", "logit_scale"}


def test_each_term_can_be_off(made: Made) -> None:
    asked = config(made)
    [batch] = batches(asked)
    both = trainee(asked)
    out = both(batch.images, None)
    parts = both.loss(out, batch)[1]
    assert parts["loss"] == pytest.approx((parts["kl"] + parts["align"]).item(), rel=1e-6)
    assert parts["alpha"] == 0
    for off, kept in (({"align": 0.0}, "kl"), ({"kl": 0.0, "attention": False}, "align")):
        alone = trainee(config(made, comkd=off))
        found = alone.loss(out, batch)[1]
        of_attention = {"alpha"} if alone.classifier.head.attention else set()
        assert set(found) == {kept, "agreement", "loss"} | of_attention and found["loss"] == found[kept] == parts[kept]
    assert out.text == {} and torch.equal(out.image["features"], out.image["guess/vit"])  # alpha is 0
    for wrong, told in (
        ({"kl": 0, "align": 0, "attention": False}, "nothing to learn"),
        ({"kl": 0}, "EduAttention learns through the logits"),
    ):
        with pytest.raises(ValueError, match=told):
            config(made, comkd=wrong)


def test_a_step_in_pieces_is_a_step_but_for_batch_norm(made: Made) -> None:
    """Statistics and logits are the whole batch's; the projector's BatchNorm, put in eval mode here, sees pieces."""
    grads = []
    for pieces in (1, 2):
        asked = config(made, accum_freq=pieces)
        one = trainee(asked)
        one.classifier.head.projector.norm.eval()
        parts = backward(one, batches(asked, pieces), one.loss, seed=0)
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None} | parts)
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_what_does_not_fit_gets_a_sentence(made: Made, reinforced, tmp_path: Path) -> None:
    def told(message: str, **changes) -> None:
        with pytest.raises((ConfigError, StoreError), match=message):
            fit(config(made, **changes), tmp_path / "never")
        assert not (tmp_path / "never").exists()

    told("has class sets kinds, and 'sorts' is asked for", comkd={"class_set": "sorts"})
    told("has no class texts, and 'kinds'", store=reinforced.store, shards=reinforced.shards)
    told(r"learns from one teacher, and .* has vit, conv; choose", teachers=None)
    told("no teachers to learn from: give a --store$", store=None)
    few = [("a", {"jpg": tiny.picture(1)}, 0)]
    write_classification_set(str(tmp_path / "two"), NAMES[:2], ["{}"], few)
    told("names 2 classes, and .* 3", eval_sets={"x": str(tmp_path / "two")})
    write_classification_set(str(tmp_path / "other"), ["hat", "skirt", "shoe"], ["{}"], few)
    told("class 1 is 'skirt' there and 'shoe' in", eval_sets={"x": str(tmp_path / "other")})
    told("its images have captions", eval_sets={"x": reinforced.shards.split("::")[0]})
    told("open_clip's ViT; this one is a TimmModel", student="mamba_tiny", comkd={"num_prompts": 2})
    with pytest.raises(ConfigError, match="holds no captions"):
        fit(config(made).but(comkd=None), tmp_path / "never")


def test_class_texts_that_are_not_whole_are_told(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    (store / CLASSES / "kinds/vit/zarr.json").unlink()
    with pytest.raises(ConfigError, match="run its reinforcement again"):
        classifier.class_texts(str(store), "kinds", "vit")
    texts = classifier.class_texts(made.store, "kinds", "vit")
    assert texts.names == NAMES and texts.features.shape == (3, 16)
    assert Store(made.store).read(CLASSES, "kinds/vit").shape == (3, 16)
