"""Captions that were written elsewhere become a text set of a store; and what writing them needs goes out.

A file is JSON lines, gzipped or not, or parquet. A row has `key`, perhaps `shard`, and one text or a list of them in
`caption`, `captions`, `text` or `texts`. Rows come in any order, and several rows of one key add up.
"""

import gzip
import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reinforce.config import ORIGINAL, Recipe, RunOptions, Texts, parse
from reinforce.data import shards
from reinforce.data.status import Status
from reinforce.errors import ConfigError, MissingExtra
from reinforce.progress import Progress
from reinforce.run import driver
from reinforce.run.reports import RunReport
from reinforce.store.columns import KEY, PLACE, STATUS, Column
from reinforce.store.store import Store

TEXTS = ("caption", "captions", "text", "texts")
_TOO_MANY = 64  # captions of one image: a file whose keys are not unique over the shards, most likely


@dataclass
class CaptionReport:
    """`without_caption`: good samples that the file says nothing of; they have their own caption, or an empty text.
    `without_image`: keys of the file that no sample of the store has. `unfinished`: shards whose samples are not known
    yet, which a run and another import settle."""

    store: str
    text_set: str
    num_captions: int
    shards: int
    samples: int = 0
    without_caption: int = 0
    without_image: int = 0
    unfinished: int = 0


@dataclass(frozen=True)
class CaptionFile:
    """The captions of a file, in a database, since they may be more than memory holds. `most`: of one key."""

    path: Path
    sha256: str
    found: sqlite3.Connection
    most: int

    def texts(self, num: int | None = None, source: str = "") -> Texts:
        """What a recipe says of them."""
        return parse(Texts, {"num_captions": num or self.most, "source": source, "sha256": self.sha256}, str(self.path))

    def of(self, key: str, shard: str) -> tuple[str, list[str]] | None:
        """The captions of a sample, after the shard that their row names, if any."""
        told = self.found.execute(
            "SELECT shard, texts FROM captions WHERE key = ? AND shard IN (?, '') ORDER BY shard DESC LIMIT 1",
            (key, shard),
        ).fetchone()
        return (told[0], json.loads(told[1])) if told else None


@contextmanager
def opened(path: Path) -> Iterator[CaptionFile]:
    """Raises ConfigError where a file cannot be read as one of captions."""
    with tempfile.TemporaryDirectory() as folder, closing(sqlite3.connect(Path(folder) / "captions.db")) as found:
        yield CaptionFile(path, _sha256(path), found, _fill(found, path))


def import_captions(path: Path, store_url: str, name: str, num: int | None = None, source: str = "") -> CaptionReport:
    """Write the captions of a file as the text set `name`, `num` for each image: by default as many as the image with
    most of them has. Where there are fewer they are repeated. `source` says who wrote them.

    Raises ConfigError where the file cannot be read as such or knows no sample of the store, the name is taken or the
    store's teachers are not at hand.
    """
    store = Store(store_url)
    manifest = store.promised()
    recipe = manifest.parsed_recipe()
    if name in recipe.text_sets and name not in recipe.texts:
        raise ConfigError(f"{store_url} has a text set '{name}' already; give another --name")
    if absent := [of for of, facts in manifest.models["teachers"].items() if facts.get("weights") == "imported"]:
        raise ConfigError(
            f"{store_url} holds what teacher '{absent[0]}' said elsewhere, and its weights are not known: it cannot "
            "embed these captions; `run` makes a store whose teachers can"
        )
    with opened(path) as file:
        _check_name(recipe, name, file.texts(num, source), store_url)
        return _write(file, store, name, file.texts(num, source))


