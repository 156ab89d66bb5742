"""What memory the models of a recipe need, without loading them: torch's meta device holds shapes and no weights."""

import torch

from reinforce import process
from reinforce.config import TIMM, Model, Recipe
from reinforce.errors import ConfigError
from reinforce.models.open_clip import open_clip
from reinforce.models.weights import loading

with process.model_packages():
    import timm

_GB = 1e9


def told(recipe: Recipe, on_gpu: bool) -> str:
    """What a worker needs to load them, as a sentence; empty where an architecture cannot be had."""
    models = recipe.teachers | recipe.captioners
    try:
        read = {name: num_weights(model) * 4 / _GB for name, model in models.items()}
    except ConfigError:
        return ""
    parts = ", ".join(f"{name} {size:.2f}" for name, size in read.items())
    total, largest = sum(read.values()), max(read.values())
    needs = f"{total + largest:.2f} GB"
    if on_gpu:
        held = sum(size if models[name].precision == "fp32" else size / 2 for name, size in read.items())
        needs = f"{held:.2f} GB of its GPU, and {2 * largest:.2f} GB of the machine,"
    return (
        f"as float32 the weights take {total:.2f} GB ({parts}), and while a model is read its own are there twice. So "
        f"a worker needs {needs} to load them, and room for pictures and answers besides; use fewer workers on a "
        "machine, or one with more memory"
    )


def num_weights(config: Model) -> int:
    """Of the architecture that it names. Raises ConfigError where that cannot be had."""
    process.timm_without_warnings()
    with loading(config), process.errors_only(), torch.device("meta"):
        if config.model.startswith(TIMM):
            model = timm.create_model(config.model.removeprefix(TIMM), num_classes=0)
        else:
            model = open_clip.create_model(config.model, load_weights=False, pretrained_text=False, device="meta")
    return sum(weight.numel() for weight in model.parameters())
