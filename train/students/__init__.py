"""The table of students.

A student is an open_clip model folder: `open_clip_config.json` (`model_cfg`, `preprocess_cfg`) and, where its tokenizer
has a vocabulary of its own, that file beside it. open_clip builds towers, projections, `logit_scale`, tokenizer and
preprocessing. To add a student, write such a folder into `configs/`, or anywhere and give its path. A folder that holds
weights as well, such as an export, is a student that goes on learning from there. After `import train.students`,
`open_clip.create_model_and_transforms("local-dir:FOLDER")` builds any of them.
"""

import difflib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reinforce import process
from reinforce.errors import ConfigError
from reinforce.models import tensorfile
from reinforce.models.open_clip import open_clip
from reinforce.models.pixels import Normaliser
from reinforce.models.tokenizer import get_tokenizer
from train.evaluation.metrics import Metrics, Precision, evaluate
from train.evaluation.sets import EvalSet
from train.export import ExportReport, Graph, Method, export
from train.students import hybrid_text, mamba, mamba_v1, mambavision, mci, standalone
from train.students.fold import fold

# Importing them registers their encoders with timm, and the hybrid text tower with open_clip.
TOWERS = (hybrid_text, mamba, mamba_v1, mambavision, mci)

CONFIGS = Path(__file__).parent / "configs"
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# The files of a folder that describe its weights, and so do not belong to other weights.
_OF_WEIGHTS = ("*.safetensors", "*.bin", "*.onnx", "*.partial", "export.json", "README.md", "modeling.py")
SENTENCES = ("a photo of a cat", "two dogs on a beach at sunset", "", "a red circle, a blue square and " + 20 * "more ")


@dataclass(frozen=True)
class Student:
    """`model(images, tokens)` gives `image_features` (B, D) and `text_features` (B, D), unit norm, and `logit_scale`.

    images: float32 (B, 3, image_px, image_px), pixel / 255 less `mean`, over `std`. `folder` is where it is described.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    reader = "open_clip"

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        return dict(self.model.visual.preprocess_cfg)

    @property
    def scans(self) -> bool:
        """Whether it holds state spaces."""
        return any(name.endswith("log_decay") for name, _ in self.model.named_parameters())

    @property
    def image_px(self) -> int:
        size = self.preprocess_cfg["size"]
        return int(size if isinstance(size, int) else size[0])

    @property
    def module(self) -> nn.Module:
        """All its weights."""
        model: nn.Module = self.model
        return model

    def evaluate(
        self, sets: Mapping[str, EvalSet], batch_size: int = 256, precision: Precision = "fp32"
    ) -> dict[str, Metrics]:
        """Zero-shot classification or retrieval of every set, as `train.evaluation.metrics.evaluate` does."""
        return evaluate(self, sets, batch_size, precision)

    def export(self, out: Path) -> ExportReport:
        """Write an open_clip folder with both towers as ONNX, and check it: `train.export.export`."""
        return export(self, out, lambda folder: create(str(folder)))

    def save(self, folder: Path) -> None:
        """Write it as a folder that `create` and `open_clip.create_model("local-dir:...")` load.

        From the folder that describes it, config and tokenizer are copied; the config with the size it has now.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            of_weights = any(path.match(pattern) for pattern in _OF_WEIGHTS)
            if path.is_file() and not of_weights and path.parent != folder:
                shutil.copyfile(path, folder / path.name)
        described = json.loads((folder / CONFIG).read_text())
        if described["model_cfg"]["vision_cfg"]["image_size"] != self.image_px:
            described["model_cfg"]["vision_cfg"]["image_size"] = self.image_px
            described.setdefault("preprocess_cfg", {})["size"] = self.image_px
            (folder / CONFIG).write_text(json.dumps(described, indent=1) + "\n")
        tensorfile.save(self.model.state_dict(), folder / WEIGHTS)

    def graphs(self, folded: bool) -> list[Graph]:
        """Both towers, for an export."""
        model = fold(self.model) if folded else self.model
        towers = {"image": ("images", self.probe()), "text": ("tokens", self.tokenizer(list(SENTENCES)))}
        return [
            Graph(tower, f"{tower}.onnx", Method(model, f"encode_{tower}", True), inputs, (name, f"{tower}_features"))
            for tower, (name, inputs) in towers.items()
        ]

    def documents(self, folder: str, checked: dict[str, Any]) -> dict[str, str]:
        """What an export takes along to stand alone: standalone.py."""
        model_cfg = json.loads((self.folder / CONFIG).read_text())["model_cfg"]
        training = self.folder.parent if (self.folder.parent / "report.json").is_file() else None
        return {
            "README.md": standalone.card(self.facts(), checked, training),
            "modeling.py": standalone.modeling(self.name, folder, model_cfg),
        }

    def probe(self) -> Tensor:
        """Noise that exports are checked on, normalised, the same each time: float32 (4, 3, image_px, image_px)."""
        noise = np.random.default_rng(0).integers(0, 256, (4, 3, self.image_px, self.image_px), np.uint8)
        pixels: Tensor = Normaliser(self.preprocess_cfg)(torch.from_numpy(noise))
        return pixels

    def facts(self) -> dict[str, Any]:
        """What an application has to know of an export."""
        return {
            "student": self.name,
            "preprocess": self.preprocess_cfg | {"size": self.image_px},
            "context_length": self.tokenizer.context_length,
            "logit_scale": self.model.logit_scale.exp().item(),
        }


