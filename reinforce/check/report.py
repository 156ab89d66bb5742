"""A store as one page that opens in any browser, without a network: its samples, what teachers say of them, numbers.

The page is report.html with facts in it (page.py).
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reinforce import page
from reinforce.check import info
from reinforce.check.survey import Survey, charts, survey
from reinforce.config import Recipe
from reinforce.data import augment, draws, images, shards
from reinforce.data.shards import Sample, Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, ReplayError, SampleError
from reinforce.store.columns import Column
from reinforce.store.store import Store

TEMPLATE = Path(__file__).with_name("report.html")
VIEWS = 4
CAPTIONS = 5  # of a text set
SIDE, VIEW_SIDE = 256, 112  # of pictures in the page, in pixels
QUALITY = 72
SET_ASIDE = 12  # of each reason


@dataclass(frozen=True)
class ReportReport:
    """`samples` are shown, `looked_at` are counted in the page's distributions."""

    file: str
    bytes: int
    samples: int
    looked_at: int


def report(url: str, patterns: str | None, out: str, num: int = 60, seed: int = 0) -> ReportReport:
    """Write the page. `patterns`: the tars; without them it has no pictures. Of `num` samples a third at most are
    those that teachers disagree about most, a third near-duplicates, and the others are drawn by `seed`.

    Raises ConfigError where the page cannot be written or the tars are not the store's, StoreError.
    """
    store = Store(url)
    recipe = store.promised().parsed_recipe()
    listed = {shard.name: shard for shard in shards.expand(patterns)} if patterns else {}
    names = [name for name in store.shards() if not listed or name in listed]
    if not names:
        raise ConfigError(f"{url} has none of these shards; give the tars that it was made from")
    found = survey(store, names)
    reasons = _chosen(found, num, seed)
    samples = {index: _told(store, recipe, found, index, why) for index, why in reasons.items()}
    aside = _set_aside(found)
    for shard in {found.shard_of[index] for index in samples} | {shard for shard, _ in aside}:
        if shard in listed:
            _draw(listed[shard], recipe, samples, aside)
    order = list(samples)
    facts = {
        "store": url,
        "info": info.info(url),
        "recipe": recipe.model_dump(mode="json"),
        "looked_at": {"samples": len(found), "shards": len(found.shards)},
        "charts": charts(found),
        "teachers": recipe.text_teachers,
        "text_sets": list(recipe.text_sets),
        "samples": [{k: v for k, v in sample.items() if k != "params"} for sample in samples.values()],
        "pairs": [
            {"samples": [order.index(i), order.index(j)], "cosine": round(cosine, 4), "same_bytes": same}
            for i, j, cosine, same in found.pairs
            if i in samples and j in samples
        ],
        "quarantine": list(aside.values()),
    }
    size = page.write(out, TEMPLATE, facts)
    return ReportReport(out, size, len(samples), len(found))


def _chosen(found: Survey, num: int, seed: int) -> dict[int, list[str]]:
    """Rows of the survey with the reasons to show them."""
    reasons: dict[int, list[str]] = {}
    if found.disagreement.any():
        for index in np.argsort(-found.disagreement, kind="stable")[: num // 3].tolist():
            reasons.setdefault(index, []).append("disagreement")
    for i, j, *_ in found.pairs[: num // 6]:
        for index in (i, j):
            reasons.setdefault(index, []).append("near-duplicate")
    for index in np.argsort(draws.uniforms(seed, "report", "samples", 0, len(found)), kind="stable").tolist():
        if len(reasons) >= num:
            break
        reasons.setdefault(index, []).append("at random")
    return reasons


def _told(store: Store, recipe: Recipe, found: Survey, index: int, why: list[str]) -> dict[str, Any]:
    """All that the store says of a sample; pictures come later."""
    shard, row = found.shard_of[index], int(found.rows[index])
    name, view_set = next(iter(recipe.view_sets.items()))
    params = [
        store.read(shard, Column("view", name, "augment"), number)[row]
        for number in range(min(VIEWS, view_set.num_views))
    ]
    height, width = found.sizes[index].tolist()
    return {
        "shard": shard,
        "key": found.keys[index],
        "row": row,
        "size": [height, width],
        "why": why,
        "image": None,
        "params": params,
        "views": [_view(of, height, width) for of in params],
        "captions": {text_set: of[index][:CAPTIONS] for text_set, of in found.captions.items()},
        "cosines": {
            teacher: {text_set: round(float(values[index]), 3) for text_set, values in of.items()}
            for teacher, of in found.cosines.items()
        },
        "disagreement": round(float(found.disagreement[index]), 3),
    }


def _view(params: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """The crop as shares of the image, and the operations in words."""
    top, left, crop_height, crop_width, *ops = params.tolist()
    said = []
    for op_id, magnitude in zip(ops[::2], ops[1::2], strict=True):
        op = augment.OPS[int(op_id)]
        said.append(op.name if op.unit == "none" else f"{op.name} {magnitude:.3g} ({op.unit})")
    box = [left / width, top / height, crop_width / width, crop_height / height]
    return {"box": [round(share, 4) for share in box], "ops": said, "image": None}


def _set_aside(found: Survey) -> dict[tuple[str, int], dict[str, Any]]:
    """Some samples in quarantine of each reason, by shard and row."""
    kept: dict[Status, int] = {}
    aside: dict[tuple[str, int], dict[str, Any]] = {}
    for shard, row, status in found.quarantined:
        kept[status] = kept.get(status, 0) + 1
        if kept[status] <= SET_ASIDE:
            aside[shard, row] = {
                "shard": shard,
                "row": row,
                "reason": status.reason,
                "key": "",
                "detail": "",
                "image": None,
            }
    return aside


def _draw(
    shard: Shard, recipe: Recipe, samples: dict[int, dict[str, Any]], aside: dict[tuple[str, int], dict[str, Any]]
) -> None:
    """Put the pictures of what is shown of one tar into it."""
    wanted = {sample["row"]: sample for sample in samples.values() if sample["shard"] == shard.name}
    for row, sample in enumerate(shards.read(shard, recipe.caption_files)):
        if row in wanted:
            _draw_sample(shard, sample, wanted[row])
        if told := aside.get((shard.name, row)):
            told |= {"key": sample.key, "detail": sample.detail}
            try:
                if sample.image:
                    told["image"] = _uri(images.decode(sample.image), SIDE)
            except SampleError as error:
                told["detail"] = str(error)


def _draw_sample(shard: Shard, sample: Sample, told: dict[str, Any]) -> None:
    try:
        picture = images.decode(sample.image)
        for view, params in zip(told["views"], told["params"], strict=True):
            pixels = augment.replay(picture, params, tuple(told["size"]), VIEW_SIDE)
            view["image"] = _uri(Image.fromarray(pixels), VIEW_SIDE)
    except (SampleError, ReplayError) as error:
        raise ConfigError(
            f"{shard.url}: row {told['row']} is not the image that was reinforced: {error}; give the tars that the "
            "store was made from"
        ) from error
    told["image"] = _uri(picture, SIDE)


def _uri(picture: Image.Image, side: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
