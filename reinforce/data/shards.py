"""Tar shard in, samples out, in order; and back.

The conventions are webdataset's: members that share the path up to the first dot of their base name are one sample.
Two things are stricter. A sample that cannot be used comes out all the same, with its status, so that counts balance;
and a tar that is not whole is an error.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from reinforce.data import tars
from reinforce.data.remote import as_os_errors
from reinforce.data.tars import Member
from reinforce.errors import ConfigError, MissingExtra, SampleError, ShardError

IMAGES = ("jpg", "png", "jpeg", "webp")  # the first of these that a sample has is its image
CAPTIONS = ("txt", "json")
# Bytes of a file that is read; 64 MiB are two thirds of a byte for each pixel that an image may have.
LIMITS = dict.fromkeys(IMAGES, 64 << 20) | dict.fromkeys(CAPTIONS, 1 << 20)
_END = 1 << 14  # bytes at either end of a tar that its stamp looks at
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_META = re.compile(r"__[^/]*__(/|$)")

T = TypeVar("T")


class Status(IntEnum):
    """0, or why a sample is in quarantine. Stored as uint8: a number keeps its meaning for ever."""

    GOOD = 0
    DUPLICATE_KEY = 1
    MISSING_IMAGE = 2
    EMPTY_IMAGE = 3
    UNKNOWN_IMAGE_FORMAT = 4
    TRUNCATED_IMAGE = 5
    BROKEN_IMAGE = 6
    TOO_MANY_PIXELS = 7
    MISSING_CAPTION = 8
    EMPTY_CAPTION = 9
    CAPTION_NOT_UTF8 = 10
    CAPTION_NOT_TEXT = 11
    CAPTION_JSON_BROKEN = 12
    NO_RECORD = 13  # in what was imported
    OTHER_SIZE = 14  # than the image that was reinforced elsewhere
    FILE_TOO_LARGE = 15

    @property
    def reason(self) -> str:
        """The name in reports: lower case, with underscores."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)  # a run may have 100,000 of them
class Shard:
    """A tar, and the name of its group in the store."""

    name: str
    url: str


@dataclass(frozen=True)
class Sample:
    """One image, undecoded, its captions, and where the image begins in its tar, in bytes. In quarantine they are empty
    and `detail` says why."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    status: Status = Status.GOOD
    detail: str = ""
    offset: int = field(default=0, compare=False)

    def repeated(self, num: int) -> list[str]:
        """`num` captions: where it has fewer they are repeated, so that any index is a caption of its image."""
        return [self.captions[index % len(self.captions)] for index in range(num)] if self.captions else []


@dataclass(frozen=True)
class Place:
    """Where the image of a sample lies in its tar, in bytes. Of a sample without an image, `length` is 0."""

    key: str
    offset: int
    length: int


def expand(patterns: str) -> list[Shard]:
    """The shards of `::`-joined patterns, in order. A pattern takes braces and `*`; it is a path or an fsspec URL.

    Local paths come back absolute. Remote files are not looked for, but by a `*`. Raises ConfigError where a pattern
    names nothing, something that is no tar, or one name twice; MissingExtra where a URL needs a package.
    """
    shards: dict[str, Shard] = {}
    for pattern in patterns.split("::"):
        for url in _urls(pattern):
            address = url.partition("?")[0] if "://" in url else url  # a signed one has its signature behind
            name = address.rpartition("/")[2].removesuffix(".tar")
            if address.endswith(_COMPRESSED):
                raise ConfigError(
                    f"{url} is compressed, and images are read from where they lie in a tar; unpack it to NAME.tar"
                )
            if not address.endswith(".tar") or not name or name.startswith((".", "__")):
                raise ConfigError(
                    f"{url}: a shard is a file NAME.tar, its name not starting with '.' or '__'; "
                    "rename it, or write a pattern that leaves it out, such as 'DIR/*.tar'"
                )
            if name in shards:
                raise ConfigError(
                    f"{shards[name].url} and {url} are both named '{name}', and a shard's name is its group in the "
                    "store; rename one, name it once, or give each its own store"
                )
            shards[name] = Shard(name, url)
    return list(shards.values())


def _urls(pattern: str) -> Iterator[str]:
    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"{pattern}: {error}; write braces as {{00000..00127}} or {{a,b}}") from None
    for url in urls:
        if url.startswith("pipe:"):
            raise ConfigError(f"{url}: pipes are not read; name the file itself, as s3://BUCKET/NAME.tar")
        protocol = fsspec.utils.get_protocol(url)
        try:
            local = issubclass(fsspec.get_filesystem_class(protocol), LocalFileSystem)
        except ImportError as error:
            raise MissingExtra(f"{url}: {error}") from None
        except ValueError:
            raise ConfigError(f"{url}: no file system is called '{protocol}'; try s3://, gs:// or hf://") from None
        if "*" not in url and not local:
            yield url
            continue
        try:
            with as_os_errors():
                files, path = fsspec.core.url_to_fs(url)
                found = sorted(files.glob(path)) if "*" in url else [path] if files.isfile(path) else []
        except OSError as error:
            raise ConfigError(f"{url}: cannot be listed: {error}; check the address and your access to it") from error
        if not found and url and files.isdir(path):
            raise ConfigError(f"{url} is a folder; a shard is a tar: write '{url.rstrip('/')}/*.tar'")
        if not found:
            raise ConfigError(f"{url or 'the empty pattern'}: names no file; check the path, or leave it out")
        yield from found if local else map(files.unstrip_protocol, found)


def read(shard: Shard, captioned: bool = True) -> Iterator[Sample]:
    """Every sample of the tar, in its order, the bad ones with their status; images are not decoded.

    Where not `captioned`, captions are neither asked for nor looked at.
    Raises ShardError where it shows that the tar cannot be read to its end.
    """
    seen: set[str] = set()
    for key, members in _samples(shard, IMAGES + CAPTIONS):
        try:
            if key in seen:
                raise SampleError(
                    Status.DUPLICATE_KEY,
                    f"{key}: comes twice; give each sample one key, its files side by side: tar --sort=name",
                )
            parts = {extension: member.data for extension, member in members.items()}
            extension = _image(key, parts)
            _check_length(key, extension, members)
            captions = _captions_of(key, members, parts) if captioned else ()
            sample = Sample(key, parts[extension], captions, offset=members[extension].offset)
        except SampleError as error:
            sample = Sample(key, b"", (), Status(error.status), error.message)
        seen.add(key)
        yield sample


def read_parts(shard: Shard, extensions: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and {extension: bytes} of every sample, in the tar's order; of other extensions, and of files that are larger
    than LIMITS allows, the bytes are left out.

    Raises ShardError where it shows that the tar cannot be read to its end.
    """
    for key, members in _samples(shard, extensions):
        yield key, {extension: member.data for extension, member in members.items()}


