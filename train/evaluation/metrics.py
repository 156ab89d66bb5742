"""Zero-shot classification and retrieval: embeddings in, metrics out; and the embeddings that a model gives.

A tie counts as a miss, so that a model which gives everything the same embedding scores 0 and not 1.

Protocols: CLIP's (Radford et al. 2021, arXiv 2103.00020, section 3.1) for classes, with the mean of its templates'
embeddings; recall at k as CLIP_benchmark counts it for captions. The names are CLIP_benchmark's, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reinforce.models.pixels import Normaliser
from train.evaluation.sets import EvalSet

BLOCK_ROWS = 1024  # of similarities held at once
RECALLS = (1, 5, 10)

Precision = Literal["fp32", "amp_bf16"]
Metrics = dict[str, float]


class Embedder(Protocol):
    """What is evaluated, a student for one: `model` has open_clip's `encode_image` and `encode_text`."""

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def preprocess_cfg(self) -> dict[str, Any]: ...


def evaluate(
    student: Embedder, sets: Mapping[str, EvalSet], batch_size: int = 256, precision: Precision = "fp32"
) -> dict[str, Metrics]:
    """The metrics of every set by its name, as `zeroshot` or `retrieval` gives them, and `num_skipped` samples.

    It runs where the student's weights are, and in eval mode; afterwards each module is in its own mode again. Raises
    what `EvalSet.load` raises.
    """
    results = {}
    with _evaluating(student.model):
        for name, eval_set in sets.items():
            loaded = eval_set.load(student.preprocess_cfg)
            features = embed_images(student, loaded.images, batch_size, precision)
            if eval_set.prompts is None:
                metrics = retrieval_of(student, features, loaded.truth, batch_size, precision)
            else:
                classes = embed_classes(student, eval_set.prompts, batch_size, precision)
                metrics = zeroshot(features, torch.tensor(loaded.truth), classes, eval_set.coarse)
            results[name] = metrics | {"num_skipped": loaded.num_skipped}
    return results


