"""A folder of pictures, or a table of their paths and captions, becomes shards."""

import csv
import io
import json
import os
import posixpath
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path

import fsspec

from reinforce.data import captions, shards
from reinforce.data.grouping import is_hidden
from reinforce.data.notes import Notes
from reinforce.data.remote import as_os_errors
from reinforce.errors import ConfigError, MissingExtra
from reinforce.exchange.place import check_empty
from reinforce.progress import Progress

TABLES = (".csv", ".tsv", ".parquet")
_BESIDE = (*captions.EXTENSIONS, captions.LABEL)  # of a folder: what goes with the picture of its name
# Columns that are looked for where none is named; the last of each kind are those of open_clip's own tables.
IMAGE_COLUMNS = ("path", "image_path", "file_name", "filename", "image", "filepath")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")


@dataclass
class PackReport:
    """`noted` counts what was not packed, or lacks something, by kind (data/notes.py); `first` says of each kind where
    it came first, and what to do."""

    out: str
    shards: int = 0
    samples: int = 0
    noted: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Picture:
    """One that is to be packed: its path as it is told, where it lies, its captions, and the files that go with it."""

    name: str
    url: str
    captions: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()  # extension and path


def pack(
    source: Path,
    out: Path,
    samples_per_shard: int = 10_000,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> PackReport:
    """Write `out`/00000.tar, .. from the pictures in the folder `source` and in the folders in it, in the order of
    their paths, each with the .txt, .json and .cls of its name; or from those that a table names, in its order, rows
    of one path together. Keys are the paths without extension, other dots as '_'. The same input gives the same bytes.

    The names of all pictures (and the captions of a table) are held in memory, and one picture at a time. Nothing is
    seen of `out` before all of it is written. Raises ConfigError where there is nothing to pack, or something in `out`.
    """
    check_empty(out)
    notes = Notes()
    if source.is_dir():
        pictures = _of_folder(source, notes)
    elif source.suffix.lower() in TABLES:
        pictures = _of_table(source, image_column, caption_column, notes)
    else:
        raise ConfigError(f"{source} is neither a folder nor a table ({', '.join(TABLES)}); check the path")
    report, partial = PackReport(str(out)), out.with_name(f"{out.name}.partial")
    if partial.exists():  # of one that was killed
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        with Progress(len(pictures), "picture") as progress:
            samples = _samples(pictures, notes, progress)
            for number in count():
                first = list(islice(samples, 1))
                if not first:
                    break
                some = chain(first, islice(samples, samples_per_shard - 1))
                report.samples += _written(partial / f"{number:05d}.tar", some)
                report.shards += 1
        report.noted, report.first = dict(sorted(notes.counts.items())), notes.first
        if not report.samples:
            raise ConfigError(f"{source}: there is no picture to pack: {'; '.join(notes.told()) or 'it is empty'}")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _written(path: Path, samples: Iterator[tuple[str, dict[str, bytes]]]) -> int:
    """How many samples went into the tar."""
    num = 0

    def counted() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal num
        for sample in samples:
            num += 1
            yield sample

    shards.write(str(path), counted())
    return num


def _samples(pictures: list[_Picture], notes: Notes, progress: Progress) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and bytes of those that can be read. What is in the bytes is for the run to judge."""
    seen: set[str] = set()
    for picture in pictures:
        progress.add()
        stem, _, extension = picture.name.rpartition(".")
        if is_hidden(picture.name):
            notes.add("hidden", picture.name)
        elif not stem or "/" in extension:
            notes.add("no_extension", picture.name)
        elif extension.lower() not in shards.IMAGES:
            known = extension.lower() in shards.OTHER_IMAGES
            notes.add("other_format" if known else "unused_extension", picture.name)
        else:
            try:
                parts = {extension.lower(): _bytes(picture.url)}
                parts |= {of: _bytes(path) for of, path in picture.beside}
            except (OSError, ValueError, ImportError) as error:
                notes.add("missing_file", f"{picture.name} ({error})")
                continue
            if len(picture.captions) == 1:
                parts["txt"] = picture.captions[0].encode()
            elif picture.captions:
                parts["json"] = json.dumps({"captions": picture.captions}, ensure_ascii=False).encode()
            if not parts.keys() & {*captions.EXTENSIONS}:
                notes.add("no_caption", picture.name)
            yield _key(stem, seen), parts


def _key(stem: str, seen: set[str]) -> str:
    """One that no other has, and that a tar gives back as it is: without a dot in its last part."""
    folder, slash, base = stem.rpartition("/")
    plain = folder + slash + base.replace(".", "_")
    key = next(key for key in chain([plain], (f"{plain}-{n}" for n in count(2))) if key not in seen)
    seen.add(key)
    return key


@as_os_errors()
def _bytes(url: str) -> bytes:
    if "://" not in url:
        return Path(url).read_bytes()
    with fsspec.open(url, "rb") as file:
        data: bytes = file.read()
    return data


# -- a folder ----------------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, notes: Notes) -> list[_Picture]:
    names, been = list[str](), set[str]()
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in been:  # a link that leads back
            folders.clear()
            continue
        been.add(real)
        inside = Path(where).relative_to(folder)
        for name in filter(is_hidden, folders):
            notes.add("hidden", _text((inside / name).as_posix()))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        names += [(inside / name).as_posix() for name in files]
    names.sort()
    stems: dict[str, dict[str, str]] = {}
    for name in names:
        stem, dot, extension = name.rpartition(".")
        stems.setdefault(stem if dot else name, {})[extension if dot else ""] = name
    pictures = []
    for group in stems.values():
        beside = {of.lower(): str(folder / name) for of, name in group.items() if of.lower() in _BESIDE}
        of_stem = [name for of, name in group.items() if of.lower() not in _BESIDE]
        pictures += [_Picture(_text(name), str(folder / name), (), tuple(sorted(beside.items()))) for name in of_stem]
        for of in beside if not of_stem else ():
            notes.add("no_picture", _text(group[of]))
    return pictures


def _text(name: str) -> str:
    """A name that can be written, also where the disk's is not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# -- a table -----------------------------------------------------------------------------------------------------------


def _of_table(path: Path, image_column: str | None, caption_column: str | None, notes: Notes) -> list[_Picture]:
    try:
        header, rows = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path, notes)
        images = _column(path, header, image_column, IMAGE_COLUMNS, "--image-column")
        texts = _column(path, header, caption_column, CAPTION_COLUMNS, "--caption-column")
        found: dict[str, list[str]] = {}
        for row in rows:
            told = row.get(texts)
            of_row = told if isinstance(told, list) else [told]
            name = str(row.get(images) or "")
            if not name.strip():
                notes.add("no_path", f"{path}, the row of caption '{told or ''}'")
                continue
            found.setdefault(name, []).extend(text for text in of_row if isinstance(text, str) and text.strip())
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return [_Picture(_relative(name), _place(path, name), tuple(dict.fromkeys(of))) for name, of in found.items()]


