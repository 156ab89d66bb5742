"""Teachers as people have them: OpenAI's TorchScript archives, files of other models, and no internet."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reinforce.config import Teacher
from reinforce.errors import ConfigError
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip
from reinforce.models.teacher import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
CPU = torch.device("cpu")
CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16},
    "text_cfg": {"vocab_size": 49408, "context_length": 77, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small architecture that open_clip knows, with GELU, with QuickGELU, and one of another width."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "Small.json").write_text(json.dumps(CFG))
    (folder / "Small-quickgelu.json").write_text(json.dumps(CFG | {"quick_gelu": True}))
    (folder / "Other.json").write_text(json.dumps(CFG | {"embed_dim": 48}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def openai(models: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A TorchScript archive as OpenAI writes them, and the model in it."""
    torch.manual_seed(0)
    model = open_clip.create_model("Small-quickgelu").eval()
    open_clip.model.convert_weights_to_lp(model, torch.float16)  # as they are in OpenAI's
    model.float()

    class Script(torch.nn.Module):
        """With the three numbers that OpenAI's have among their weights."""

        def __init__(self) -> None:
            super().__init__()
            for name, module in model.named_children():
                setattr(self, name, module)
            for name, weight in model.named_parameters(recurse=False):
                setattr(self, name, weight)
            for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
                self.register_buffer(name, torch.tensor(number))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.visual(image) * self.logit_scale

    path = tmp_path_factory.mktemp("openai") / "ViT-Small.pt"
    torch.jit.save(torch.jit.trace(Script(), torch.zeros(1, 3, 32, 32)), path)
    return path, model


def test_an_archive_of_openai_is_read(openai: tuple[Path, Any]) -> None:
    path, model = openai
    frozen = FrozenModel(Teacher(model="Small-quickgelu", pretrained=str(path)), CPU)
    image, tokens = torch.randn(2, 3, 32, 32), frozen.tokenize(["a dog", "two cats"])
    with torch.no_grad():
        torch.testing.assert_close(frozen.model.encode_image(image), model.encode_image(image))
        torch.testing.assert_close(frozen.model.encode_text(tokens), model.encode_text(tokens))
    larger = load_teacher(Teacher(model="Small-quickgelu", pretrained=str(path), image_px=64), CPU)
    assert larger.image_px == 64


def test_its_activation_is_known(openai: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match="trained with QuickGELU and the model would run with the other; use Small-q"):
        FrozenModel(Teacher(model="Small", pretrained=str(openai[0])), CPU)


@pytest.mark.parametrize(
    ("name", "told", "other"), [("Small", "GELU", "Small-quickgelu"), ("Small-quickgelu", "QuickGELU", "Small")]
)
def test_that_of_another_file_is_stated(
    name: str, told: str, other: str, openai: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({k: v.contiguous() for k, v in openai[1].state_dict().items()}, tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING):
        FrozenModel(Teacher(model=name, pretrained=str(tmp_path / "w.safetensors")), CPU)
    [record] = [record.message for record in caplog.records if record.name.startswith("reinforce")]
    assert f"runs with {told}:" in record and record.endswith(f"the model is {other}")


def files(folder: Path, openai: Path) -> dict[str, Path]:
    save_file({"a": torch.zeros(3)}, folder / "other.safetensors")
    torch.save({"state_dict": {"visual.positional_embedding": torch.zeros(7, 64)}}, folder / "other.pt")
    torch.save({"a": Path}, folder / "pickle.pt")
    torch.save({}, folder / "nothing.pt")
    (folder / "page.pt").write_text("<!DOCTYPE html>")
    (folder / "empty.safetensors").write_bytes(b"")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    return {path.name: path for path in folder.iterdir()} | {"of_openai.pt": openai}


NAMES = ["other.safetensors", "other.pt", "pickle.pt", "nothing.pt", "page.pt", "empty.safetensors", "script.pt"]


@pytest.mark.parametrize(("name", "model"), [*((name, "Small-quickgelu") for name in NAMES), ("of_openai.pt", "Other")])
def test_a_file_of_anything_else_is_a_sentence(
    name: str, model: str, openai: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.models.frozen._check_activation", lambda *_: None)
    path = files(tmp_path, openai[0])[name]
    with pytest.raises(ConfigError) as caught:
        FrozenModel(Teacher(model=model, pretrained=str(path)), CPU)
    told = str(caught.value)
    assert told.startswith(f"{model},{path} cannot be loaded: ") and told.endswith("file and model belong together")
    assert "\n" not in told and len(told) < 700 and ": ;" not in told


@pytest.mark.parametrize(
    "teacher",
    [
        {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"},
        {"model": "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"},
        {"model": "timm:test_vit", "pretrained": "r160_in1k"},
    ],
)
def test_without_internet_it_is_said_what_to_name(
    teacher: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"cannot be loaded: .*without internet name a file .pretrained=FILE. or a fol"
    ):
        FrozenModel(Teacher(**teacher), CPU)
