"""A training as one file: weights, optimiser, average, position. Written whole or not at all; no pickle.

Random numbers and the order of the data are functions of (seed, step), so that the step is all there is to say of both.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reinforce.errors import ConfigError, Corrupt
from reinforce.models import tensorfile
from train.config import FREE, TrainConfig

KEPT = 2  # the newest ones; the one before is there if the disk fills while the last is written


def save(
    folder: Path,
    step: int,
    config: TrainConfig,
    data: str,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    average: dict[str, Tensor],
) -> Path:
    """Write `step_N.safetensors`, the state before step N, and remove older ones. `data`: the source's fingerprint."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{slot}/{names[parameter]}": state[slot] for slot in ("exp_avg", "exp_avg_sq", "step")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.safetensors"
    tensorfile.save(tensors, path, {"step": str(step), "config": config.model_dump_json(), "data": data})
    for old in _all(folder)[:-KEPT]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, or None."""
    return next(reversed(_all(folder)), None)


def load(
    path: Path,
    config: TrainConfig,
    data: str,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    average: dict[str, Tensor],
) -> int:
    """Put a checkpoint into model, optimiser and average; gives the step to go on with.

    Raises ConfigError where it belongs to another training, Corrupt where it cannot be read.
    """
    step, tensors = _read(path, config, data)
    model.load_state_dict(_of("model", tensors))
    for name, tensor in _of("average", tensors).items():
        average[name].copy_(tensor)
    slots = {slot: _of(slot, tensors) for slot in ("exp_avg", "exp_avg_sq", "step")}
    for name, parameter in model.named_parameters():
        if name in slots["exp_avg"]:
            optimizer.state[parameter] = {
                "step": slots["step"][name],
                "exp_avg": slots["exp_avg"][name].to(parameter.device),
                "exp_avg_sq": slots["exp_avg_sq"][name].to(parameter.device),
            }
    return step


def _read(path: Path, config: TrainConfig, data: str) -> tuple[int, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"checkpoint {path} cannot be read: {error}; remove it to go on from the one before") from error
    differences = _differences(json.loads(metadata["config"]), config.model_dump(mode="json"))
    if metadata["data"] != data:
        differences.append("  shards, store: it learned from others, or their content has changed")
    if differences:
        raise ConfigError(
            f"{path} belongs to a training with other settings:\n" + "\n".join(differences) + "\n"
            "Go on with the settings it was begun with, or give another --out."
        )
    return int(metadata["step"]), tensors


def _differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    return [
        f"  {key}: it was {saved.get(key)}, this run asks for {asked.get(key)}"
        for key in asked
        if key not in FREE and saved.get(key) != asked[key]
    ]


def _of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"))
