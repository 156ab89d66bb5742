"""Two small CLIP teachers and a small CoCa, kept as open_clip `local-dir:` folders; and the training of the CLIPs.

They learn by `clip-train fit` without a store.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from pipelines.experiments.captioner import in_training, save_halves
from reinforce.config import ViewSet
from reinforce.models import tensorfile
from reinforce.models.open_clip import open_clip
from train.config import TrainConfig
from train.students import CONFIG, WEIGHTS
from train.trainer import fit

VOCABULARY = "bpe.txt.gz"
VOCABULARY_SIZE = 2000
# What the CLIPs and the CoCa have in common.
TRAINING = {
    "distill": 0,
    "fresh_views": ViewSet(scale=(0.15, 1.0)),
    "lr": 1e-3,
    "warmup": 60,
    "precision": "fp32",
    "device": "cpu",
    "report_to": [],
}


def _config(
    model_cfg: dict[str, Any], mean: Any = open_clip.OPENAI_DATASET_MEAN, std: Any = open_clip.OPENAI_DATASET_STD
) -> dict[str, Any]:
    """The content of an open_clip_config.json."""
    preprocess_cfg = {"size": model_cfg["vision_cfg"]["image_size"], "mean": list(mean), "std": list(std)}
    preprocess_cfg |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def _text_cfg(**cfg: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY_SIZE, "tokenizer_kwargs": {"bpe_path": VOCABULARY}, **cfg}


_VIT = {"image_size": 64, "patch_size": 8, "width": 128, "head_width": 32, "layers": 6}
_POOLED = {"attentional_pool": True, "attn_pooler_queries": 32, "attn_pooler_heads": 4, "output_tokens": True}
CLIPS = {
    "teacher_vit": _config(
        {
            "embed_dim": 128,
            "quick_gelu": True,
            "vision_cfg": _VIT,
            "text_cfg": _text_cfg(context_length=24, width=96, heads=3, layers=3),
        }
    ),
    "teacher_conv": _config(
        {
            "embed_dim": 96,
            "vision_cfg": {"image_size": 80, "width": 16, "head_width": 32, "layers": [1, 1, 1, 1]},
            "text_cfg": _text_cfg(context_length=28, width=128, heads=4, layers=2),
        },
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    ),
}
COCA = _config(
    {
        "embed_dim": 128,
        "custom_text": True,
        "vision_cfg": _VIT | _POOLED,
        "text_cfg": _text_cfg(context_length=30, width=128, heads=4, layers=2, embed_cls=True, output_tokens=True),
        "multimodal_cfg": {
            "context_length": 30,
            "vocab_size": VOCABULARY_SIZE,
            "width": 128,
            "heads": 4,
            "layers": 2,
            "attn_pooler_heads": 4,
        },
    }
)
MODELS = CLIPS | {"coca": COCA}


def train_clip(name: str, out: Path, vocabulary: bytes, epochs: float = 50) -> None:
    """Train CLIPS[name] on the tars in `out/train` into `out/models/name`."""
    with tempfile.TemporaryDirectory() as folder:
        start, run = Path(folder) / name, Path(folder) / "run"
        describe(in_training(CLIPS[name]), start, vocabulary)
        own = {"student": str(start), "shards": f"{out}/train/*.tar", "global_batch_size": 128, "epochs": epochs}
        fit(TrainConfig().but(**TRAINING, **own), run)
        describe(CLIPS[name], out / "models" / name, vocabulary)
        save_halves(tensorfile.load(run / "student" / WEIGHTS)[0], out / "models" / name)


def describe(config: dict[str, Any], folder: Path, vocabulary: bytes) -> None:
    """Write a model's folder without weights, as a student is described (train/students)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / VOCABULARY).write_bytes(vocabulary)
