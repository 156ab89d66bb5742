"""What clip-retrieval computed becomes a store: of each image one view, the whole of it, and the caption beside it.

    img_emb/img_emb_0.npy         (N, D) float16, unit norm
    text_emb/text_emb_0.npy       (N, D) float16, of the captions
    metadata/metadata_0.parquet   N rows in that order: `image_path`, which is the key in a tar or a path, and `caption`

and so on with 1, 2, ..: the folder that `clip-retrieval inference` writes, whose parts are not those of the tars.

Its models saw the middle of each image, resized: the view that a view set of scale 1 and ratio 1 without operations
draws. They resized first and cut then, which differs by what lies beyond the edge, and by less than a pixel.
"""

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np

from reinforce.config import ORIGINAL, Recipe, ViewSet, parse
from reinforce.data import augment, shards
from reinforce.data.shards import Sample
from reinforce.errors import ConfigError, MissingExtra
from reinforce.exchange.datacompdr import Record
from reinforce.exchange.imported import Source, write_records
from reinforce.run.reports import RunReport

VIEWS = ViewSet(num_views=1, scale=(1, 1), ratio=(1, 1), num_ops=0)
LOGIT_SCALE = 100.0  # of OpenAI's and most of open_clip's models


def import_clip_retrieval(
    folder: Path,
    images: str,
    store_url: str,
    clip_model: str,
    teacher: str = "clip",
    logit_scale: float = LOGIT_SCALE,
    max_invalid: float = 0.1,
) -> RunReport:
    """Write what lies in `folder` into a store, beside the tars `images` that it was computed from. A row belongs to
    the image of its key whose first caption it has; keys have to be unique over all tars.

    `clip_model`: as clip-retrieval was told it, `ViT-B/32` or `open_clip:ViT-B-32/laion2b_s34b_b79k`; `teacher`: what
    it is called here. Raises ConfigError and ManifestMismatch before any work; shards that fail are in the report.
    """
    listed = shards.expand(images)
    model, pretrained = _model(clip_model)
    asked = {
        "name": "clip_retrieval",
        "teachers": {teacher: {"model": model, "pretrained": pretrained}},
        "view_sets": {"base": VIEWS},
        "captioners": {},
    }
    recipe = parse(Recipe, asked, "the request")
    with tempfile.TemporaryDirectory() as scratch, closing(sqlite3.connect(Path(scratch) / "rows.db")) as rows:
        found = _Embedded(folder, rows)
        source = Source(lambda _: found.record, "clip-retrieval has nothing of this key and caption", measured=False)
        return write_records(source, listed, store_url, recipe, {teacher: found.width}, logit_scale, max_invalid)


def _model(told: str) -> tuple[str, str | None]:
    """open_clip's name and weights of what clip-retrieval calls a model. A bare name is one of OpenAI's."""
    kind, colon, rest = told.partition(":")
    if not colon:
        return f"{told.replace('/', '-').replace('@336px', '-336')}-quickgelu", "openai"
    name, _, weights = rest.partition("/")
    return (name, weights or None) if kind == "open_clip" else (told, None)


class _Embedded:
    """The rows of a folder by key. A database, since there may be more than memory holds."""

    def __init__(self, folder: Path, rows: sqlite3.Connection) -> None:
        """Raises ConfigError where the folder is not whole, MissingExtra."""
        self.rows = rows
        self.images: list[np.ndarray] = []
        self.texts: list[np.ndarray] = []
        rows.execute("CREATE TABLE found (key PRIMARY KEY, part, row, caption, times DEFAULT 1) WITHOUT ROWID")
        tables = sorted((folder / "metadata").glob("metadata_*.parquet"))
        if not tables:
            raise ConfigError(f"{folder}/metadata has no metadata_*.parquet; give the folder that clip-retrieval wrote")
        for part, table in enumerate(tables):
            number = table.stem.removeprefix("metadata_")
            self.images.append(_array(folder / f"img_emb/img_emb_{number}.npy", "--enable_image True"))
            self.texts.append(_array(folder / f"text_emb/text_emb_{number}.npy", "--enable_text True"))
            told = _rows(table)
            rows.executemany(
                "INSERT INTO found (key, part, row, caption) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET times = times + 1",
                ((_key(path), part, row, " ".join(caption.split())) for row, (path, caption) in enumerate(told)),
            )
            shapes = {(len(told), self.images[0].shape[1]), self.images[-1].shape, self.texts[-1].shape}
            if len(shapes) > 1:
                raise ConfigError(
                    f"{table} has {len(told)} rows, img_emb {self.images[-1].shape} and text_emb "
                    f"{self.texts[-1].shape}: they do not belong together, or are of models of another width"
                )

    @property
    def width(self) -> int:
        return int(self.images[0].shape[1])

    def record(self, sample: Sample, size: tuple[int, int]) -> Record | None:
        """What is known of an image, with the view of it. None where its key is not there or comes twice, its caption
        was another, or its embeddings are no directions."""
        found = self.rows.execute("SELECT part, row, caption, times FROM found WHERE key = ?", (sample.key,)).fetchone()
        if found is None or found[2:] != (sample.captions[0], 1):
            return None
        part, row = found[:2]
        both = np.stack([self.images[part][row], self.texts[part][row]]).astype(np.float32)
        norms = np.linalg.norm(both, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            return None
        image, text = (both / norms).astype(ml_dtypes.bfloat16)
        params = augment.draw(VIEWS, 0, "base", sample.key, 0, size)
        return Record(params[None], {}, image[None], {ORIGINAL: text[None]})


def _array(path: Path, option: str) -> np.ndarray:
    """(N, D), read from the disk as it is asked for."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; clip-retrieval inference writes it with {option}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ConfigError(f"{path} holds {array.dtype} of shape {array.shape}, which are no embeddings")
    return array


def _key(path: str) -> str:
    """Of a path of a picture its name without the extension, as img2dataset and webdataset call it; else as it is."""
    name = PurePosixPath(path)
    return name.stem if name.suffix.lower().lstrip(".") in shards.IMAGES else path


def _rows(table: Path) -> list[tuple[str, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra(f"{table}: reading parquet needs pyarrow: pip install 'clip-reinforce[parquet]'") from None
    try:
        found = parquet.read_table(table, columns=["image_path", "caption"]).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{table} cannot be read: {error}") from None
    if found.keys() != {"image_path", "caption"}:
        raise ConfigError(f"{table} has no columns image_path and caption; embed images and captions together")
    return list(zip(map(str, found["image_path"]), map(str, found["caption"]), strict=True))
