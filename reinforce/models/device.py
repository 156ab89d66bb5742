"""The device that models run on."""

import torch

from reinforce.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device cuda was asked for, and torch {torch.__version__} finds no GPU; "
            "ask for cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