def run_with_captions(
    patterns: str, store_url: str, recipe: Recipe, files: dict[str, Path], options: RunOptions
) -> tuple[RunReport, list[CaptionReport]]:
    """Reinforce, import the captions of each file as the text set of its name, and have the teachers embed them: `run`,
    `import captions` and `extend` one after the other. What is there already is not done again.

    Raises what they raise; of the files, and of what the store promises otherwise, before any work.
    """
    with ExitStack() as stack:
        captions = {name: stack.enter_context(opened(path)) for name, path in files.items()}
        manifest = Store(store_url).manifest()
        promised = manifest.parsed_recipe().texts if manifest else {}
        texts = {
            name: there if (there := promised.get(name)) and there.sha256 == file.sha256 else file.texts()
            for name, file in captions.items()
        }
        for name, of_file in texts.items():
            _check_name(recipe.but(texts=promised), name, of_file, store_url)
        whole = recipe.but(texts={**promised, **texts})
        if manifest:
            manifest.check_recipe(whole, store_url, extend=True)
        first = driver.run(patterns, store_url, recipe.but(texts=promised), options)
        if not first.done + first.already_there:
            return first, []
        told = [_write(file, Store(store_url), name, texts[name]) for name, file in captions.items()]
        last = driver.run(patterns, store_url, whole, options.but(extend=True))
    report = first if first.done else last
    seconds, lost = first.seconds + last.seconds, last.embedding_loss | first.embedding_loss
    return replace(report, failed=last.failed, seconds=seconds, embedding_loss=lost), told


def _check_name(recipe: Recipe, name: str, texts: Texts, where: str) -> None:
    """Raises ConfigError where other captions were imported under this name."""
    there = recipe.texts.get(name, texts)
    if there.sha256 != texts.sha256:
        raise ConfigError(f"{where} has captions '{name}' already, imported from another file; give another --name")
    if there != texts:
        raise ConfigError(
            f"{where} has captions '{name}' of this file already, imported with --num-captions {there.num_captions} "
            f"--source '{there.source}'; give these again, or another --name"
        )


def _check_keys(file: CaptionFile, store: Store) -> None:
    """Raises ConfigError where the file has captions of no sample that is known: its name would be taken for good."""
    example = ""
    for shard in _known(store):
        keys, status = store.read(shard, KEY), store.read(shard, STATUS)
        for key in keys[status == Status.GOOD].tolist():
            if file.of(key, shard):
                return
            example = f"'{key}' in shard '{shard}'"
    if example:
        key, of_shard = file.found.execute("SELECT key, shard FROM captions LIMIT 1").fetchone()
        its = f"'{key}'" + (f" in shard '{of_shard}'" if of_shard else "")
        raise ConfigError(
            f"{file.path} has captions of no image in {store.url}, and none were imported: a key there is {its}, and "
            f"one in the store {example}; `export keys` writes the keys that are meant"
        )


def _known(store: Store) -> list[str]:
    """The shards whose samples are known."""
    return [shard for shard in store.shards() if store.has(shard, KEY) and store.has(shard, STATUS)]


def _write(file: CaptionFile, store: Store, name: str, texts: Texts) -> CaptionReport:
    manifest = store.promised()
    recipe = manifest.parsed_recipe()
    if name not in recipe.texts:
        _check_keys(file, store)
    grown = recipe.but(texts=recipe.texts | {name: texts}).model_dump(mode="json")
    store.promise(replace(manifest, recipe=grown), True)
    num_shards, known = len(store.shards()), _known(store)
    report = CaptionReport(store.url, name, texts.num_captions, num_shards, unfinished=num_shards - len(known))
    with Progress(len(known), "shard") as progress:
        for shard in known:
            _import(store, shard, Column("text", name, "caption"), texts.num_captions, file, report)
            progress.add()
    store.objects.sweep()
    report.without_image = file.found.execute("SELECT COUNT(*) FROM captions WHERE NOT seen").fetchone()[0]
    return report