def in_percent(found: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of metrics, to be read: all that are no whole numbers are shares."""

    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return in_percent(value)
        return f"{value:.1%}" if isinstance(value, float) else value

    return {name: shown(value) for name, value in found.items()}


def zeroshot(
    image_features: Tensor, labels: Tensor, class_features: Tensor, coarse: Sequence[str] | None = None
) -> Metrics:
    """Classification by the nearest class: (N, D) images with `labels` (N,) in 0..C-1, (C, D) classes, unit norm.

    `acc1`, `acc5` (with more than 5 classes only) and `mean_per_class_recall`, the mean of acc1 over the classes that
    have images, are shares from 0 to 1; `num` is N. Where `coarse` names the group of each class, `coarse_acc1` is the
    share of images whose nearest class is of the right group.
    """
    classes = torch.arange(len(class_features), device=labels.device)
    num_before = _num_before(image_features, class_features, labels, classes)
    right = num_before < 1
    num_of_class = labels.bincount()
    share_of_class = labels[right].bincount(minlength=len(num_of_class)).double() / num_of_class
    acc5 = {"acc5": _share(num_before < 5)} if len(class_features) > 5 else {}
    recall = share_of_class[num_of_class > 0].mean().item()
    of_groups = {}
    if coarse:
        names = sorted(set(coarse))
        group = torch.tensor([names.index(name) for name in coarse], device=labels.device)
        of_groups["coarse_acc1"] = _share(_num_before(image_features, class_features, group[labels], group) < 1)
    return {"acc1": _share(right)} | acc5 | of_groups | {"mean_per_class_recall": recall, "num": len(labels)}


def retrieval(image_features: Tensor, text_features: Tensor, text_owner: Tensor) -> Metrics:
    """Recall both ways: (N, D) images and (M, D) texts, unit norm; text j is a caption of image `text_owner[j]`, and
    every image has one.

    `text_retrieval_recall@K` is the share of images with at least one of their captions among the K nearest texts;
    `image_retrieval_recall@K` the share of texts with their image among the K nearest. K is 1, 5 and 10.
    """
    image_id = torch.arange(len(image_features), device=text_owner.device)
    to_text = _num_before(image_features, text_features, image_id, text_owner)
    to_image = _num_before(text_features, image_features, text_owner, image_id)
    return (
        {f"text_retrieval_recall@{k}": _share(to_text < k) for k in RECALLS}
        | {f"image_retrieval_recall@{k}": _share(to_image < k) for k in RECALLS}
        | {"num_images": len(image_features), "num_texts": len(text_features)}
    )


def worst_group(image_features: Tensor, labels: Tensor, class_features: Tensor, groups: Tensor, k: int) -> float:
    """The least share, over the groups that have images, of images whose class is among the `k` nearest (WILDS).
    `groups` (N,) are whole numbers from 0 on; the others as for `zeroshot`."""
    classes = torch.arange(len(class_features), device=labels.device)
    right = _num_before(image_features, class_features, labels, classes) < k
    num_of_group = groups.bincount()
    shares = groups[right].bincount(minlength=len(num_of_group)).double() / num_of_group
    return shares[num_of_group > 0].min().item()


def macro_f1(image_features: Tensor, labels: Tensor, class_features: Tensor) -> float:
    """The mean of F1 = 2 right / (given + true) over the classes that have images (WILDS); arguments as for
    `zeroshot`."""
    parts = (image_features[i : i + BLOCK_ROWS] for i in range(0, len(image_features), BLOCK_ROWS))
    given = torch.cat([(part @ class_features.T).argmax(1) for part in parts])
    num = len(class_features)
    of_class = labels.bincount(minlength=num)
    right = labels[given == labels].bincount(minlength=num)
    return (2 * right.double() / (given.bincount(minlength=num) + of_class))[of_class > 0].mean().item()


@torch.no_grad()
def embed_images(student: Embedder, images: Sequence[Tensor], batch_size: int, precision: Precision = "fp32") -> Tensor:
    """uint8 (3, H, W) images, as `EvalSet.load` gives them -> (N, D) float32 on the CPU, unit norm."""
    device = next(student.model.parameters()).device
    normaliser = Normaliser(student.preprocess_cfg).to(device)

    def features(batch: Sequence[Tensor]) -> Tensor:
        pixels = normaliser(torch.stack(list(batch)).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            out: Tensor = student.model.encode_image(pixels)
        return F.normalize(out.float(), dim=-1).cpu()

    return torch.cat([features(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


@torch.no_grad()
def embed_texts(student: Embedder, texts: Sequence[str], batch_size: int, precision: Precision = "fp32") -> Tensor:
    """(M, D) float32 on the CPU, unit norm."""
    device = next(student.model.parameters()).device

    def features(batch: Sequence[str]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            out: Tensor = student.model.encode_text(student.tokenizer(list(batch)).to(device))
        return F.normalize(out.float(), dim=-1).cpu()

    return torch.cat([features(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)])


def embed_classes(
    student: Embedder, prompts: Sequence[Sequence[str]], batch_size: int, precision: Precision = "fp32"
) -> Tensor:
    """(C, D) float32 on the CPU: for each class the mean of its prompts' embeddings, scaled to unit norm."""
    texts = [text for of_class in prompts for text in of_class]
    features = embed_texts(student, texts, batch_size, precision)
    by_class = features.view(len(prompts), -1, features.shape[1])  # all have as many prompts
    return F.normalize(by_class.mean(1), dim=-1)


def retrieval_of(
    student: Embedder, image_features: Tensor, captions: Sequence[Sequence[str]], batch_size: int, precision: Precision
) -> Metrics:
    """`retrieval` of embedded images and of the captions of each."""
    owner = torch.tensor([i for i, of_it in enumerate(captions) for _ in of_it])
    texts = embed_texts(student, [caption for of_it in captions for caption in of_it], batch_size, precision)
    return retrieval(image_features, texts, owner)


def _num_before(x: Tensor, y: Tensor, x_id: Tensor, y_id: Tensor) -> Tensor:
    """For each row of `x`, how many rows of `y` with another id are at least as near as the nearest one with its id.

    The test is "not less" and not "greater or equal", so that NaN counts as a miss.
    """
    counts = []
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        similarity = x[rows] @ y.T
        own = x_id[rows, None] == y_id
        nearest = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        counts.append((~own & ~(similarity < nearest)).sum(1))
    return torch.cat(counts)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
