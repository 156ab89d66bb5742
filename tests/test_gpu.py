"""What a GPU does otherwise, as far as a CPU can show it; and a rehearsal of all that benchmarks/gpu.sh asks of one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reinforce.config import Recipe, RunOptions
from reinforce.models import device, graph
from reinforce.models import frozen as frozen_module
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip
from reinforce.models.teacher import Teacher
from reinforce.run import loaded
from reinforce.run.worker import Worker
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store
from tests.processes import ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def units(frozen: FrozenModel, pixels: Tensor, texts: list[str]) -> list[Tensor]:
    with torch.inference_mode(), frozen.autocast():
        images = frozen.model.encode_image(frozen.normalise(pixels))
        features = [images, frozen.model.encode_text(frozen.tokenize(texts))]
    return [x.double() / x.double().norm(dim=-1, keepdim=True) for x in features]


def test_weights_held_in_bfloat16_give_nearly_the_same(recipe: Recipe) -> None:
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    exact = units(FrozenModel(recipe.teachers["vit"], CPU), pixels, ["a cat", "", "two dogs"])
    frozen = FrozenModel(recipe.teachers["vit"].but(precision="bf16"), CPU)
    digest, scale = frozen.digest, float(frozen.model.logit_scale)
    frozen.hold()
    assert (frozen.dtype, frozen.model.visual.conv1.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (frozen.digest, float(frozen.model.logit_scale)) == (digest, scale)
    with frozen.autocast():
        assert not torch.is_autocast_enabled("cpu")
    for got, expected in zip(units(frozen, pixels, ["a cat", "", "two dogs"]), exact, strict=True):
        assert 0.999 < float((got * expected).sum(-1).min()) < 1 - 1e-9


@pytest.mark.parametrize(("name", "precision"), [("conv", "bf16"), ("vit", "fp32")])
def test_batch_norms_and_float32_stay_as_they_are(recipe: Recipe, name: str, precision: str) -> None:
    frozen = FrozenModel(recipe.teachers[name].but(precision=precision), CPU)
    frozen.hold()
    assert {weight.dtype for weight in frozen.model.parameters()} == {torch.float32}
    with frozen.autocast():
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


def test_quick_gelu_is_silu_between_other_weights() -> None:
    torch.manual_seed(0)
    block = open_clip.transformer.ResidualAttentionBlock(16, 2, act_layer=open_clip.transformer.QuickGELU).double()
    x = 3 * torch.randn(64, 16, dtype=torch.float64)
    expected = block.mlp(x)
    frozen_module._quick_gelu_as_silu(block.mlp)
    assert isinstance(block.mlp.gelu, torch.nn.SiLU)
    assert torch.allclose(block.mlp(x), expected, rtol=0, atol=1e-12) and float(expected.std()) > 0.1
    plain = open_clip.transformer.ResidualAttentionBlock(16, 2)
    weights = {name: weight.clone() for name, weight in plain.state_dict().items()}
    frozen_module._quick_gelu_as_silu(plain.mlp)
    assert all(weight.equal(weights[name]) for name, weight in plain.state_dict().items())
    assert isinstance(plain.mlp.gelu, torch.nn.GELU)


class FakeGraph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """The names of CUDA graphs, on a CPU: what is captured runs at once, and a replay is counted."""
    made: list[FakeGraph] = []

    def new() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    waits: Any = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: waits,
        "current_stream": lambda: waits,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": new,
        "graph": lambda graph: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def test_a_graph_computes_on_a_copy_of_what_it_is_given(no_card: list[FakeGraph]) -> None:
    seen: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        seen.append(x)
        return 2 * x

    example = torch.zeros(2, 3)
    replayed = graph.captured(double, example)
    given = torch.arange(6.0).view(2, 3)
    outputs = replayed(given)
    assert len(seen) == graph.WARM_UP + 1 and no_card[0].replays == 1
    assert all(x is seen[0] for x in seen) and seen[0].equal(given) and not example.any()
    assert outputs is replayed(given)


def test_what_cannot_be_captured_runs_without_a_graph(
    no_card: list[FakeGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def refused(graph: FakeGraph) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    assert graph.captured(torch.neg, torch.ones(1))(torch.ones(1)).item() == -1
    assert caplog.messages == ["runs without a CUDA graph: operation not permitted when stream is capturing"]


def test_a_full_batch_is_not_copied_and_gives_what_a_padded_one_gives(recipe: Recipe) -> None:
    teacher = Teacher(recipe.teachers["vit"], 4, CPU)
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    assert teacher.padded(pixels) is pixels and len(teacher.padded(pixels[:3])) == 4
    views = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert (teacher.encode_images(views)[:3] == teacher.encode_images(views[:3])).all()


@pytest.mark.parametrize(("cores", "gpus", "expected"), [(16, 1, 8), (16, 2, 6), (8, 8, 2), (2, 1, 2)])
def test_threads_are_the_share_of_a_gpu(cores: int, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as Ray lets a worker see them
    monkeypatch.setattr(os, "listdir", lambda path: ["nvidiactl", "null", *(f"nvidia{i}" for i in range(gpus))])
    assert loaded.decode_threads(CUDA) == expected
    assert loaded.decode_threads(CPU) == 2


@pytest.mark.parametrize(("where", "there", "told"), [(CUDA, False, True), (CUDA, True, False), (CPU, False, False)])
def test_a_gpu_without_numba_is_told(
    where: torch.device,
    there: bool,
    told: bool,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for model in ("Teacher", "Captioner"):
        monkeypatch.setattr(loaded, model, lambda *_: None)
    monkeypatch.setattr(loaded.resize, "has_numba", lambda: there)
    loaded.Loaded(recipe, where, RunOptions())
    assert ("without numba a GPU waits for views" in caplog.text) == told


def test_threads_that_are_asked_for_are_taken(recipe: Recipe, tmp_path: Path) -> None:
    assert Worker(recipe, str(tmp_path / "a"), RunOptions(device="cpu", decode_threads=5)).loaded.threads == 5
    assert Worker(recipe, str(tmp_path / "b"), RunOptions(device="cpu")).loaded.threads == 2


def test_float32_on_a_gpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    device.pick_device("cpu")
    assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick_device("auto") == CUDA
    assert not torch.backends.cudnn.allow_tf32


def test_the_manifest_names_the_card_and_does_not_compare_it(recipe: Recipe, tmp_path: Path) -> None:
    models: dict[str, dict[str, Any]] = {"teachers": {}, "captioners": {}}
    one, other = (Manifest.of(recipe, models, {"gpu": name}) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"))
    store = Store(str(tmp_path / "s"))
    store.promise(one)
    store.promise(other)
    assert store.promised().software["gpu"] == "NVIDIA H200"
    assert device.card(CPU) == {} and "gpu" not in Manifest.of(recipe, models).software


@pytest.mark.heavy
@pytest.mark.timeout(1500)  # on a machine that is busy
def test_everything_that_a_gpu_is_asked_is_rehearsed(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "benchmarks/gpu.sh", "--small", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if ": exit " in line]
    assert len(steps) == 9 and all(": exit 0," in line for line in steps), done.stdout
    answers = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(answers) == {
        *("card", "scans", "run", "pipeline", "teachers", "captions", "latency-mamba_tiny", "training", "losses")
    }
    assert all(row["ok"] for row in answers["scans"]["rows"])
    assert answers["pipeline"]["one_process_gives_the_same_bytes"] and answers["pipeline"]["another_process_too"]
    assert all("error" not in row for step in answers.values() for row in step.get("rows", []))
    assert "== pipeline (a rehearsal)" in done.stdout
