"""What a Ray actor does: one worker in a process of its own, on whatever node."""

import os
from pathlib import Path

from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import Shard
from reinforce.run.reports import ShardReport


class RemoteWorker:
    """Loading is a call, so that its errors keep their type."""

    def load(self, recipe: Recipe, store_url: str, options: RunOptions, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # the recipe's model folders are relative to where the run was started
        from reinforce.run.worker import Worker

        self.worker = Worker(recipe, store_url, options)

    def reinforce(self, shard: Shard) -> ShardReport:
        return self.worker.reinforce(shard)

    def samples(self) -> int:
        """How many it has answered in its life. A worker that loads answers this, one that is stopped does not."""
        return self.worker.samples if hasattr(self, "worker") else 0
