"""How students begin: apart, so that they learn; and what is said of one that does not."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipelines.experiments import labelled, start
from reinforce.config import Recipe, RunOptions, Teacher, ViewSet
from reinforce.data import shards
from reinforce.run import driver
from train import collapse, students
from train.config import LoopConfig, TrainConfig
from train.logs import Journal
from train.trainer import fit

# A ViT begins closer: what its class token and its positions say is common to all images.
MOST_COSINE = {"vit_tiny": 0.9, "vit_b_16": 0.9, "mobileclip_b": 0.9}
NUM_CLASSES = 10
VIEWS = ViewSet(num_views=4, view_px=64)


@cache
def emoji() -> list[tuple[str, bytes, str]]:
    """Key, picture and kind of the bundled samples of the ten kinds with most of them."""
    samples = [
        (sample["__key__"], sample["jpg"], json.loads(sample["json"])["subgroup"])
        for tar in sorted(Path("samples/train").glob("*.tar"))
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    ]
    kinds = {name for name, _ in Counter(kind for _, _, kind in samples).most_common(NUM_CLASSES)}
    return [sample for sample in samples if sample[2] in kinds]


def old_start(name: str, folder: Path, seed: int) -> str:
    """A student as the Mamba students began before: pixels as they are, random biases. Gives its folder."""
    student = students.create(name, seed)
    torch.manual_seed(seed)
    for module in student.model.visual.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.bias, -bound, bound)
    student.save(folder)
    config = json.loads((folder / students.CONFIG).read_text())
    config["preprocess_cfg"] |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    (folder / students.CONFIG).write_text(json.dumps(config))
    return str(folder)


@cache
def views(num: int, size: int) -> list[Tensor]:
    return start.views_of("samples/train/*.tar", num, size)


def check_they_begin_apart(name: str, num: int, least_rank: float) -> None:
    for seed in range(3):
        student = students.create(name, seed)
        cosine, rank = start.apart(student, views(num, student.image_px))
        assert cosine < MOST_COSINE.get(name, 0.7), (seed, cosine)
        assert rank > least_rank, (seed, rank)


@pytest.mark.parametrize("name", start.SMALL)
def test_pictures_begin_apart(name: str) -> None:
    check_they_begin_apart(name, 64, 2 if name in MOST_COSINE else 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(students.names()) - set(start.SMALL)))
def test_pictures_begin_apart_in_students_of_full_size(name: str) -> None:
    check_they_begin_apart(name, 16, 1.5 if name in MOST_COSINE else 4)


def test_the_start_that_fell_onto_one_point_is_seen(tmp_path: Path) -> None:
    old = students.create(old_start("mamba_tiny", tmp_path, 0))
    assert start.apart(old, views(64, 64))[0] > 0.9


def test_how_far_apart_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["vit_tiny", "--seeds", "2", "--images", "8"])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3 and told[2].startswith("| `vit_tiny` | 0.")


@dataclass(frozen=True)
class Taught:
    """Pictures of ten kinds, each with one of ten sentences, 40 % of them wrong; and what a teacher says of them."""

    shards: str
    store: str


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("taught")
    kinds = sorted({kind for _, _, kind in emoji()})
    captioned = (
        (key, {"jpg": jpg, "txt": labelled.caption(key, kind, kinds, 0.4).encode()}) for key, jpg, kind in emoji()
    )
    tar = str(folder / "00000.tar")
    shards.write(tar, captioned)
    teacher = Teacher(model="local-dir:samples/models/teacher_conv")
    recipe = Recipe(name="taught", teachers={"conv": teacher}, view_sets={"base": VIEWS}, captioners={})
    report = driver.run(tar, str(folder / "store"), recipe, RunOptions(workers="0", device="cpu"))
    assert not report.failed
    return Taught(tar, str(folder / "store"))


def training(taught: Taught, student: str, seed: int) -> TrainConfig:
    return TrainConfig(
        student=student, shards=taught.shards, store=taught.store, seed=seed, steps=120, lr=7e-4, global_batch_size=32,
        log_every_n_steps=1, precision="fp32", workers=0, report_to=[],
    )  # fmt: skip


def spreads(out: Path) -> list[float]:
    return [
        line["spread"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "spread" in line
    ]


def check_it_leaves_the_plateau(taught: Taught, name: str, seed: int, out: Path) -> None:
    report = fit(training(taught, name, seed), out)
    assert report["collapse"] is None
    assert median(spreads(out)[-20:]) > 0.1


@pytest.mark.slow
def test_it_leaves_the_plateau(taught: Taught, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_it_leaves_the_plateau(taught, "mamba_tiny", 0, tmp_path)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", start.SMALL)
def test_every_small_student_leaves_the_plateau_with_every_seed(name: str, taught: Taught, tmp_path: Path) -> None:
    for seed in range(5):
        check_it_leaves_the_plateau(taught, name, seed, tmp_path / str(seed))


def test_a_collapse_is_told_once_and_kept(taught: Taught, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = training(taught, old_start("mamba_tiny", tmp_path / "old", 0), 0)
    report = fit(asked.but(steps=105), tmp_path / "out")
    [told] = caplog.records
    assert report["collapse"]["step"] == told.args[0] == 100  # type: ignore[index]
    assert report["collapse"]["spread"] < 0.02 and min(report["collapse"].values()) > 0
    assert report["collapse"]["image_cosine"] > 0.99 and report["collapse"]["text_cosine"] > 0.99
    assert "start it anew: with a lower lr" in told.message


def test_a_collapse_of_a_run_before_is_not_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoopConfig(report_to=[])
    metrics = {"loss": 1.0, "spread": 0.001, "image_cosine": 0.9, "text_cosine": 0.8}
    first = Journal(tmp_path, config, 0, 300, 8)
    for step in range(99):
        first.step(step, metrics, 0.0)
    assert first.collapse is None and not caplog.records
    first.step(99, metrics, 0.0)
    found = {"step": 100, "spread": 0.001, "image_cosine": 0.9, "text_cosine": 0.8}
    assert first.collapse == found and len(caplog.records) == 1
    first.close()
    second = Journal(tmp_path, config, 100, 300, 8)
    for step in range(100, 220):
        second.step(step, metrics, 0.0)
    assert second.collapse == found and len(caplog.records) == 1
    second.close()
    from_before = Journal(tmp_path, config, 90, 300, 8)  # its checkpoint is older than what it was told
    assert from_before.collapse is None
    from_before.close()


def test_the_watch_forgets_the_first_steps_and_single_readings() -> None:
    def first_at(spreads: Iterable[float]) -> int | None:
        watch = collapse.Watch()
        return next((step for step, spread in enumerate(spreads, 1) if watch.collapsed(step, spread)), None)

    assert first_at([0.0] * 99) is None
    assert first_at([0.0] * 100) == 100
    assert first_at([0.0] * 50 + [1.0] * 100) is None  # it began at one point and left it
    assert first_at([1.0] * 200 + [0.0] * 100) == 226  # when more than half of the last 50 are so low
    assert first_at([0.0, 1.0] * 200) is None
    assert first_at([0.021] * 200) is None


@given(st.integers(2, 9), st.integers(2, 12), st.integers(1, 3), st.integers(0, 999))
def test_separation_is_what_its_definition_says(num: int, width: int, num_sets: int, seed: int) -> None:
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(num, width), dim=-1)
    texts = F.normalize(torch.randn(num_sets, num, width), dim=-1)
    found = collapse.separation(image, list(texts), torch.tensor(14.0))
    x, ys, different = image.double(), texts.double(), ~torch.eye(num, dtype=torch.bool)
    spread = []
    for y in ys:
        logits = 14 * x @ y.T
        spread.append((logits - logits.mean(0) - logits.mean(1, keepdim=True) + logits.mean()).std(correction=0))
    slow = {
        "spread": torch.stack(spread).mean(),
        "image_cosine": (x @ x.T)[different].mean(),
        "text_cosine": torch.stack([(y @ y.T)[different].mean() for y in ys]).mean(),
    }
    assert found.keys() == slow.keys()
    for name, value in slow.items():
        assert found[name].item() == pytest.approx(value.item(), abs=2e-5), name


def test_one_point_has_no_spread() -> None:
    point = F.normalize(torch.ones(8, 5), dim=-1)
    found = collapse.separation(point, [point], torch.tensor(100.0))
    assert found["spread"] == pytest.approx(0, abs=1e-4) and found["image_cosine"] == pytest.approx(1)
