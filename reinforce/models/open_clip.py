"""The only door to open_clip: `from reinforce.models.open_clip import open_clip`. It works on a CPU build of torch."""

import json
from pathlib import Path
from typing import Any

from reinforce import process
from reinforce.errors import ConfigError, MissingExtra

try:
    process.import_torchvision()
    import open_clip
except MissingExtra:
    raise
except ImportError as error:
    raise MissingExtra.of_models(error.name or str(error)) from error

__all__ = ["get_tokenizer", "open_clip"]


def get_tokenizer(model: str) -> Any:
    """open_clip's tokenizer of a model; a vocabulary named in a model folder's config is looked up in that folder.

    Raises MissingExtra where it is one of transformers' (SigLIP's are) and that is not there, ConfigError where its
    files cannot be had.
    """
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        text_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        vocabulary = text_cfg.get("tokenizer_kwargs", {}).get("bpe_path")
        if vocabulary:
            return open_clip.get_tokenizer(model, bpe_path=str(folder / vocabulary))
    try:
        return open_clip.get_tokenizer(model)
    except ImportError as error:
        raise MissingExtra(
            f"the tokenizer of {model} needs {error.name}, which is not installed: pip install 'clip-reinforce[siglip]'"
        ) from error
    except (OSError, ValueError) as error:  # what transformers raises for files that it cannot get or read
        raise ConfigError(f"the tokenizer of {model} cannot be loaded: {error}") from error
