"""What the samples of a store are like: similarities, captions, sizes, and which of them are nearly the same."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from reinforce.check.info import none_whole
from reinforce.data.status import Status
from reinforce.store.columns import DIGEST, KEY, SIZE, STATUS, Column
from reinforce.store.store import Store

LOOKED_AT = 10_000  # samples, of shards from all over the store
VIEWS = 4  # of each sample, whose mean stands for the image
ALIKE = 0.95  # cosine between two images from which they are called near-duplicates
PAIRS = 24
BINS = 24
RARE = 0.002
_BLOCK = 1024  # rows


@dataclass(frozen=True)
class Survey:
    """n good samples of some shards. `captions`: all of each text set, n lists. `cosines`: (n,) of view 0 with caption
    0, by teacher and text set. `disagreement` (n,): how far apart the ranks are, 0 to 1, that two teachers give to a
    sample's similarity. `pairs`: near-duplicates, the same bytes first, as (row, row, cosine, whether the same bytes).
    `quarantined`: shard, row and status of the others."""

    shards: list[str]
    shard_of: list[str]
    rows: np.ndarray
    keys: list[str]
    sizes: np.ndarray
    captions: dict[str, list[list[str]]]
    cosines: dict[str, dict[str, np.ndarray]]
    disagreement: np.ndarray
    pairs: list[tuple[int, int, float, bool]]
    quarantined: list[tuple[str, int, Status]]

    def __len__(self) -> int:
        return len(self.keys)


def survey(store: Store, names: list[str]) -> Survey:
    """Of shards of these names, as many as hold LOOKED_AT samples. Raises StoreError where none is whole."""
    manifest = store.promised()
    recipe, columns = manifest.parsed_recipe(), manifest.columns()
    view_set = next(iter(recipe.view_sets))
    num_views = min(VIEWS, recipe.view_sets[view_set].num_views)
    parts: list[dict[str, Any]] = []
    quarantined: list[tuple[str, int, Status]] = []
    looked_at: list[str] = []
    for shard in _spread(names):
        if sum(len(part["rows"]) for part in parts) >= LOOKED_AT:
            break
        if store.missing(shard, columns):
            continue
        status = store.read(shard, STATUS)
        quarantined += [(shard, int(row), Status(int(status[row]))) for row in np.flatnonzero(status != Status.GOOD)]
        good = np.flatnonzero(status == Status.GOOD)
        looked_at.append(shard)
        if not len(good):
            continue
        part: dict[str, Any] = {
            "shard": [shard] * len(good),
            "rows": good,
            "keys": store.read(shard, KEY)[good].tolist(),
        }
        part["sizes"] = store.read(shard, SIZE)[good]
        part["digests"] = store.read(shard, DIGEST)[good] if manifest.format_version > 1 else good
        for name in recipe.text_sets:
            part[f"text {name}"] = store.read(shard, Column("text", name, "caption"))[:, good].T.tolist()
        for teacher in recipe.teachers:
            views = [
                store.read(shard, Column("view", view_set, teacher), index)[good].astype(np.float32)
                for index in range(num_views)
            ]
            part[f"mean {teacher}"] = np.mean(views, 0)
            for name in recipe.text_sets if teacher in recipe.text_teachers else ():
                texts = store.read(shard, Column("text", name, teacher), 0)[good].astype(np.float32)
                part[f"cosine {teacher} {name}"] = (views[0] * texts).sum(-1)
        parts.append(part)
    if not parts:
        raise none_whole(store, columns)

    def joined(name: str) -> Any:
        if isinstance(parts[0][name], list):
            return [item for part in parts for item in part[name]]
        return np.concatenate([part[name] for part in parts])

    cosines = {
        teacher: {name: joined(f"cosine {teacher} {name}") for name in recipe.text_sets}
        for teacher in recipe.text_teachers
    }
    return Survey(
        looked_at,
        joined("shard"),
        joined("rows"),
        joined("keys"),
        joined("sizes"),
        {name: joined(f"text {name}") for name in recipe.text_sets},
        cosines,
        _disagreement([next(iter(of.values())) for of in cosines.values() if of], len(joined("keys"))),
        _near(joined(f"mean {next(iter(recipe.teachers))}"), joined("digests")),
        quarantined,
    )


def charts(found: Survey) -> list[dict[str, Any]]:
    """Histograms: `title`, `unit`, `edges` (b + 1) and, of each series, `counts` (b)."""
    similarities = {
        f"{teacher}, {name}": values for teacher, of in found.cosines.items() for name, values in of.items()
    }
    words = {
        name: np.array([len(text.split()) for texts in of for text in texts]) for name, of in found.captions.items()
    }
    sides = {"images": found.sizes.min(1)}
    drawn = (
        ("Similarity of view 0 and caption 0", "cosine", similarities),
        ("Length of captions", "words", words),
        ("Shorter side of images", "pixels", sides),
    )
    return [_histogram(*of) for of in drawn if of[2]]


def _histogram(title: str, unit: str, series: dict[str, np.ndarray]) -> dict[str, Any]:
    values = np.concatenate([*series.values()])
    low, high = np.quantile(values, [RARE, 1 - RARE], method="nearest")
    series = {name: of.clip(low, high) for name, of in series.items()}  # the few beyond are in the outer bins
    values = values.clip(low, high)
    if values.dtype.kind == "i":  # of whole numbers each bin has as many
        step = -(-int(np.ptp(values) + 1) // BINS)
        edges = np.arange(values.min(), values.max() + step + 1, step)
    else:
        edges = np.histogram_bin_edges(values[np.isfinite(values)], BINS)
    counts = {name: np.histogram(of, edges)[0].tolist() for name, of in series.items()}
    return {"title": title, "unit": unit, "edges": [round(float(edge), 4) for edge in edges], "series": counts}


def _spread(names: list[str]) -> list[str]:
    """All, those first that lie evenly over the whole, then those between them: by their numbers, read backwards."""
    bits = max(1, (len(names) - 1).bit_length())
    return [name for _, name in sorted((int(f"{i:0{bits}b}"[::-1], 2), name) for i, name in enumerate(names))]


def _disagreement(cosines: list[np.ndarray], num: int) -> np.ndarray:
    if len(cosines) < 2:
        return np.zeros(num)
    ranks = np.stack([values.argsort().argsort() / max(1, num - 1) for values in cosines])
    apart: np.ndarray = ranks.max(0) - ranks.min(0)
    return apart


def _near(means: np.ndarray, digests: np.ndarray) -> list[tuple[int, int, float, bool]]:
    """The same bytes first, then what is alike."""
    units = means / np.linalg.norm(means, axis=-1, keepdims=True)
    order = np.argsort(digests, kind="stable")
    twice = np.flatnonzero(digests[order][1:] == digests[order][:-1])
    same = {(int(order[at]), int(order[at + 1])) for at in twice[:PAIRS]}
    found = [(i, j, float(units[i] @ units[j]), True) for i, j in sorted(same)]
    near: list[tuple[int, int, float, bool]] = []
    for start in range(0, len(units), _BLOCK):
        block = units[start : start + _BLOCK] @ units[start:].T
        above = np.argwhere(np.triu(block, 1) >= ALIKE)  # of each pair once
        cosines = block[above[:, 0], above[:, 1]]
        best = np.argsort(-cosines, kind="stable")[:PAIRS]
        for (i, j), cosine in zip((above[best] + start).tolist(), cosines[best].tolist(), strict=True):
            if digests[i] != digests[j]:
                near.append((i, j, cosine, False))
    return (found + sorted(near, key=lambda pair: -pair[2]))[:PAIRS]
