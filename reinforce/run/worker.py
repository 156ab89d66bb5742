"""One shard in, its missing columns out. Knows nothing of Ray.

A worker that is given two shards at a time reads the one while it computes the other, and computes while it writes.
"""

import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from reinforce import process
from reinforce.config import Recipe, RunOptions
from reinforce.data import shards
from reinforce.data.shards import Shard
from reinforce.errors import ManifestMismatch, ShardError, Unwritable
from reinforce.models.device import card, device_fault, pick_device
from reinforce.run.batches import ahead, batches
from reinforce.run.loaded import Loaded
from reinforce.run.reports import ShardReport
from reinforce.run.shard_work import ShardWork
from reinforce.store import arrays
from reinforce.store.columns import CLASSES, Column, class_columns, columns
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class Worker:
    """Holds the models of a recipe on one device, and works shards for one store."""

    def __init__(self, recipe: Recipe, store_url: str, options: RunOptions) -> None:
        """Loads the models, compares them with what the store promises, writes the class texts that are missing.

        Raises ConfigError, ManifestMismatch, MissingExtra, DeviceLost.
        """
        if recipe.embeddings == "bf16-pco":
            arrays.pcodec()
        device = pick_device(options.device)
        process.keep_memory()
        if device.type == "cpu":
            process.torch_threads(recipe.cpu_threads)
        self.recipe, self.options, self.store = recipe, options, Store(store_url)
        self.loaded = Loaded(recipe, device, options)
        self.manifest = Manifest.of(recipe, self.loaded.describe(), card(device))
        stored = self.store.manifest()
        self.columns = columns(recipe, (stored or self.manifest).format_version)
        self._models = threading.Lock()
        self.samples = 0  # answered so far, also of shards that are under way
        classes = self.store.missing(CLASSES, class_columns(recipe))
        if stored or classes:
            self.promise()
        for column in classes:
            self._commit_classes(column)

    def promise(self) -> None:
        """Settle what the store promises. A new store is not bound to a recipe before something is written into it.

        Raises ManifestMismatch.
        """
        self.store.promise(self.manifest, self.options.extend)

    def reinforce(self, shard: Shard) -> ShardReport:
        """Write the columns of `shard` that the store lacks. Safe to call from several threads, and to call again.

        Of a tar that is broken, the report says what is wrong. Raises OSError where another try may succeed, DeviceLost
        where no other call of this process will, Unwritable where no call of any worker will.
        """
        start = time.monotonic()
        stamp = shards.stamp(shard.url)
        work = ShardWork(self.loaded, self.store, self.columns, shard, self.promise)
        if work.awaited and not work.wanted:
            return ShardReport(shard.name, error=work.lacks(), final=True)
        with ThreadPoolExecutor(self.loaded.threads) as pool:
            room, files = self.loaded.room, self.recipe.caption_files
            found = batches(shard, work.rows, self.recipe.batch_size, files, pool, room, work.see)
            ready = ahead(found, 2, room)
            try:
                with self._models:
                    for batch in ready:
                        work.answer(batch, pool)
                        self.samples += len(batch.rows)
                        del batch  # its pictures make room for the next
            except (ShardError, ManifestMismatch) as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    raise  # the network's or the disk's fault, perhaps, and not the tar's: worth another try
                if isinstance(error, ShardError):
                    work.refuse(str(error))
                return ShardReport(shard.name, error=str(error), final=True, seconds=time.monotonic() - start)
            except (RuntimeError, MemoryError) as error:
                if fault := device_fault(error):
                    raise fault from error
                raise
        refusal = work.rows.refusal(shard.url, self.options.max_invalid)
        if refusal:
            work.refuse(refusal)
        try:
            if not refusal and not work.commit(stamp):
                return self.reinforce(shard)  # another writer's captions were first: embed those
        except ManifestMismatch as error:
            refusal = str(error)
        except OSError as error:
            if error.errno not in _UNWRITABLE and not isinstance(error, PermissionError):
                raise
            # To compute it all again, as for another fault, or another shard, would only find the same again.
            told = f"{self.store.url} takes no more: {error.strerror or error}"
            raise Unwritable(
                f"{told}; free some room there, or ask for the right to write, and run again. What was written is whole"
            ) from error
        return ShardReport(
            shard.name,
            **work.rows.told(),
            empty_captions=work.empty_captions,
            columns_written=0 if refusal else len(work.wanted),
            seconds=time.monotonic() - start,
            error=refusal or work.lacks(),
            final=bool(refusal or work.lacks()),
            embedding_loss={} if refusal else work.lost,
        )

    def _commit_classes(self, column: Column) -> None:
        classes = self.recipe.class_sets[column.set]
        if column.teacher:
            array = self.loaded.teachers[column.teacher].encode_classes(classes)
        else:
            array = np.array(classes.classnames, dtype=object)
        self.store.commit(CLASSES, column, array)
