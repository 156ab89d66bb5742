"""Every knob of the trainer on one page. Where open_clip's trainer has the same knob, it has the same name."""

from typing import Literal, Self

from pydantic import Field, model_validator

from reinforce.config import Config, ViewSet, load

Reporter = Literal["tensorboard", "wandb"]


class TrainConfig(Config):
    """One training of one student. All of it is saved beside what it makes."""

    # What is learned, and from what.
    student: str = Field("mamba_tiny", description="a name of the table (train/students/configs), or a folder")
    shards: str = Field("", description="tars: braces, '*', several joined by '::', paths or fsspec URLs")
    store: str | None = Field(None, description="what teachers know of these shards; none is plain CLIP training")
    teachers: list[str] | None = Field(None, description="those of the store to learn from; all, if not said")
    view_set: str = "base"
    text_sets: list[str] | None = Field(None, description="those of the store; all, if not said")
    captions: Literal["each", "mix"] = Field(
        "each", description="each: a loss for every text set, summed; mix: one loss, a set drawn for each sample"
    )
    view_order: Literal["sequential", "random"] = Field(
        "sequential", description="which of its views and captions a shard shows in an epoch"
    )
    fresh_views: ViewSet = Field(ViewSet(), description="how views are drawn where there is no store")

    # The loss: (1 - distill) x contrastive + distill x distillation + feature_mse x distance to the teachers' features.
    distill: float = Field(1.0, ge=0, le=1, description="MobileCLIP's lambda")
    feature_mse: float = Field(0.0, ge=0, description="weight of the squared distance to the teachers' features")
    dist_logit_scale: dict[str, float] = Field({}, description="a teacher's scale where it shall not be its own")

    # Optimisation: AdamW, warm-up, cosine.
    global_batch_size: int = Field(1024, ge=2, description="samples a step, of all ranks and accumulated batches")
    accum_freq: int = Field(1, ge=1, description="pieces a rank's share of a step is computed in, to save memory")
    epochs: float = Field(20, gt=0, description="times the data is seen")
    steps: int | None = Field(None, ge=1, description="length in steps, over epochs")
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")
    warmup: int = Field(1000, ge=0, description="steps")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    wd: float = Field(0.2, ge=0)
    grad_clip_norm: float | None = Field(1.0, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1, description="average of the weights that is evaluated; 0 for none")
    seed: int = Field(0, ge=0)

    # How it is computed.
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grad_checkpointing: bool = False
    torchcompile: bool = False
    streams: int = Field(
        8, ge=1, description="places of an epoch's order that are read at once; a multiple of the number of ranks"
    )
    workers: int = Field(2, ge=0, description="processes a rank that decode; 0 for none")
    cache_dir: str | None = Field(None, description="folder that remote tars are copied to")

    # What is said and kept.
    eval_sets: dict[str, str] = Field({}, description="name: folder in CLIP_benchmark's layout, or tars with captions")
    eval_every_n_steps: int | None = Field(None, ge=1, description="besides at the end")
    save_every_n_steps: int = Field(1000, ge=1)
    log_every_n_steps: int = Field(10, ge=1)
    report_to: list[Reporter] = Field(["tensorboard"])

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.global_batch_size % self.streams:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} has to be a multiple of streams {self.streams}"
            )
        return self

    @property
    def learns_from_teachers(self) -> bool:
        return self.distill + self.feature_mse > 0


# Knobs that a resumed run may change: none of them touches what is learned, but for how its sums are rounded.
FREE = {
    "device",
    "workers",
    "cache_dir",
    "shards",
    "store",
    "eval_sets",
    "eval_every_n_steps",
    "save_every_n_steps",
    "log_every_n_steps",
    "report_to",
    "grad_checkpointing",
    "torchcompile",
    "accum_freq",
}


def load_training(name: str, overrides: list[str] = []) -> TrainConfig:
    """The `TRAINING` of pipelines/NAME.py, or a TrainConfig saved as NAME.json, with `dotted.key=value` overrides.

    Raises ConfigError that names the recipes or keys which come near.
    """
    return load(TrainConfig, "TRAINING", name, overrides)
