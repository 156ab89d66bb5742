"""How embeddings lie in a store: room against what is lost.

    bf16      as they are: bfloat16
    bf16-pco  the same bits as uint16 in pcodec, which comes near their entropy; zarr-python needs the package
              `pcodec` for it, and TensorStore cannot read it
    int8      a byte for each number. Rows are unit vectors, so a row's scale is known by its norm and is not stored

An int8 row is q = round(127 x / max |x|), and is read as q / |q|; a row of zeros, which no embedding has, stands for
one of NaN.
"""

import ml_dtypes
import numpy as np

from reinforce.config import Packing
from reinforce.errors import StoreError

NORM_TOLERANCE = 0.01  # a unit vector rounded to bfloat16 stays well inside
LARGEST = 127
MEASURED = 1024  # samples, as many as a batch of a training, of which a loss is told


def packed(embeddings: np.ndarray, packing: Packing) -> np.ndarray:
    """bfloat16 (.., D) as it is stored. Raises StoreError where int8 is asked for what are no unit vectors."""
    if packing == "bf16":
        return embeddings
    if packing == "bf16-pco":
        return embeddings.view(np.uint16)
    wide = embeddings.astype(np.float32)
    norms = np.linalg.norm(wide, axis=-1)
    if odd := norms[np.abs(norms - 1) > NORM_TOLERANCE].tolist():  # NaN is not
        raise StoreError(f"int8 holds unit vectors, and there is one of norm {odd[0]:g}; use embeddings=bf16")
    peaks = np.abs(wide).max(-1, keepdims=True)
    rounded: np.ndarray = np.nan_to_num(np.rint(wide * (LARGEST / peaks))).astype(np.int8)
    return rounded


def unpacked(stored: np.ndarray, packing: Packing) -> np.ndarray:
    """bfloat16 (.., D) of what is stored."""
    if packing == "bf16":
        return stored
    if packing == "bf16-pco":
        return stored.view(ml_dtypes.bfloat16)
    wide = stored.astype(np.float32)
    with np.errstate(invalid="ignore"):
        unit: np.ndarray = (wide / np.linalg.norm(wide, axis=-1, keepdims=True)).astype(ml_dtypes.bfloat16)
    return unit


def loss(images: np.ndarray, texts: np.ndarray, scale: float, packing: Packing) -> dict[str, float]:
    """What a student that learns from packed embeddings would be told otherwise.

    images, texts: bfloat16 (n, D) of the same n samples, finite. Compared are the softmax over texts for each image and
    over images for each text, of similarities times `scale`, with and without packing: `kl` of the packed from the
    exact, `kl_back` the other way, in nats, means; `top1` is how often the most similar one is the same.
    """
    exact = _log_softmax(images, texts, scale)
    again = [unpacked(packed(units, packing), packing) for units in (images, texts)]
    other = _log_softmax(again[0], again[1], scale)
    kl = [(np.exp(p) * (p - q)).sum(-1).mean() for p, q in zip(exact, other, strict=True)]
    back = [(np.exp(q) * (q - p)).sum(-1).mean() for p, q in zip(exact, other, strict=True)]
    same = [(p.argmax(-1) == q.argmax(-1)).mean() for p, q in zip(exact, other, strict=True)]
    return {"kl": float(np.mean(kl)), "kl_back": float(np.mean(back)), "top1": float(np.mean(same))}


def _log_softmax(images: np.ndarray, texts: np.ndarray, scale: float) -> list[np.ndarray]:
    """Of both directions, (n, n) float64 each."""
    similarities = scale * (images.astype(np.float64) @ texts.astype(np.float64).T)
    return [
        s - s.max(-1, keepdims=True) - np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True))
        for s in (similarities, similarities.T)
    ]