def export_keys(store_url: str, patterns: str) -> Iterator[dict[str, Any]]:
    """Of every good sample of the shards: shard, key, its own caption where there is one, and where the bytes of its
    image lie: `tar`, `offset` and `length`."""
    store = Store(store_url)
    recipe = store.promised().parsed_recipe()
    there = set(store.shards())
    for shard in shards.expand(patterns):
        if shard.name not in there:
            raise ConfigError(f"{store_url} has no shard {shard.name}; give the tars that it was made from")
        keys, status = store.read(shard.name, KEY), store.read(shard.name, STATUS)
        places = store.read(shard.name, PLACE)
        own = store.read(shard.name, Column("text", ORIGINAL, "caption"), 0) if recipe.num_original_captions else None
        for row in np.flatnonzero(status == Status.GOOD).tolist():
            offset, length = places[row].tolist()
            told = {"shard": shard.name, "key": keys[row], "tar": shard.url, "offset": offset, "length": length}
            yield told | ({"caption": own[row]} if own is not None else {})


def _import(store: Store, shard: str, column: Column, num: int, file: CaptionFile, report: CaptionReport) -> None:
    keys, good = store.read(shard, KEY).tolist(), store.read(shard, STATUS) == Status.GOOD
    original = Column("text", ORIGINAL, "caption")
    own = store.read(shard, original, 0).tolist() if store.has(shard, original) else [""] * len(keys)
    array = np.full((num, len(keys)), "", dtype=object)
    for row in np.flatnonzero(good).tolist():
        told = file.of(keys[row], shard)
        texts = told[1] if told else [own[row]]
        array[:, row] = [texts[i % len(texts)] for i in range(num)]
        report.samples += 1
        report.without_caption += told is None
        if told:
            file.found.execute("UPDATE captions SET seen = 1 WHERE key = ? AND shard = ?", (keys[row], told[0]))
    if not store.has(shard, column):
        store.commit(shard, column, array, store.identity(shard) or "")


def _fill(found: sqlite3.Connection, path: Path) -> int:
    """Gives how many captions the key with most of them has."""
    found.execute("CREATE TABLE captions (key, shard, texts, seen DEFAULT 0, PRIMARY KEY (key, shard)) WITHOUT ROWID")
    most = 0
    for number, row in enumerate(_rows(path), 1):
        key, shard, texts = _row(row, f"{path}, row {number}")
        before = found.execute("SELECT texts FROM captions WHERE key = ? AND shard = ?", (key, shard)).fetchone()
        texts = list(dict.fromkeys([*(json.loads(before[0]) if before else ()), *texts]))
        if len(texts) > _TOO_MANY:
            raise ConfigError(
                f"{path}: '{key}' has more than {_TOO_MANY} captions; if keys come again in other shards, say which: "
                "add `shard` to each row"
            )
        if texts:
            found.execute("REPLACE INTO captions (key, shard, texts) VALUES (?, ?, ?)", (key, shard, json.dumps(texts)))
        most = max(most, len(texts))
    if not most:
        raise ConfigError(f"{path} holds no captions")
    return most


def _row(row: Any, where: str) -> tuple[str, str, list[str]]:
    """Key, shard or nothing, and texts, runs of white space as one space, the empty ones left out."""
    name = next((name for name in TEXTS if isinstance(row, dict) and row.get(name) is not None), None)
    if name is None or not isinstance(row.get("key"), str) or not isinstance(row.get("shard") or "", str):
        raise ConfigError(f"{where} has no `key` with one of {', '.join(TEXTS)}: {str(row)[:200]}")
    texts = row[name] if isinstance(row[name], list) else [row[name]]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise ConfigError(f"{where}: `{name}` holds something that is no text: {str(row)[:200]}")
    try:
        "".join([row["key"], row.get("shard") or "", *texts]).encode()  # as data/captions.py asks of those in tars
    except UnicodeEncodeError:
        raise ConfigError(
            f"{where} holds half a character (of an emoji cut in two, say), which no store can hold: {row!a:.200}"
        ) from None
    return row["key"], row.get("shard") or "", [plain for text in texts if (plain := " ".join(text.split()))]


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _rows_of_parquet(path)
        return
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".ndjson")):
        raise ConfigError(f"{path}: captions come in .jsonl, .jsonl.gz or .parquet")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}, is no JSON: {error}") from None


def _rows_of_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra(f"{path}: reading parquet needs pyarrow: pip install 'clip-reinforce[parquet]'") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
