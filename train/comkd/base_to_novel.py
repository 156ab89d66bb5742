"""Base-to-novel: classes that were learned and classes that were not are scored separately.

Source: CoCoOp's protocol as PromptSRC, PromptKD and ComKD-CLIP use it: the first half of the classes, rounded up, is
base, the rest is novel; images of each half are classified among the classes of that half only.
"""

from torch import Tensor

from reinforce.errors import ConfigError
from train.evaluation.metrics import Metrics, zeroshot
from train.evaluation.sets import EvalSet


def num_base(num_classes: int) -> int:
    return -(-num_classes // 2)


def base_to_novel(image_features: Tensor, labels: Tensor, class_features: Tensor) -> Metrics:
    """(N, D) images with `labels` (N,) in 0..C-1, (C, D) classes of unit norm -> shares from 0 to 1: top-1 of all among
    all (`acc1`), of `base` among base, of `novel` among novel, and `hm`, the harmonic mean of the last two. If a half
    has no images, its score and `hm` are left out."""
    first = num_base(len(class_features))
    metrics = {"acc1": zeroshot(image_features, labels, class_features)["acc1"]}
    for name, rows, low, classes in (
        ("base", labels < first, 0, class_features[:first]),
        ("novel", labels >= first, first, class_features[first:]),
    ):
        if rows.any():
            metrics[name] = zeroshot(image_features[rows], labels[rows] - low, classes)["acc1"]
    if "base" in metrics and "novel" in metrics:
        metrics["hm"] = harmonic_mean(metrics["base"], metrics["novel"])
    return metrics | {"num": len(labels)}


def harmonic_mean(base: float, novel: float) -> float:
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def check_classes(eval_set: EvalSet, classnames: list[str], whose: str) -> None:
    """Raises ConfigError if the labels of the set do not mean these classes in this order."""
    if eval_set.classnames is None:
        raise ConfigError(f"{eval_set.url}: its images have captions; give a set whose images have classes")
    if len(eval_set.classnames) != len(classnames):
        raise ConfigError(
            f"{eval_set.url}: names {len(eval_set.classnames)} classes, and {whose} {len(classnames)}; "
            "give a set with the same classes, or learn with the set's"
        )
    for i, (named, wanted) in enumerate(zip(eval_set.classnames, classnames, strict=True)):
        if named != wanted:
            raise ConfigError(
                f"{eval_set.url}: class {i} is '{named}' there and '{wanted}' in {whose}; "
                "bring classnames.txt and the labels into the same order"
            )
