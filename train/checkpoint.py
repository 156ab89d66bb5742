"""A training as one file: weights, optimiser, average, position. Written whole or not at all; no pickle.

Random numbers and the order of the data are functions of (seed, step), so that the step is all there is to say of both.
Names in the file: `model/NAME`, `average/NAME`, and SLOT/NAME for what the optimiser keeps of parameter NAME.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from reinforce.config import parse
from reinforce.errors import ConfigError, Corrupt
from reinforce.models import tensorfile
from train.average import Average
from train.config import LoopConfig

KEPT = 2  # the newest ones; the one before is there if the disk fills while the last is written


def save(
    folder: Path,
    step: int,
    config: LoopConfig,
    data: str,
    model: nn.Module,
    optimizer: Optimizer,
    average: Average | None,
) -> Path:
    """Write `step_N.safetensors`, the state before step N, and remove older ones. `data`: the source's fingerprint."""
    names = _names(model, optimizer)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.tensors.items()} if average else {}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"{slot}/{names[index]}": value for slot, value in slots.items() if isinstance(value, Tensor)}
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
    path: Path, config: LoopConfig, data: str, model: nn.Module, optimizer: Optimizer, average: Average | None
) -> int:
    """Put a checkpoint into model, optimiser and average; gives the step to go on with.

    Raises ConfigError where it belongs to another training, Corrupt where it cannot be read or has diverged.
    """
    step, parts = _read(path, config, data)
    model.load_state_dict(parts.pop("model"))
    averaged = parts.pop("average", {})
    if average:
        for name, tensor in averaged.items():
            average.tensors[name].copy_(tensor)
    names = _names(model, optimizer)
    slots_of = {i: {slot: of[name] for slot, of in parts.items() if name in of} for i, name in enumerate(names)}
    state = {i: slots for i, slots in slots_of.items() if slots}
    # It puts each tensor where the optimiser wants it: AdamW's step stays on the CPU, the rest goes to the weights.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if bad := not_finite(model, average):  # written before this was checked
        raise Corrupt(f"checkpoint {path}: {bad} is NaN or infinite; remove it to go on from the one before")
    return step


def not_finite(model: nn.Module, average: Average | None) -> str | None:
    """The first weight, of the model or its average, that is NaN or infinite; None where all are finite."""
    tensors = chain(model.state_dict().items(), average.tensors.items() if average else ())
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


def differences(saved: dict[str, Any], config: LoopConfig, where: Path) -> list[str]:
    """Sentences on what `config` asks for and what was saved, but for what it is free to change.

    A key that is newer than what was saved counts as its default, and one that is no more does not count; nor do
    `epochs` where `steps` take their place. Raises ConfigError where the saved settings are no longer possible.
    """
    asked = config.model_dump(mode="json")
    if asked.get("steps"):
        del asked["epochs"]
    was = parse(type(config), {key: saved[key] for key in asked if key in saved}, str(where)).model_dump(mode="json")
    return [
        f"  {key}: it was {was[key]}, this run asks for {asked[key]}"
        for key in asked
        if key not in config.free and was[key] != asked[key]
    ]


def _read(path: Path, config: LoopConfig, data: str) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """The step, and tensors by the part before the first slash of their name and what follows."""
    try:
        tensors, metadata = tensorfile.load(path)
    except Corrupt as error:
        raise Corrupt(f"checkpoint {error}; remove it to go on from the one before") from error
    found = differences(json.loads(metadata["config"]), config, path)
    if metadata["data"] != data:
        found.append("  the data: other samples, other content, or --data where it was --shards and --store")
    if found:
        raise ConfigError(
            f"{path} belongs to a training with other settings:",
            *found,
            "Go on with the settings it was begun with, or give another --out.",
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return int(metadata["step"]), parts


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The parameters' names, as the optimiser counts them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors"))
