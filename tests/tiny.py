"""The smallest real things: open_clip models of a few thousand weights, and tars of random pictures."""

import gzip
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from reinforce.config import Captioner, Recipe, Teacher, ViewSet
from reinforce.data import shards
from reinforce.models.open_clip import open_clip

_VOCABULARY = 514  # SimpleTokenizer without merges: 256 bytes, 256 bytes at the end of a word, start and end
_TEXT = {"vocab_size": _VOCABULARY, "layers": 1, "heads": 2, "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"}}
_VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
_CONV = {"image_size": 48, "layers": [1, 1, 1, 1], "width": 8}


def models(folder: Path) -> Recipe:
    """Writes two teachers that agree in nothing and a captioner; gives the recipe that uses them."""
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    none = {"mean": [0.0] * 3, "std": [1.0] * 3}
    vit = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": _VIT,
        "text_cfg": _TEXT | {"width": 32, "context_length": 20},
    }
    conv = {"embed_dim": 24, "vision_cfg": _CONV, "text_cfg": _TEXT | {"width": 24, "context_length": 12}}
    coca_text = _TEXT | {"width": 32, "context_length": 12}
    coca = {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": _VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": coca_text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {k: v for k, v in coca_text.items() if k != "tokenizer_kwargs"},
    }
    for seed, (name, model_cfg, preprocess_cfg) in enumerate(
        [("vit", vit, half), ("conv", conv, none), ("coca", coca, half)]
    ):
        _model(folder / name, model_cfg, preprocess_cfg, seed)
    return Recipe(
        name="tiny",
        teachers={name: Teacher(model=f"local-dir:{folder / name}") for name in ("vit", "conv")},
        view_sets={"base": ViewSet(num_views=3, view_px=40)},
        captioners={"coca": Captioner(model=f"local-dir:{folder / 'coca'}", num_captions=2, max_tokens=10)},
        batch_size=4,
    )


def siglip(folder: Path, **tokenizer: str) -> str:
    """A teacher with a bias, and if need be another tokenizer; gives its name."""
    text = _TEXT | {"width": 32, "context_length": 20, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"tokenizer_kwargs": {}, **tokenizer} if tokenizer else {}
    cfg = {"embed_dim": 16, "init_logit_bias": -10, "init_logit_scale": math.log(10), "custom_text": True}
    _model(folder, cfg | {"vision_cfg": _VIT, "text_cfg": text}, {"mean": [0.5] * 3, "std": [0.5] * 3}, seed=3)
    return f"local-dir:{folder}"


def student(folder: Path) -> str:
    """A student of a few thousand weights, without them; gives its name."""
    cfg = {"embed_dim": 12, "vision_cfg": _VIT, "text_cfg": _TEXT | {"width": 16, "context_length": 16}}
    preprocess = {"size": 32, "mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bicubic"}
    _describe(folder, cfg, preprocess)
    return str(folder)


def _describe(folder: Path, model_cfg: dict, preprocess_cfg: dict) -> None:
    folder.mkdir(parents=True)
    with gzip.GzipFile(folder / "bpe.txt.gz", "wb", mtime=0) as file:
        file.write(b"#version: tiny")  # no newline: it would be an empty merge
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg | {"interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def _model(folder: Path, model_cfg: dict, preprocess_cfg: dict, seed: int) -> None:
    _describe(folder, model_cfg, preprocess_cfg)
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    if isinstance(model, open_clip.CoCa):
        _speak_in_letters(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")


def _speak_in_letters(model: open_clip.CoCa) -> None:
    """Random weights choose random bytes, which decode to nothing readable: raise the letters above the others."""
    head = model.text_decoder.text_projection  # open_clip leaves it as the memory was
    others = [token for token in range(_VOCABULARY - 1) if not 64 <= token % 256 < 90]
    with torch.no_grad():
        head.normal_(std=head.shape[0] ** -0.5)
        model.text_decoder.ln_final.bias.fill_(1)
        head[:, others] -= 1


def picture(seed: int) -> bytes:
    """A JPEG of odd size with some structure."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), np.uint8)
    size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def tar(path: Path, num_good: int, num_bad: int = 0, seed: int = 0) -> str:
    """`num_good` samples, then `num_bad` whose image is no image. Returns the path."""
    stem = f"{path.stem}-{seed}"
    samples = [
        (f"{stem}-{i:03d}", {"jpg": picture(1000 * seed + i), "txt": f"picture {i} of {stem}".encode()})
        for i in range(num_good)
    ]
    samples += [(f"{stem}-bad{i}", {"jpg": b"<html>", "txt": b"no picture"}) for i in range(num_bad)]
    shards.write(str(path), samples)
    return str(path)


def tree(folder: Path | str) -> dict[str, bytes]:
    """Every file under a folder, by its path in it."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
