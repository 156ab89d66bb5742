"""A whole shard, from its tar to committed columns, against its models alone, and against doing it sample by sample.

    python -m benchmarks.shard [--images 128] [--serial 12] [--views 10] [--batch 64] [--model samples|ViT-B-32]
                              [--captioner samples|coca_ViT-B-32] [--rounds 7]

  whole    the worker: tar, decoding, views, hashes, captions, embeddings, the store
  bare     the same forward passes on the same tensors and no more: towers on normalised pixels, texts as tokens,
           captions from ready images
  serial   a plain generator's way: one sample after the other, views by torchvision, for each caption the image encoded
           anew and the whole text run at every step, one gzip file a sample

Recipe: two teachers and a captioner with 5 captions. `samples` are the bundled ones, 64 px; a model of open_clip is
taken twice, with random weights, of the captioner, too. CPU seconds of all threads for an image; torch has one. Every
round takes all three in turns, and a ratio is taken within a round; told are medians, of ratios the extremes as well. A
few images are enough for what is done one by one.
"""

import gzip
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image

from benchmarks.augment import by_torchvision
from reinforce.config import Captioner, Recipe, RunOptions, Teacher, ViewSet
from reinforce.data import augment, images, shards
from reinforce.data.shards import Sample, Shard
from reinforce.models import coca
from reinforce.run.worker import Worker
from reinforce.terminal import show

TAR = "samples/train/00000.tar"
CAPTIONER = "local-dir:samples/models/coca"
Call = Callable[[], object]


def recipe_of(model: str, captioner: str, num_views: int, batch: int) -> Recipe:
    names = ("local-dir:samples/models/teacher_vit", "local-dir:samples/models/teacher_conv")
    names = names if model == "samples" else (model, model)
    return Recipe(
        name="benchmark",
        teachers={f"t{i}": Teacher(model=name) for i, name in enumerate(names)},
        view_sets={"base": ViewSet(num_views=num_views, view_px=64 if model == "samples" else 224)},
        captioners={
            "coca": Captioner(model=CAPTIONER if captioner == "samples" else captioner, num_captions=5, temperature=0.5)
        },
        batch_size=batch,
        weights="pretrained" if model == captioner == "samples" else "random",
    )


def cpu_seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def recorded(worker: Worker, run: Call) -> list[Call]:
    """Every forward pass that `run` asks of the worker's models, to be made again on the same tensors."""
    calls: list[Call] = []

    def record(owner: Any, name: str) -> tuple[Any, str, Any]:
        original = getattr(owner, name)

        def recording(*inputs: Any) -> Any:
            calls.append(partial(original, *inputs))
            return original(*inputs)

        setattr(owner, name, recording)
        return owner, name, original

    models = [teacher.frozen.model for teacher in worker.loaded.teachers.values()]
    recording = [record(model, name) for model in models for name in ("encode_image", "encode_text")]
    recording.append(record(worker.loaded.captioners["coca"]._decoder, "generate"))
    run()
    for owner, name, original in recording:
        setattr(owner, name, original)
    return calls


@torch.inference_mode()
def bare(calls: list[Call]) -> None:
    for call in calls:
        call()


@torch.inference_mode()
def serial(worker: Worker, samples: list[Sample], folder: Path) -> None:
    """Every sample by itself."""
    view_set = worker.recipe.view_sets["base"]
    for sample in samples:
        picture = images.decode(sample.image)
        size = (picture.height, picture.width)
        texts = [sample.captions[0], *(_caption(worker.loaded.captioners["coca"], picture, i) for i in range(5))]
        params = [augment.draw(view_set, 0, "base", sample.key, index, size) for index in range(view_set.num_views)]
        arrays = [np.stack(params)]
        for teacher in worker.loaded.teachers.values():
            frozen = teacher.frozen
            views = np.stack([by_torchvision(picture, row, frozen.image_px) for row in params])
            arrays.append(F.normalize(frozen.model.encode_image(frozen.normalise(torch.from_numpy(views)))).numpy())
            arrays.append(F.normalize(frozen.model.encode_text(frozen.tokenize(texts))).numpy())
        content = b"".join(array.astype(np.float32).tobytes() for array in arrays)
        (folder / f"{sample.key.replace('/', '_')}.gz").write_bytes(gzip.compress(content))


