"""What differs from machine to machine: the device, and the only door to open_clip,
`from reinforce.models.open_clip import open_clip`, which works on a CPU build of torch too."""

import json
from pathlib import Path
from typing import Any

import torch

from reinforce import process
from reinforce.errors import ConfigError, MissingExtra

try:
    process.import_torchvision()
    import open_clip
except MissingExtra:
    raise
except ImportError as error:
    raise MissingExtra(
        f"{error.name} is not installed; the writer needs: pip install 'clip-reinforce[reinforce]', "
        "the trainer: pip install 'clip-reinforce[train]'"
    ) from error

__all__ = ["get_tokenizer", "open_clip", "pick_device"]


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
