"""The models of a recipe on one device, and what makes their inputs."""

import logging
import os
import re

import torch

from reinforce.config import Recipe, RunOptions
from reinforce.data import resize
from reinforce.errors import ConfigError
from reinforce.models import needs
from reinforce.models.captioner import Captioner
from reinforce.models.device import device_fault
from reinforce.models.ensemble import Ensemble
from reinforce.models.teacher import Teacher
from reinforce.run.batches import ROOM_BYTES, Room

log = logging.getLogger(__name__)


class Loaded:
    """`threads` of a shard's pool, `views_ahead`, how many views of a batch are made ahead of need, and the `room` for
    pictures of all shards."""

    def __init__(self, recipe: Recipe, device: torch.device, options: RunOptions) -> None:
        """Raises ConfigError, DeviceLost."""
        self.recipe = recipe
        self.threads = options.decode_threads or decode_threads(device)
        self.views_ahead = 2 if device.type == "cpu" else 8
        self.room = Room(options.decode_bytes or decode_bytes(device))
        try:
            self.teachers = {
                name: Teacher(config, recipe.batch_size, device, recipe.random_seed)
                for name, config in recipe.teachers.items()
            }
            self.captioners = {
                name: Captioner(config, recipe.batch_size, device, recipe.random_seed)
                for name, config in recipe.captioners.items()
            }
        except (RuntimeError, MemoryError) as error:
            fault = device_fault(error)
            if isinstance(fault, OSError):
                fault = ConfigError(
                    f"the models cannot be loaded: {fault}; {needs.told(recipe, device.type == 'cuda')}"
                )
            if fault:
                raise fault from error
            raise
        self.ensemble = Ensemble(self.teachers)
        if device.type == "cuda" and not resize.has_numba():
            log.warning("without numba a GPU waits for views; install it: pip install 'clip-reinforce[fast]'")

    def describe(self) -> dict[str, dict[str, object]]:
        """What the manifest says of them."""
        return {
            "teachers": {name: teacher.describe() for name, teacher in self.teachers.items()},
            "captioners": {name: captioner.describe() for name, captioner in self.captioners.items()},
        }


def num_gpus() -> int:
    """Of the machine, at least 1. torch counts those that this process may use, and Ray gives each worker one: with
    torch's count eight workers would each take all cores."""
    there = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return max(1, len(there), torch.cuda.device_count())


def decode_threads(device: torch.device) -> int:
    """Two for a CPU worker, whose models need the core. A GPU waits for two: its share of the cores, less those of the
    models and of writing, and at most 8, beyond which nothing is won (docs/results/gpu.md)."""
    if device.type != "cuda":
        return 2
    return min(8, max(2, len(os.sched_getaffinity(0)) // num_gpus() - 2))


def decode_bytes(device: torch.device) -> int:
    """Of pictures. A GPU asks for more at a time, and its machine has more memory."""
    return ROOM_BYTES if device.type != "cuda" else 8 * ROOM_BYTES