def _place(table: Path, name: str) -> str:
    """Where a picture lies: a path is that from the table's folder."""
    return name if "://" in name else str(table.parent / name)


def _relative(name: str) -> str:
    """A path or a URL as a key can begin with it."""
    inside = name.partition("://")[2].partition("?")[0] if "://" in name else name
    return posixpath.normpath(f"/{inside}").lstrip("/")


def _column(path: Path, header: list[str], asked: str | None, usual: tuple[str, ...], option: str) -> str:
    if not header:
        raise ConfigError(f"{path} is empty; its first line has to name the columns, such as: path,caption")
    found = next((name for name in ((asked,) if asked else usual) if name in header), None)
    if found is None:
        if len(header) == 1 and (mark := next((mark for mark in ";,|" if mark in header[0]), "")):
            raise ConfigError(
                f"{path} seems to be separated by '{mark}'; save it with commas as .csv, or with tabs as .tsv: "
                f"{header[0]}"
            )
        missing = f"no column '{asked}'" if asked else f"none of the columns {', '.join(usual)}"
        raise ConfigError(f"{path} has {missing}; name one with {option}: {', '.join(header)}")
    if header.count(found) > 1:
        raise ConfigError(f"{path} has {header.count(found)} columns called '{found}'; rename all but one of them")
    return found


def _csv(path: Path, notes: Notes) -> tuple[list[str], Iterator[dict[str, str]]]:
    text = path.read_text("utf-8-sig")
    tabs = path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0]  # open_clip's .csv has tabs
    rows = _rows(path, text, "\t" if tabs else ",", notes)
    header = next(rows, [])
    return header, (dict(zip(header, row, strict=True)) for row in rows)


def _rows(path: Path, text: str, delimiter: str, notes: Notes) -> Iterator[list[str]]:
    """The header, and the rows with as many fields; the others are noted. Strict, since a quote that is not closed
    would else make one caption of all that follows."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    wanted = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(
                f"{where}: the row that begins there cannot be read ({error}); close each quote that opens a field, "
                "and write a quote within quotes twice"
            ) from None
        if row is None:
            return
        wanted = wanted or len(row)
        if len(row) == wanted:
            yield row
        elif row:  # an empty line is none
            notes.add("wrong_fields", where)


def _parquet(path: Path) -> tuple[list[str], Iterator[dict[str, object]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra(f"{path}: reading parquet needs pyarrow: pip install 'clip-reinforce[parquet]'") from None
    table = parquet.ParquetFile(path)
    return table.schema_arrow.names, (row for batch in table.iter_batches() for row in batch.to_pylist())