def _caption(captioner: Any, picture: Image.Image, index: int) -> str:
    """One caption as open_clip's `CoCa.generate` makes it: the image anew, the whole text at every step."""
    model, config, tokenizer = captioner.frozen.model, captioner.config, captioner.frozen.tokenizer
    image = captioner.frozen.normalise(torch.from_numpy(np.stack([captioner.preprocess(picture)])))
    numbers = torch.from_numpy(np.random.default_rng(index).random(config.max_tokens))
    image_embs = model(image)["image_embs"]
    tokens = torch.tensor([[tokenizer.sot_token_id]])
    for length in range(1, config.max_tokens - 1):
        answer = model(None, tokens, image_latent=image_embs, image_embs=image_embs, output_labels=False)
        logits = answer["logits"][:, -1].float()
        logits[:, model.pad_id] = -torch.inf
        if length < config.min_tokens:
            logits[:, tokenizer.eot_token_id] = -torch.inf
        tokens = torch.cat([tokens, coca.choose(logits, numbers[length : length + 1], config)[0][:, None]], dim=1)
        if int(tokens[0, -1]) == tokenizer.eot_token_id:
            break
    return coca.caption_text(tokens[0], tokenizer, tokenizer.sot_token_id, tokenizer.eot_token_id)


def measured(folder: Path, recipe: Recipe, num: int, num_serial: int, rounds: int) -> dict[str, float]:
    num -= num % recipe.batch_size  # whole batches: a part of one costs as much
    samples = list(shards.read(Shard("00000", TAR)))[:num]
    shards.write(str(folder / "tar.tar"), [(s.key, {"jpg": s.image, "txt": s.captions[0].encode()}) for s in samples])
    torch.set_num_threads(1)
    worker = Worker(recipe, str(folder / "store"), RunOptions(device="cpu"))
    torch.set_num_threads(1)

    def whole(name: str) -> None:
        report = worker.reinforce(Shard(name, str(folder / "tar.tar")))
        if report.error or report.read != num:
            raise SystemExit(f"the shard was not written: {report}")

    calls = recorded(worker, partial(whole, "warm"))
    serial(worker, samples[:1], folder)
    seconds = np.array(
        [
            (
                cpu_seconds(partial(whole, f"round{i}")) / num,
                cpu_seconds(partial(bare, calls)) / num,
                cpu_seconds(partial(serial, worker, samples[:num_serial], folder)) / num_serial,
            )
            for i in range(rounds)
        ]
    )
    whole_s, bare_s, serial_s = seconds.T
    told = {"whole_ms": whole_s * 1e3, "bare_ms": bare_s * 1e3, "serial_ms": serial_s * 1e3}
    ratios = {"bare_over_whole": bare_s / whole_s, "serial_over_whole": serial_s / whole_s}
    extremes = {
        f"{name}_{kind}": float(pick(ratio))
        for name, ratio in ratios.items()
        for kind, pick in (("min", np.min), ("max", np.max))
    }
    return {name: float(np.median(values)) for name, values in (told | ratios).items()} | extremes


def main(
    num: Annotated[int, typer.Option("--images")] = 128,
    num_serial: Annotated[int, typer.Option("--serial")] = 12,
    num_views: Annotated[int, typer.Option("--views")] = 10,
    batch: int = 64,
    rounds: int = 7,
    model: str = "samples",
    captioner: str = "samples",
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare a whole shard with its models alone and with a plain generator."""
    with tempfile.TemporaryDirectory() as folder:
        told = measured(Path(folder), recipe_of(model, captioner, num_views, batch), num, num_serial, rounds)
    show(told, json_)


if __name__ == "__main__":
    typer.run(main)
