"""The models of a recipe on one device, and what makes their inputs."""

import os
import re

import torch

from reinforce.config import Recipe, RunOptions
from reinforce.errors import ConfigError
from reinforce.models import needs
from reinforce.models.captioner import Captioner
from reinforce.models.device import device_fault
from reinforce.models.ensemble import Ensemble
from reinforce.models.teacher import Teacher
from reinforce.run.batches import ROOM_BYTES, Room
from reinforce.run.view_processes import ViewProcesses


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
        num = view_processes(device) if options.view_processes is None else options.view_processes
        self.view_processes = self.processes(num) if num else None

    def describe(self) -> dict[str, dict[str, object]]:
        """What the manifest says of them."""
        return {
            "teachers": {name: teacher.describe() for name, teacher in self.teachers.items()},
            "captioners": {name: captioner.describe() for name, captioner in self.captioners.items()},
        }

    def processes(self, num: int) -> ViewProcesses:
        """So many that make views, in all sizes in which these models can ask for them."""
        of_teachers = {teacher.image_px for teacher in self.teachers.values()}
        sides = {name: of_teachers | {view_set.view_px} for name, view_set in self.recipe.view_sets.items()}
        return ViewProcesses(num, self.recipe.batch_size, sides, self.room.num_bytes)


def num_gpus() -> int:
    """Of the machine, at least 1. torch counts those that this process may use, and Ray gives each worker one: with
    torch's count eight workers would each take all cores."""
    there = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return max(1, len(there), torch.cuda.device_count())


def decode_threads(device: torch.device) -> int:
    """Two for a CPU worker, whose models need the core. A GPU waits for two: its share of the cores, less those of the
    models and of writing, and at most 8, beyond which they stand in each other's way (docs/results/gpu-h200.md)."""
    if device.type != "cuda":
        return 2
    return min(8, max(2, len(os.sched_getaffinity(0)) // num_gpus() - 2))


def decode_bytes(device: torch.device) -> int:
    """Of pictures. A GPU asks for more at a time, and its machine has more memory."""
    return ROOM_BYTES if device.type != "cuda" else 8 * ROOM_BYTES


def view_processes(device: torch.device) -> int:
    """A CPU worker's two threads do; a GPU takes more views than threads can make."""
    if device.type != "cuda":
        return 0
    return min(16, max(1, len(os.sched_getaffinity(0)) // num_gpus() - 2))
