"""open_clip's own training loop on the bundled pictures: plain, with a teacher in memory, and with a store.

    make reinforce    # the store, if it is not there
    python -m benchmarks.open_clip_loop [--store stores/samples.zarr] [--student vit_tiny] [--epochs 2] [--json]

open_clip's reader needs pandas and an older webdataset than the rest of this project, so give it these apart:

    pip install --no-deps --target old pandas python-dateutil six 'webdataset==0.2.86' && export PYTHONPATH=old

Images per second of CPU time, on one thread and without worker processes, so that what else the machine does counts
little. The first two read as open_clip does (webdataset, its transform, the `txt` caption); the store's views are
cropped harder and have two operations of RandAugment. The teacher is `vit` of the samples.
"""

import json
import time
from typing import Annotated, Any

import torch
import typer

from reinforce.data import shards
from reinforce.models.open_clip import open_clip
from reinforce.models.tokenizer import get_tokenizer
from train import OpenClipData, ReinforcedDataset, students

SHARDS = "samples/train/{00000..00003}.tar"
TEACHER = "local-dir:samples/models/teacher_vit"


def main(
    store: str = "stores/samples.zarr",
    student: str = "vit_tiny",
    epochs: int = 2,
    batch_size: int = 64,
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time three ways to train one student, an epoch of each in turn; the first epoch warms up."""
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    torch.set_num_threads(1)
    name = f"local-dir:{students.find(student)}"
    num_samples = sum(len(shards.locate(shard.url)) for shard in shards.expand(SHARDS))
    args = parse_args(
        f"--model {name} --device cpu --precision fp32 --batch-size {batch_size} --workers 0 --lr 1e-3 "
        f"--train-data {SHARDS} --train-num-samples {num_samples} --log-every-n-steps 1000 --skip-scheduler".split()
    )
    args.rank, args.local_rank, args.world_size, args.wandb = 0, 0, 1, False
    model, augmented, _ = open_clip.create_model_and_transforms(name, load_weights=False)
    tokenizer = get_tokenizer(name)
    plain = get_wds_dataset(args, augmented, is_train=True, tokenizer=tokenizer, floor=True)
    visual = model.visual
    stored = OpenClipData(
        ReinforcedDataset(
            SHARDS,
            store,
            batch_size=batch_size,
            image_px=visual.image_size,
            mean=visual.image_mean,
            std=visual.image_std,
            tokenizer=tokenizer,
        ),
        "vit",
    )
    teacher = open_clip.create_model(TEACHER, output_dict=True)
    ways = {
        "plain": _Way(name, args, plain, None),
        "teacher in memory": _Way(name, args, plain, teacher),
        "store": _Way(name, args, stored, stored.dist_model),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for epoch in range(epochs + 1):
        for way, trained in ways.items():
            rates[way].append(trained.epoch(epoch))
    found = {way: {"images_per_cpu_s": [round(rate, 1) for rate in of[1:]]} for way, of in rates.items()}
    print(json.dumps(found) if json_ else "\n".join(f"{way}: {rates}" for way, rates in found.items()))


class _Way:
    """A new student, and open_clip's loop on it."""

    def __init__(self, name: str, args: Any, data: Any, dist_model: Any) -> None:
        torch.manual_seed(0)
        self.model = open_clip.create_model(name, load_weights=False, output_dict=True)
        self.args, self.data, self.dist_model = args, data, dist_model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)

    def epoch(self, epoch: int) -> float:
        """Trains for an epoch; images per second of CPU time."""
        from open_clip_train.train import train_one_epoch

        self.args.distill = self.dist_model is not None
        loss = open_clip.create_loss(self.args)
        start = time.process_time()
        train_one_epoch(
            self.model, {"train": self.data}, loss, epoch, self.optimizer, None, None, self.dist_model, self.args
        )
        return float(self.data.dataloader.num_samples / (time.process_time() - start))


if __name__ == "__main__":
    typer.run(main)
