"""How much faster captions come when the image is encoded once and keys and values are cached.

    python -m benchmarks.coca
    python -m benchmarks.coca --model coca_ViT-L-14 --images 64 --tokens 30 --device cuda

Three ways to write the same captions with the same model, sampler and random numbers, timed in turns:
  cached        reinforce.models.coca
  image once    the image is encoded once, the whole text is run at every step
  open_clip     as CoCa.generate works: for each caption the image anew, the whole text at every step
Captions run to their full length, so that every way does the same work. Weights are random.
FLOPs count multiplications and additions of matrix products, attention among them; their ratio is what the speed can
gain where arithmetic is the limit. On few rows it is not: each step then waits for the weights to be read.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from reinforce.config import Captioner
from reinforce.models.coca import Decoder, choose
from reinforce.models.flops import tflop
from reinforce.models.frozen import FrozenModel

Way = Callable[[Any, Tensor, Captioner, np.ndarray, int, int], Tensor]


def image_once(model: Any, images: Tensor, config: Captioner, uniforms: np.ndarray, sot: int, eot: int) -> Tensor:
    image_embs = model(images)["image_embs"].repeat_interleave(config.num_captions, dim=0)
    numbers = torch.from_numpy(uniforms).to(images.device)
    return _whole_text(model, image_embs, config, numbers.flatten(0, 1), sot, eot).view(numbers.shape)


def as_open_clip(model: Any, images: Tensor, config: Captioner, uniforms: np.ndarray, sot: int, eot: int) -> Tensor:
    numbers = torch.from_numpy(uniforms).to(images.device)
    captions = [
        _whole_text(model, model(images)["image_embs"], config, numbers[:, c], sot, eot)
        for c in range(config.num_captions)
    ]
    return torch.stack(captions, dim=1)


def _whole_text(model: Any, image_embs: Tensor, config: Captioner, numbers: Tensor, sot: int, eot: int) -> Tensor:
    """Image tokens (R, L, W), numbers (R, T) -> tokens (R, T), none of which ends before its last."""
    tokens = torch.full((len(image_embs), 1), sot, device=image_embs.device)
    for length in range(1, config.max_tokens - 1):
        answer = model(None, tokens, image_latent=image_embs, image_embs=image_embs, output_labels=False)
        logits = answer["logits"][:, -1].float()
        logits[:, [model.pad_id, eot]] = -torch.inf
        tokens = torch.cat([tokens, choose(logits, numbers[:, length], config)[0][:, None]], dim=1)
    return torch.nn.functional.pad(tokens, (0, 1), value=eot)


def cached(graphs: bool) -> Way:
    """One decoder for all calls."""
    made: list[Decoder] = []

    def way(model: Any, images: Tensor, config: Captioner, uniforms: np.ndarray, sot: int, eot: int) -> Tensor:
        if not made:
            made.append(Decoder(model, config, sot, eot, graphs))
        return made[0].generate(images, uniforms)

    return way


WAYS = ("cached", "image once", "open_clip")


@torch.inference_mode()
def measure(
    frozen: FrozenModel,
    config: Captioner,
    num_images: int,
    repeats: int,
    ways: Iterable[str] = WAYS,
    flops: bool = True,
) -> dict[str, Any]:
    """Seconds, images a second and GFLOP of each way, and how many times faster the cached one, the first, is.

    `flops`: count them, which takes longer on a GPU than all the rest."""
    images = torch.randn(num_images, 3, frozen.image_px, frozen.image_px, device=frozen.device).to(frozen.dtype)
    uniforms = np.random.default_rng(0).random((num_images, config.num_captions, config.max_tokens))
    eot = frozen.tokenizer.eot_token_id

    def run(way: Way, num: int = num_images) -> Tensor:
        with frozen.autocast():
            return way(frozen.model, images[:num], config, uniforms[:num], frozen.tokenizer.sot_token_id, eot)

    plain: dict[str, Way] = {"image once": image_once, "open_clip": as_open_clip}
    chosen = {
        name: way for name, way in ({"cached": cached(frozen.device.type == "cuda")} | plain).items() if name in ways
    }
    counted = {"cached": cached(graphs=False)} | plain
    work = {name: num_images * 1e3 * tflop(run, counted[name], 1) for name in chosen} if flops else {}
    for way in chosen.values():
        run(way)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    tokens: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, way in chosen.items():
            start = time.perf_counter()
            tokens[name] = run(way).cpu()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {}
    for name in chosen:
        median_s = statistics.median(seconds[name])
        ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["cached"], strict=True)]
        result[name] = {
            "median_s": median_s,
            "images_per_s": num_images / median_s,
            "times_slower_than_cached": statistics.median(ratios),
            "captions_equal": float((tokens[name] == tokens["cached"]).all(dim=-1).float().mean()),
        }
        if flops:
            result[name] |= {"gflop": work[name], "times_the_flops_of_cached": work[name] / work["cached"]}
    return result


def main(
    model: Annotated[str, typer.Option(help="an open_clip CoCa")] = "coca_ViT-B-32",
    images: Annotated[int, typer.Option(min=1, help="images a batch")] = 2,
    captions: Annotated[int, typer.Option(min=1, help="captions an image")] = 5,
    tokens: Annotated[int, typer.Option(min=3, help="length with start and end token")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 on CUDA")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    config = Captioner.model_validate(
        {"model": model, "num_captions": captions, "max_tokens": tokens, "min_tokens": tokens, "precision": precision}
    )
    result = measure(FrozenModel(config, torch.device(device), random_seed=0), config, images, repeats)
    if as_json:
        knobs = {
            "model": model,
            "images": images,
            "captions": captions,
            "tokens": tokens,
            "repeats": repeats,
            "precision": precision,
        }
        print(json.dumps(knobs | {"device": device, "threads": torch.get_num_threads(), "ways": result}))
        return
    print(f"{model} on {device}, {images} images, {captions} captions of {tokens} tokens, median of {repeats}")
    for name, way in result.items():
        print(
            f"{name:>12}  {way['images_per_s']:8.2f} images/s  {way['gflop']:9.0f} GFLOP  "
            f"cached is {way['times_slower_than_cached']:5.2f} times faster "
            f"(FLOPs: {way['times_the_flops_of_cached']:.2f} times)  same captions: {way['captions_equal']:.0%}"
        )


if __name__ == "__main__":
    typer.run(main)
