"""The device that models run on."""

from typing import Any

import torch

from reinforce import process
from reinforce.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, whose float32 is float32 from now on.

    Raises ConfigError if CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device cuda was asked for, and torch {torch.__version__} finds no GPU; "
            "ask for cpu, or install a CUDA build of torch"
        )
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
    if device.type == "cuda":
        process.full_float32()
    return device


def card(device: torch.device) -> dict[str, str]:
    """The GPU and the versions that its kernels come with, for a record; of a CPU nothing."""
    if device.type != "cuda":
        return {}
    cudnn: Any = torch.backends.cudnn
    return {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn.version()),
    }
