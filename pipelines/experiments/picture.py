"""A picture of one sample of a store: its image, its first views, its captions, and what each teacher thinks of them.

Command: python -m pipelines.experiments.picture --store stores/samples.zarr --shards 'samples/train/{00000..00003}.tar'
Result:  a PNG. The one in README is of the bundled samples, by `make picture`.

A number in the table is the cosine between a view and a caption, from the stored embeddings: no model is loaded. The
last row is a caption of another image. Letters are those of Pillow's own font: Latin ones.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reinforce.data import augment, images, shards
from reinforce.data.shards import Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError
from reinforce.store.store import Store
from reinforce.terminal import errors_as_sentences

NUM_VIEWS = 4
NUM_CAPTIONS = 3  # of a text set
SIDE = 224  # of the image and of each view, in pixels
GAP, MARGIN = 16, 32
CELL_WIDTH, ROW_HEIGHT = 74, 38
LABEL_WIDTH, TEXT_WIDTH = 152, 440  # of the table's first two columns; the second is at least so wide
INK, FAINT, PAPER, DARK = "#1f2933", "#6b7785", "#ffffff", (33, 102, 172)

_SMALL, _BODY, _TITLE = (ImageFont.load_default(size=size) for size in (17, 19, 24))


@dataclass(frozen=True)
class Caption:
    """A text with its text set, and by teacher its cosine with each view, (V,)."""

    text_set: str
    text: str
    cosines: dict[str, np.ndarray]


@dataclass(frozen=True)
class Shown:
    """One sample. `params` (V, P) are those of its first views."""

    name: str
    image: Image.Image
    params: np.ndarray
    captions: list[Caption]


def read(store: Store, listed: list[Shard], key: str | None) -> Shown:
    """The sample with this key, or the first good one. Raises ConfigError where there is none."""
    recipe = store.promised().parsed_recipe()
    for shard in listed:
        keys, status = store.read(shard.name, "key").tolist(), store.read(shard.name, "status")
        good = np.flatnonzero(status == Status.GOOD).tolist()
        row = next((row for row in good if key in (None, keys[row])), None)
        if row is None:
            continue
        view_set = next(iter(recipe.view_sets))
        num_views = min(NUM_VIEWS, recipe.view_sets[view_set].num_views)
        views = {
            teacher: _first(store, shard.name, f"view/{view_set}/{teacher}", num_views, row)
            for teacher in recipe.teachers
        }
        counts = {"original": min(1, recipe.num_original_captions)}
        counts |= {name: min(NUM_CAPTIONS, captioner.num_captions) for name, captioner in recipe.captioners.items()}
        captions = [
            _caption(store, shard.name, text_set, index, row, views)
            for text_set, num in counts.items()
            for index in range(num)
        ]
        other = good[(good.index(row) + len(good) // 2) % len(good)]
        first = next(text_set for text_set, num in counts.items() if num)
        of_another = _caption(store, shard.name, first, 0, other, views)
        captions.append(Caption("of another image", of_another.text, of_another.cosines))
        params = _first(store, shard.name, f"view/{view_set}/augment", num_views, row)
        image = next(s.image for s in shards.read(shard, files=None) if s.key == keys[row])
        return Shown(f"{shard.name} / {keys[row]}", images.decode(image), params, captions)
    raise ConfigError(f"none of these shards has a good sample {key or ''} in {store.url}; try info --quarantine")


def _first(store: Store, shard: str, column: str, num: int, row: int) -> np.ndarray:
    return np.stack([store.read(shard, column, index)[row] for index in range(num)]).astype(np.float32)


def _caption(store: Store, shard: str, text_set: str, index: int, row: int, views: dict[str, np.ndarray]) -> Caption:
    text = str(store.read(shard, f"text/{text_set}/caption", index)[row])
    embeddings = {name: store.read(shard, f"text/{text_set}/{name}", index)[row] for name in views}
    cosines = {name: views[name] @ embedding.astype(np.float32) for name, embedding in embeddings.items()}
    return Caption(text_set, text, cosines)


def draw(shown: Shown) -> Image.Image:
    """The picture: image and views above, captions and cosines below."""
    num_views, teachers = len(shown.params), list(shown.captions[0].cosines)
    block = num_views * CELL_WIDTH
    of_images = (1 + NUM_VIEWS) * SIDE + (NUM_VIEWS + 2) * GAP
    width = 2 * MARGIN + max(of_images, LABEL_WIDTH + TEXT_WIDTH + len(teachers) * (block + GAP))
    top_of_table = 424
    height = top_of_table + 68 + ROW_HEIGHT * len(shown.captions) + 62
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 24), "One sample of a reinforced dataset", INK, _TITLE)
    pen.text((width - MARGIN, 28), shown.name, FAINT, _SMALL, anchor="ra")
    _draw_images(page, pen, shown)
    lefts = [width - MARGIN - (len(teachers) - i) * block - (len(teachers) - 1 - i) * GAP for i in range(len(teachers))]
    pen.text((MARGIN, top_of_table + 32), "captions", INK, _BODY)
    for teacher, left in zip(teachers, lefts, strict=True):
        values = np.stack([caption.cosines[teacher] for caption in shown.captions])
        pen.text((left + block / 2, top_of_table), f"teacher {teacher}", INK, _BODY, anchor="ma")
        _draw_cosines(pen, values, left, top_of_table + 30)
    for i, caption in enumerate(shown.captions):
        middle = top_of_table + 68 + ROW_HEIGHT * i + ROW_HEIGHT / 2
        label_end = MARGIN + LABEL_WIDTH
        pen.text((MARGIN, middle), caption.text_set, FAINT, _SMALL, anchor="lm")
        pen.text((label_end, middle), _cut(caption.text, lefts[0] - GAP - label_end), INK, _BODY, anchor="lm")
    note = "Numbers: cosine between a view and a caption, from the stored embeddings. Darker is more alike."
    pen.text((MARGIN, height - 44), note, FAINT, _SMALL)
    return page


def _draw_images(page: Image.Image, pen: ImageDraw.ImageDraw, shown: Shown) -> None:
    image, top = shown.image, 104
    whole = image.copy()
    whole.thumbnail((SIDE, SIDE))
    if max(image.size) < SIDE:
        whole = image.resize([round(side * SIDE / max(image.size)) for side in image.size], Image.Resampling.BICUBIC)
    tiles = [("image", whole, [f"{image.width} x {image.height} pixels"])]
    for index, params in enumerate(shown.params):
        view = augment.replay(image, params, (image.height, image.width), SIDE)
        tiles.append((f"view {index}", Image.fromarray(view), list(_told(params))))
    for i, (name, tile, lines) in enumerate(tiles):
        left = MARGIN + i * (SIDE + GAP) + (2 * GAP if i else 0)
        pen.text((left, top - 28), name, INK, _BODY)
        page.paste(tile, (left, top))
        pen.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline="#cbd2d9")
        for line, text in enumerate(lines):
            pen.text((left, top + SIDE + 6 + 20 * line), text, FAINT, _SMALL)


def _told(params: np.ndarray) -> Iterator[str]:
    """The parameters of a view in words, a line for each step."""
    _, _, height, width = params[:4]
    yield f"crop of {width:.0f} x {height:.0f}"
    for op_id, magnitude in params[4:].reshape(-1, 2):
        op = augment.OPS[int(op_id)]
        yield op.name if op.unit == "none" else f"{op.name} {magnitude:.3g}"


def _draw_cosines(pen: ImageDraw.ImageDraw, values: np.ndarray, left: float, top: float) -> None:
    """A row for each caption, a column for each view. Shades go from the teacher's least value to its greatest."""
    low, high = float(values.min()), float(values.max())
    for column in range(values.shape[1]):
        x = left + (column + 0.5) * CELL_WIDTH
        pen.text((x, top + 4), f"view {column}", FAINT, _SMALL, anchor="ma")
    for (row, column), value in np.ndenumerate(values):
        share = (float(value) - low) / ((high - low) or 1.0)
        x, y = left + column * CELL_WIDTH, top + 38 + row * ROW_HEIGHT
        shade = tuple(round(255 + share * (dark - 255)) for dark in DARK)
        pen.rectangle((x + 1, y + 1, x + CELL_WIDTH - 2, y + ROW_HEIGHT - 2), fill=shade)
        text = INK if share < 0.55 else PAPER
        pen.text((x + CELL_WIDTH / 2, y + ROW_HEIGHT / 2), f"{value:.2f}", text, _BODY, anchor="mm")


def _cut(text: str, width: float) -> str:
    """As much of a text as fits, with dots where it does not."""
    if _BODY.getlength(text) <= width:
        return text
    while text and _BODY.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.experiments.picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", required=True, help="local path or fsspec URL of the store")
    parser.add_argument("--shards", required=True, help="the tars it was made from")
    parser.add_argument("--key", help="key of the sample; the first good one, if none")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="the PNG that is written")
    options = parser.parse_args(argv)
    picture = draw(read(Store(options.store), shards.expand(options.shards), options.key))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(options.out, optimize=True)
    print(f"{options.out}: {picture.width} x {picture.height} pixels, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    with errors_as_sentences():
        main()
