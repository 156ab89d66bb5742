"""One sample of DataCompDR (MobileCLIP, arXiv 2311.17049; Apple's published tars): bytes to arrays, and back.

A sample is some files beside an image and its caption:

    paug.json      {"param_aug": A views}, a list, or a string of JSON that holds it; a view is
                   [[top, left, height, width], [[operation, magnitude] or null, ..]], in pixels of the original image
    syn.json       {"syn_text": captions}, and perhaps {"syn_text_TAG": captions}
    npz, pth.gz    float32 arrays, or a gzipped torch file of bfloat16 tensors: `image_emb` (A, D), and either
                   `text_emb` (1 + C, D), the original caption first, or `text_emb` (1, D) and `syn_text_emb` (C, D)

D are the teachers' widths one after the other, each part with unit norm. A translation is in pixels of a view of 224,
and here a share of the view's side; the other magnitudes are those of `data/augment.py`.
"""

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch

from reinforce.data import augment

VIEW_PX = 224
FILES = ("paug.json", "syn.json", "npz", "pth.gz")
SYNTHETIC = "syn_text"  # the caption list that is called `coca` here
Embeddings = Literal["fp32", "bf16"]


class NoRecord(Exception):
    """What a sample holds is no record of DataCompDR; the message says why."""


@dataclass(frozen=True)
class Record:
    """`params` (A, P) float32 as a store has them; `captions` by text set, without the original; `image` (A, D) and
    `texts` (C, D) by text set, `original` among them, bfloat16."""

    params: np.ndarray
    captions: dict[str, list[str]]
    image: np.ndarray
    texts: dict[str, np.ndarray]


def parse(parts: Mapping[str, bytes]) -> Record:
    """The files of a sample, by extension. Raises NoRecord where one is missing or cannot be read."""
    params = np.array([_params(view) for view in _views(_json(parts, "paug.json"))], np.float32)
    lists = _json(parts, "syn.json")
    captions = {_set_of(name): texts for name, texts in lists.items() if name.startswith(SYNTHETIC)}
    if not captions or not all(isinstance(t, list) and all(isinstance(c, str) for c in t) for t in captions.values()):
        raise NoRecord(f"syn.json has no lists of captions called {SYNTHETIC}")
    arrays = _arrays(parts)
    image, text = _array(arrays, "image_emb"), _array(arrays, "text_emb")
    if len(image) != len(params):
        raise NoRecord(f"{len(params)} views in paug.json and {len(image)} in image_emb")
    texts = {}
    for name, written in captions.items():
        if len(text) == 1:
            texts[name] = _array(arrays, f"{_key_of(name)}_emb")
        else:
            text, texts[name] = text[: -len(written)], text[-len(written) :]
        if len(texts[name]) != len(written):
            raise NoRecord(f"{len(written)} captions of {_key_of(name)} and {len(texts[name])} embeddings of them")
    return Record(params, captions, image, {"original": text} | texts)


def render(record: Record, embeddings: Embeddings = "fp32") -> dict[str, bytes]:
    """Its files, by extension. With one list of synthetic captions as the first release has them, else as the later."""
    [*names] = record.captions
    arrays = {"image_emb": record.image}
    if len(names) == 1:
        arrays["text_emb"] = np.concatenate([record.texts["original"], record.texts[names[0]]])
    else:
        arrays["text_emb"] = record.texts["original"]
        arrays |= {f"{_key_of(name)}_emb": record.texts[name] for name in names}
    views = [[[int(x) for x in row[:4]], _operations(row[4:])] for row in record.params]
    return {
        "paug.json": json.dumps({"param_aug": views}).encode(),
        "syn.json": json.dumps({_key_of(name): texts for name, texts in record.captions.items()}).encode(),
        **_written(arrays, embeddings),
    }


def _views(tree: dict[str, Any]) -> list[Any]:
    views = tree.get("param_aug")
    if isinstance(views, str):  # as the Hugging Face copy has it
        views = _loaded(views.encode(), "param_aug of paug.json")
    if not isinstance(views, list) or not views:
        raise NoRecord("paug.json has no views in param_aug")
    return views


