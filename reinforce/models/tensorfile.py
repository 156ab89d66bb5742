"""A safetensors file: written whole or not at all, read with its metadata, and told from a damaged one by a digest."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from reinforce.errors import Corrupt, MissingExtra

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise MissingExtra.of_models("safetensors") from error


_DIGEST = "sha256"  # the name in the metadata


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Tensors from any device. Under `path` stands the old file until the new one is whole; what is left of a write
    that was cut off has `.partial` behind its name."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(here, partial, (metadata or {}) | {_DIGEST: _whole(here, metadata or {})})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.chmod(mode)  # as the umask says; save_file lets nobody else read
    os.replace(partial, path)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and the metadata. Raises Corrupt where the file is not there, cannot be read, or is not as it
    was written; of a file that others wrote, the latter cannot be known."""
    try:
        with safe_open(path, "pt") as file:
            # Cloned: in the file they lie at odd places, and a kernel may round otherwise where memory is not aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error
    written = metadata.pop(_DIGEST, None)
    if written is not None and written != _whole(tensors, metadata):
        raise Corrupt(f"{path} cannot be read: its bytes are not those that were written")
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _whole(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{digest(tensors)} {json.dumps(metadata, sort_keys=True)}".encode()).hexdigest()


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, by the rest of their names."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
