"""Every setting of the trainer on one page. Where open_clip's trainer has the same setting, it has the same name."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from reinforce.config import CAPTION_FILES, Address, CaptionFiles, CaptionKeys, CaptionLines, Config, ViewSet
from reinforce.recipes import load

LARGEST_SEED = 2**63 - 1  # torch takes no more than twice that
# Far beyond what learns, and small enough for float32 with what it is multiplied by.
LARGEST_RATE, LARGEST_WEIGHT, LARGEST_SCALE = 1e30, 1e6, 1e4
Reporter = Literal["tensorboard", "wandb"]


class ComkdConfig(Config):
    """Stage 2 of ComKD-CLIP (train/comkd): a student's image encoder learns its teacher's way with some classes."""

    class_set: str = Field(description="the store's class texts to learn with")
    num_prompts: int = Field(
        0,
        ge=0,
        description="visual prompts per layer of a ViT whose weights are frozen (published: 4); 0: all weights learn",
    )
    prompt_depth: int = Field(9, ge=1, description="number of layers with prompts")
    kl: float = Field(
        1.0, ge=0, le=LARGEST_WEIGHT, description="weight of the KL divergence between the logits; 0 for none"
    )
    tau: float = Field(1.0, gt=0, description="its temperature")
    align: float = Field(1.0, ge=0, le=LARGEST_WEIGHT, description="weight of IFAlign; 0 for none")
    align_over: Literal["batch", "width"] = Field(
        "batch", description="what its means and variances are taken over: for each feature, or for each image"
    )
    align_average: bool = Field(False, description="its distance as a mean, not a sum")
    attention: bool = Field(True, description="EduAttention")
    attention_scale: float | None = Field(
        None, gt=0, description="its C; by default the square root of the teacher's width"
    )

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not self.kl + self.align:
            raise ValueError("with kl=0 and align=0 there is nothing to learn; set one of them above 0")
        if self.attention and not self.kl:
            raise ValueError("EduAttention learns through the logits; set kl above 0, or attention=false")
        return self


class DataConfig(Config):
    """One of several parts that a training learns from."""

    shards: Address = Field(description="tars: braces, '*', several joined by '::', paths or fsspec URLs")
    store: Address | None = Field(None, description="what teachers know of these shards; none: captions alone")
    weight: float = Field(
        1.0,
        gt=0,
        le=1_000_000,  # an epoch lists each pass
        description="how often an epoch goes through them, as open_clip's train_data_upsampling_factors",
    )


class LoopConfig(Config):
    """What the loop of any training asks for (train/loop.py)."""

    eval_every_n_steps: int | None = Field(
        None, ge=1, description="evaluations during the training; there is always one at the end"
    )
    save_every_n_steps: int = Field(1000, ge=1)
    log_every_n_steps: int = Field(10, ge=1)
    report_to: list[Reporter] = Field(["tensorboard"])

    # What a resumed run may change: none of it affects what is learned, except for how sums are rounded.
    free: ClassVar[frozenset[str]] = frozenset(
        {"device", "eval_every_n_steps", "save_every_n_steps", "log_every_n_steps", "report_to"}
    )


class TrainConfig(LoopConfig):
    """One training of one student. All of it is saved beside what it makes."""

    # What is learned, and from what.
    student: str = Field("mamba_tiny", description="a name of the table (train/students/configs), or a folder")
    force_image_size: int | None = Field(None, ge=1, description="pixels per side in place of the student's own")
    shards: Address = Field("", description="tars: braces, '*', several joined by '::', paths or fsspec URLs")
    store: Address | None = Field(
        None, description="what teachers know about these shards; without it, plain CLIP training (distill=0)"
    )
    data: list[DataConfig] = Field(
        [],
        description="several shards with stores, in place of `shards` and `store`; each sample learns from what its "
        "own store has",
    )
    teachers: list[str] | None = Field(None, description="the store's teachers to learn from; all by default")
    view_set: str = Field("base", description="the store's view set to learn from; several joined by '+'")
    text_sets: list[str] | None = Field(None, description="the store's text sets to learn from; all by default")
    num_views: int | None = Field(None, ge=1, description="use only so many of the store's views of each image")
    num_captions: int | None = Field(None, ge=1, description="use only so many captions of each text set")
    captions: Literal["each", "mix"] = Field(
        "each", description="each: a loss for every text set, summed; mix: one loss, a set drawn for each sample"
    )
    view_order: Literal["sequential", "random"] = Field(
        "sequential", description="how a shard's view and caption for an epoch are chosen"
    )
    fresh_views: ViewSet = Field(ViewSet(), description="how views are drawn where there is no store")

    caption_keys: CaptionKeys = CAPTION_FILES.keys
    caption_lines: CaptionLines = CAPTION_FILES.lines

    # The loss: (1 - distill) x contrastive + distill x distillation + feature_mse x distance to the teachers' features.
    distill: float = Field(1.0, ge=0, le=1, description="MobileCLIP's lambda")
    feature_mse: float = Field(
        0.0, ge=0, le=LARGEST_WEIGHT, description="weight of the squared distance to the teachers' features"
    )
    feature_balance: bool = Field(
        False,
        description="each teacher's distance over the spread of its features, so that those whose features lie close "
        "together count as much",
    )
    dist_logit_scale: dict[str, Annotated[float, Field(gt=0, le=LARGEST_SCALE)]] = Field(
        {}, description="by teacher: a logit scale to use in place of its own"
    )

    comkd: ComkdConfig | None = Field(None, description="learn as ComKD-CLIP does, from one teacher, without captions")

    # Optimisation: AdamW, warm-up, cosine.
    global_batch_size: int = Field(1024, ge=2, description="samples per step, over all ranks and accumulated pieces")
    accum_freq: int = Field(1, ge=1, description="pieces in which a rank computes its share of a step, to save memory")
    epochs: float = Field(20, gt=0, le=1_000_000, description="passes over the data")
    steps: int | None = Field(
        None, ge=1, le=10**12, description="length in steps; where it is given, epochs do not count"
    )
    lr: float = Field(1e-3, gt=0, le=LARGEST_RATE)
    min_lr: float = Field(0.0, ge=0, le=LARGEST_RATE, description="learning rate at the end of the cosine")
    warmup: int | None = Field(
        None, ge=0, description="steps of linear warm-up; by default a tenth of the training, at most 1000"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, ge=1e-30, le=1)
    wd: float = Field(0.2, ge=0, le=LARGEST_RATE)
    grad_clip_norm: float | None = Field(1.0, ge=1e-12)
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the moving average of weights, which is evaluated and kept; 0: no average",
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED)

    # How it is computed.
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    grad_checkpointing: bool = False
    torchcompile: bool = False
    streams: int = Field(
        8, ge=1, description="places in an epoch's order that are read side by side; a multiple of the number of ranks"
    )
    workers: int = Field(2, ge=0, description="decoding processes per rank; 0: decode in the training process")
    cache_dir: str | None = Field(
        None, description="folder that remote tars are copied to; by default ~/.cache/clip-reinforce"
    )
    cache_bytes: int | None = Field(
        None,
        ge=1,
        description="what these copies may take, the oldest go first; by default what the disk has room for",
    )

    eval_sets: dict[str, Address] = Field(
        {}, description="name: folder in CLIP_benchmark's layout, or tars with captions"
    )

    free: ClassVar[frozenset[str]] = LoopConfig.free | {
        "workers",
        "cache_dir",
        "cache_bytes",
        "shards",
        "store",
        "data",
        "eval_sets",
        "grad_checkpointing",
        "torchcompile",
        "accum_freq",
    }

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.global_batch_size % self.streams:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} has to be a multiple of streams {self.streams}, the "
                "places in the data that are read side by side; "
                f"--set streams={math.gcd(self.global_batch_size, self.streams)} fits"
            )
        if self.comkd and (self.feature_mse or self.text_sets):
            raise ValueError("with comkd no text is learned from: leave out feature_mse and text_sets")
        if self.data and (self.shards or self.store):
            raise ValueError("`data` takes the place of `shards` and `store`: give the one or the other")
        if self.data and self.comkd:
            raise ValueError("comkd learns from one store: give shards and store, and no data")
        return self

    @property
    def caption_files(self) -> CaptionFiles:
        """How captions lie in tars: in those that are learned from without a store, and in those of evaluations."""
        return CaptionFiles(keys=self.caption_keys, lines=self.caption_lines)

    @property
    def learns_from_teachers(self) -> bool:
        return self.comkd is not None or self.distill + self.feature_mse > 0


def taking_the_place(shards: str | None, store: str | None, data: object) -> dict[str, Any]:
    """What is to learn from, where a request names it and its recipe, perhaps, something else: `data` takes the place
    of a recipe's shards and store, and shards that of its data."""
    if data:
        return {"shards": shards or "", "store": store}
    where: dict[str, Any] = {"shards": shards, "data": []} if shards else {}
    return where if store is None else where | {"store": store}


def load_training(name: str | None, overrides: list[str] = []) -> TrainConfig:
    """The `TRAINING` of a recipe (reinforce/recipes.py), or without a name the defaults, with `dotted.key=value`
    overrides. Raises ConfigError."""
    return load(TrainConfig, "TRAINING", name, overrides)