def _samples(shard: Shard, extensions: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and members by extension of every sample."""

    def wanted(path: str, length: int) -> bool:
        name = _split(path)
        return name is not None and name[1] in extensions and length <= LIMITS.get(name[1], length)

    for key, copies in _groups(tars.members(shard.url, wanted)):
        for members in copies:
            yield key, members


def image_digest(image: bytes) -> int:
    """The first 64 bits of SHA-256 over the bytes of an image as they lie in the tar, little-endian."""
    return int.from_bytes(hashlib.sha256(image).digest()[:8], "little")


def stamp(url: str) -> dict[str, int | str]:
    """What tells one tar from another without reading it: its length in `bytes`, and `ends`, a hash of its first and
    last 16 KiB. The same for every copy of the tar. Raises ShardError where it cannot be reached."""
    try:
        if os.path.isfile(url):  # a run looks at every tar that it has done before: of thousands, each ms counts
            with open(url, "rb") as file:
                length, first = os.fstat(file.fileno()).st_size, file.read(_END)
                file.seek(max(0, length - _END))
                ends = first + file.read(_END)
        else:
            length = tar_bytes(url)
            with as_os_errors():
                files, path = fsspec.core.url_to_fs(url)
                first = files.cat_file(path, start=0, end=min(_END, length))
                ends = first + files.cat_file(path, start=max(0, length - _END), end=length)
    except OSError as error:
        raise _unreachable(url, error) from error
    return {"bytes": length, "ends": hashlib.sha256(ends).hexdigest()[:32]}


def tar_bytes(url: str) -> int:
    """The length of a tar. Raises ShardError where it cannot be reached."""
    try:
        with as_os_errors():
            files, path = fsspec.core.url_to_fs(url)
            length = files.size(path)
        if length is None:
            raise OSError("the server does not say how long it is")
        return int(length)
    except OSError as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: OSError) -> ShardError:
    return ShardError(f"{url}: cannot be read: {error}; check the path and your access to it")


def locate(path: str) -> list[Place]:
    """The samples of a local tar, row by row as `read` gives them; images are not read.

    Raises ShardError where the tar cannot be followed to its end.
    """
    return [
        Place(key, *next((parts[extension][:2] for extension in IMAGES if extension in parts), (0, 0)))
        for key, copies in _groups(tars.places(path))
        for parts in copies
    ]


def write(path: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """A tar of (key, {extension: bytes}), the same bytes for the same samples.

    Raises ConfigError where a name would not come back as it is: lower-case extension, no dot in the key's last part.
    """

    def named() -> Iterator[tuple[str, bytes]]:
        for key, parts in samples:
            for extension, data in parts.items():
                name = f"{key}.{extension}"
                if _split(name) != (key, extension) or "\0" in name:
                    raise ConfigError(f"{path}: '{name}' would not be read as key '{key}' and '{extension}'")
                yield name, data

    tars.write(path, named())


def _split(path: str) -> tuple[str, str] | None:
    """Key and lower-case extension; None for what is no part of a sample: dotfiles, metadata, names without a dot."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META.match(path) or "__MACOSX" in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


def _groups(members: Iterable[tuple[str, T]]) -> Iterator[tuple[str, list[dict[str, T]]]]:
    """Adjacent members of one key: the sample, then a copy for each time that one of its names comes again."""
    current, copies = "", list[dict[str, T]]()
    for path, data in members:
        if (name := _split(path)) is None:
            continue
        key, extension = name
        if key != current and copies:
            yield current, copies
            copies = []
        current = key
        parts = next((parts for parts in copies if extension not in parts), None)
        if parts is None:
            copies.append(parts := {})
        parts[extension] = data
    if copies:
        yield current, copies


def _image(key: str, parts: dict[str, bytes]) -> str:
    """The extension of its image."""
    for extension in IMAGES:
        if extension in parts:
            return extension
    few = ", ".join([*parts][:4]) + (", .." if len(parts) > 4 else "")
    dotted = next((name for name in parts if name.rpartition(".")[2] in IMAGES), None)
    remedy = f"a key ends at the first dot, so that '{dotted}' is an extension: rename the files" if dotted else ""
    raise SampleError(
        Status.MISSING_IMAGE, f"{key}: has no image, only {few}; {remedy or 'add one of ' + ', '.join(IMAGES)}"
    )


def _check_length(key: str, extension: str, members: dict[str, Member]) -> None:
    length, limit = members[extension].length, LIMITS[extension]
    if length > limit:
        raise SampleError(
            Status.FILE_TOO_LARGE, f"{key}.{extension}: has {length} bytes, and at most {limit} are read; shrink it"
        )


def _captions_of(key: str, members: dict[str, Member], parts: dict[str, bytes]) -> tuple[str, ...]:
    """Its captions, none of a file that is too large. Such a json matters only where there is no other caption."""
    if "txt" in members:
        _check_length(key, "txt", members)
    try:
        return _captions(key, parts)
    except SampleError:
        if "json" in members:
            _check_length(key, "json", members)
        raise


def _captions(key: str, parts: dict[str, bytes]) -> tuple[str, ...]:
    """Those of txt, then those of json, equal ones once, runs of white space as one space."""
    texts: list[str] = []
    if "txt" in parts:
        try:
            texts.append(parts["txt"].decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise SampleError(
                Status.CAPTION_NOT_UTF8, f"{key}.txt: byte {error.start} is not UTF-8; convert it to UTF-8"
            ) from None
        if "\0" in texts[0]:  # UTF-16 without its mark, or a binary file
            raise SampleError(Status.CAPTION_NOT_TEXT, f"{key}.txt: holds NUL characters; convert it to UTF-8 text")
    fault = ""
    if "json" in parts:
        try:
            texts += _captions_of_json(parts["json"])
        except (ValueError, RecursionError) as error:  # matters only where there is no other caption
            fault = str(error)
    captions = tuple(dict.fromkeys(caption for text in texts if (caption := " ".join(text.split()))))
    if captions:
        return captions
    if fault:
        raise SampleError(Status.CAPTION_JSON_BROKEN, f"{key}.json: {fault}; repair it, or add .txt")
    if texts:
        raise SampleError(Status.EMPTY_CAPTION, f"{key}: its captions are empty; fill or remove them")
    raise SampleError(Status.MISSING_CAPTION, f"{key}: has no .txt, and no captions in .json; add one")


def _captions_of_json(data: bytes) -> list[str]:
    tree = json.loads(data)
    if isinstance(tree, dict):
        values = [tree[name] for name in ("caption", "captions") if tree.get(name) is not None]
        tree = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not isinstance(tree, list):
        raise ValueError("is neither a list of captions nor an object with 'caption' or 'captions'")
    for text in tree:
        if not isinstance(text, str) or "\0" in text:
            raise ValueError("holds a caption that is not text")
        text.encode()  # JSON can spell half a surrogate pair, which no store and no tokenizer can hold
    return tree
