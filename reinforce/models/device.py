"""The device that models run on."""

from typing import Any

import torch

from reinforce import process
from reinforce.errors import ConfigError, DeviceLost


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


def device_fault(error: RuntimeError) -> Exception | None:
    """What an error of torch means for the work: OSError where another try may succeed, DeviceLost where this process
    can do no more; None where it says nothing of a device."""
    if isinstance(error, torch.OutOfMemoryError):
        told = str(error).partition(".")[0]
        return OSError(f"the GPU's memory is full ({told}); free it, or use a recipe with a smaller batch_size")
    # torch.AcceleratorError, which torch has from 2.8 on. Whatever the fault, CUDA gives it to every call that follows.
    if "CUDA error" in str(error):
        return DeviceLost(f"the GPU has failed: {str(error).splitlines()[0]}; look at nvidia-smi, and run again")
    return None


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
