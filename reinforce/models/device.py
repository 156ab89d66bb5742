"""The device that models run on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device. A GPU copies it while the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to bring a tensor to the host. The function given back waits for it, and for nothing that the GPU was asked
    later."""
    if tensor.device.type != "cuda":
        here = tensor.cpu()
        return lambda: here
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return pinned

    return wait


def device_fault(error: RuntimeError | MemoryError) -> Exception | None:
    """What an error of torch means for the work: OSError where another try may succeed, since memory may be free then;
    DeviceLost where this process can do no more; None where it says nothing of a device or of memory."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return OSError(
            "this machine's memory is full; free it, use fewer workers, or a recipe with a smaller batch_size"
        )
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
