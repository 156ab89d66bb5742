"""The processes of one training: torchrun's, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from reinforce.models.device import pick_device

# The first rank evaluates while the others wait for its gradients. NCCL gives up after 10 minutes unless told.
LONGEST_EVALUATION = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Over the ranks, elementwise."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the others where torchrun has started several. `device`: auto, cpu or cuda. Raises ConfigError."""
    kind = pick_device(device).type
    rank, world_size, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if kind == "cuda":
        torch.cuda.set_device(local)
    where = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if world_size < 2:
        yield Ranks(0, 1, where)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=LONGEST_EVALUATION)
    try:
        yield Ranks(rank, world_size, where)
    finally:
        dist.destroy_process_group()
