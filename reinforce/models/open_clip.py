"""What differs from machine to machine: the device, and the only door to open_clip, `from
reinforce.models.open_clip import open_clip`, which works on a CPU build of torch too.

The torchvision wheel of the package index is linked to CUDA's torch. On a CPU torch its compiled operators silently
do not load, and its import then fails while describing two of them. Declaring these two is enough for its pure-Python
parts, which are all that open_clip and timm use. Elsewhere this does nothing.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from reinforce.errors import ConfigError, MissingExtra

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library withdraws its operators when it is collected


def ensure_torchvision() -> None:
    """Import torchvision, declaring its missing operators first where that is needed."""
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    importlib.import_module("torchvision")


try:
    ensure_torchvision()
    import open_clip
except ImportError as error:
    raise MissingExtra(
        f"{error.name} is not installed; the writer needs: pip install 'clip-reinforce[reinforce]', "
        "the trainer: pip install 'clip-reinforce[train]'"
    ) from error

__all__ = ["ensure_torchvision", "get_tokenizer", "open_clip", "pick_device"]


def get_tokenizer(model: str) -> Any:
    """open_clip's tokenizer of a model; a vocabulary named in a model folder's config is looked up in that folder."""
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        text_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        vocabulary = text_cfg.get("tokenizer_kwargs", {}).get("bpe_path")
        if vocabulary:
            return open_clip.get_tokenizer(model, bpe_path=str(folder / vocabulary))
    return open_clip.get_tokenizer(model)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, and torch finds none; ask for cpu, or install a CUDA torch")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