def names() -> list[str]:
    """The students of the table."""
    return sorted(path.parent.name for path in CONFIGS.glob(f"*/{CONFIG}"))


def find(name: str) -> Path:
    """The folder of a student of the table, or `name` itself where it is a folder. Raises ConfigError."""
    for folder in (CONFIGS / name, Path(name).expanduser()):
        if (folder / CONFIG).is_file():
            return folder
    if (Path(name).expanduser() / "student" / CONFIG).is_file():
        raise ConfigError(f"{name} is the folder of a training; did you mean {Path(name) / 'student'}?")
    near = difflib.get_close_matches(name, names(), n=3)
    raise ConfigError(
        f"no student '{name}': neither in the table nor a folder with {CONFIG}; "
        + (f"did you mean {' or '.join(near)}?" if near else f"the table has: {', '.join(names())}")
    )


def create(name: str, seed: int = 0, force_image_size: int | None = None) -> Student:
    """A student with the weights of its folder, or, where there are none, with new ones drawn from `seed`.

    force_image_size: pixels per side in place of those of its folder; a ViT's learned positions are resized.
    """
    folder = find(name)
    has_weights = (folder / WEIGHTS).is_file()
    # open_clip warns that there are no weights, which is what was asked for.
    with process.errors_only(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=has_weights,
                pretrained_text=False,
                output_dict=True,
                force_image_size=force_image_size,
            )
        except MemoryError:
            raise
        except Exception as error:  # configuration and weights may hold anything: libraries assert, index and parse
            told = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            raise ConfigError(
                f"student {folder}: open_clip cannot build it: {told}; see that {CONFIG} and {WEIGHTS} are whole and "
                "belong together"
            ) from error
    size = model.visual.preprocess_cfg["size"]
    if not isinstance(size, int) and len(set(size)) > 1:
        told = " x ".join(map(str, size))
        raise ConfigError(
            f"student {folder} sees images of {told} pixels; here they are square: set image_size to one number in its "
            f"{CONFIG}, or force_image_size"
        )
    _avoid_channels_last(model)
    return Student(Path(name).name, folder, model, get_tokenizer(f"local-dir:{folder}"))


def _avoid_channels_last(model: nn.Module) -> None:
    """Give strided 1x1 convolutions of a few channels, as in MobileCLIP's stem, their input in NCHW order.

    In channels-last order the gradient of their weights writes past a buffer on a CPU with AVX2 (torch 2.13 with oneDNN
    3.12): a training ends in a segmentation fault, or goes on with damaged memory.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) != module.stride and module.in_channels % 8:
            module.register_forward_pre_hook(_contiguous_on_cpu)


def _contiguous_on_cpu(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    (images,) = inputs
    return images.contiguous() if images.device.type == "cpu" else images