def _params(view: Any) -> list[float]:
    try:
        (top, left, height, width), operations = view
        params = [float(top), float(left), float(height), float(width)]
        for operation in operations:
            op_id, magnitude = (0, 0.0) if operation is None else operation  # null: it was left out
            params += [float(op_id), _magnitude(int(op_id), float(magnitude), into_share=True)]
    except (TypeError, ValueError) as error:
        raise NoRecord(f"paug.json: {json.dumps(view)[:100]} is no view: {error}") from None
    return params


def _operations(params: np.ndarray) -> list[list[float]]:
    pairs = zip(params[::2].tolist(), params[1::2].tolist(), strict=True)
    return [[int(op_id), _magnitude(int(op_id), magnitude, into_share=False)] for op_id, magnitude in pairs]


def _magnitude(op_id: int, magnitude: float, into_share: bool) -> float:
    """Of a translation, pixels as a share of the view's side, or back. At torchvision's 31 levels to the last bit."""
    if not 0 <= op_id < len(augment.OPS):
        raise ValueError(f"there is no operation {op_id}")
    op = augment.OPS[op_id]
    if not op.name.startswith("Translate"):
        return magnitude
    pixels = augment.ramp(0.0, 150 / 331 * VIEW_PX)
    here, there = (pixels, op.levels) if into_share else (op.levels, pixels)
    nearest = int(np.abs(np.array(here) - abs(magnitude)).argmin())
    if abs(here[nearest] - abs(magnitude)) <= 1e-6 * here[-1]:
        return float(np.copysign(there[nearest], magnitude))
    return magnitude / VIEW_PX if into_share else magnitude * VIEW_PX


def _set_of(key: str) -> str:
    return "coca" if key == SYNTHETIC else key.removeprefix(f"{SYNTHETIC}_")


def _key_of(name: str) -> str:
    return SYNTHETIC if name == "coca" else f"{SYNTHETIC}_{name}"


def _json(parts: Mapping[str, bytes], extension: str) -> dict[str, Any]:
    if extension not in parts:
        raise NoRecord(f"has no {extension}, only {', '.join(sorted(parts)) or 'nothing'}")
    tree = _loaded(parts[extension], extension)
    if not isinstance(tree, dict):
        raise NoRecord(f"{extension} holds no object")
    return tree


def _loaded(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NoRecord(f"{where} is no JSON: {error}") from None


def _arrays(parts: Mapping[str, bytes]) -> Mapping[str, Any]:
    """Of both files the exact one, where both are there."""
    try:
        if "npz" in parts:
            return np.load(io.BytesIO(parts["npz"]), allow_pickle=False)  # type: ignore[no-any-return]
        if "pth.gz" in parts:
            found = torch.load(io.BytesIO(gzip.decompress(parts["pth.gz"])), map_location="cpu", weights_only=True)
            return found if isinstance(found, dict) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
        raise NoRecord(f"its embeddings cannot be read: {str(error).partition(chr(10))[0]}") from None
    raise NoRecord("has neither npz nor pth.gz")


def _array(arrays: Mapping[str, Any], name: str) -> np.ndarray:
    """(n, D) bfloat16, all finite."""
    try:
        found = arrays[name]
    except KeyError:
        raise NoRecord(f"its embeddings have no {name}, only {', '.join(arrays)}") from None
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise NoRecord(f"{name} cannot be read: {error}") from None
    whole = torch.as_tensor(np.asarray(found) if not isinstance(found, torch.Tensor) else found)
    if whole.ndim != 2 or not whole.is_floating_point() or not whole.isfinite().all():
        raise NoRecord(f"{name} is no matrix of finite numbers")
    return whole.to(torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _written(arrays: dict[str, np.ndarray], embeddings: Embeddings) -> dict[str, bytes]:
    file = io.BytesIO()
    if embeddings == "fp32":
        np.savez(file, **{name: array.astype(np.float32) for name, array in arrays.items()})  # type: ignore[arg-type]
        return {"npz": file.getvalue()}
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
        for name, array in arrays.items()
    }
    torch.save(tensors, file)
    return {"pth.gz": gzip.compress(file.getvalue(), mtime=0)}
