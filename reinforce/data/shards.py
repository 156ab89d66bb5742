"""Tar shard in, samples out, in order; and back.

The conventions are webdataset's: members that share the path up to the first dot of their base name are one sample.
Two things are stricter. A sample that cannot be used comes out all the same, with its status, so that counts balance;
and a tar that is not whole is an error.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath

import fsspec

from reinforce.config import CAPTION_FILES, CaptionFiles
from reinforce.data import captions, tars
from reinforce.data.grouping import groups, split
from reinforce.data.notes import REMEDIES, Notes
from reinforce.data.patterns import urls
from reinforce.data.remote import as_os_errors
from reinforce.data.status import Status
from reinforce.data.tars import Member
from reinforce.errors import ConfigError, SampleError, ShardError

IMAGES = ("jpg", "png", "jpeg", "webp")  # the first of these that a sample has is its image
OTHER_IMAGES = {*("avif", "heic", "heif", "gif", "bmp", "tif", "tiff", "jxl", "jp2", "svg", "ico", "jfif")}
# Bytes of a file that is read; 64 MiB are two thirds of a byte for each pixel that an image may have.
LIMITS = dict.fromkeys(IMAGES, 64 << 20) | dict.fromkeys(captions.EXTENSIONS, 1 << 20)
KNOWN = {*IMAGES, *OTHER_IMAGES, *captions.EXTENSIONS, captions.LABEL}
_END = 1 << 14  # bytes at either end of a tar that its stamp looks at
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


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


def joined(patterns: str | PathLike[str] | Iterable[str | PathLike[str]]) -> str:
    """One pattern or path, or several, as `expand` takes them."""
    several = [patterns] if isinstance(patterns, str | PathLike) else patterns
    return "::".join(fspath(pattern) for pattern in several)


def expand(patterns: str) -> list[Shard]:
    """The shards of `::`-joined patterns, in order. A pattern takes braces and `*`; it is a path or an fsspec URL.

    Local paths come back absolute. Remote files are not looked for, but by a `*`. Raises ConfigError where a pattern
    names nothing, something that is no tar, or one name twice; MissingExtra where a URL needs a package.
    """
    shards: dict[str, Shard] = {}
    for pattern in patterns.split("::"):
        for url in urls(pattern):
            address = url.partition("?")[0] if "://" in url else url  # a signed one has its signature behind
            name = address.rpartition("/")[2].removesuffix(".tar")
            if address.endswith(_COMPRESSED):
                raise ConfigError(
                    f"{url} is compressed, and images are read from where they lie in a tar; unpack it to NAME.tar"
                )
            if not address.endswith(".tar") or not name or name.startswith((".", "__")) or name == "zarr.json":
                raise ConfigError(
                    f"{url}: a shard is a file NAME.tar, its name not starting with '.' or '__' and not 'zarr.json'; "
                    "rename it, or write a pattern that leaves it out, such as 'DIR/*.tar'"
                )
            if name in shards:
                raise ConfigError(
                    f"{shards[name].url} and {url} are both named '{name}', and a shard's name is its group in the "
                    "store; rename one, name it once, or give each its own store"
                )
            shards[name] = Shard(name, url)
    return list(shards.values())


def read(shard: Shard, files: CaptionFiles | None = CAPTION_FILES, notes: Notes | None = None) -> Iterator[Sample]:
    """Every sample of the tar, in its order, the bad ones with their status; images are not decoded.

    `files`: how captions lie in their files; None: they are neither asked for nor looked at. `notes` takes what is in
    the tar and is not used.
    Raises ShardError where it shows that the tar cannot be read to its end.
    """
    seen: set[str] = set()
    notes = Notes() if notes is None else notes
    for key, members in _samples(shard, IMAGES + captions.EXTENSIONS, notes):
        try:
            if key in seen:
                raise SampleError(
                    Status.DUPLICATE_KEY,
                    f"{key}: comes twice; give each sample one key, its files side by side: tar --sort=name",
                )
            extension = _image(key, members)
            _check_length(key, extension, members)
            for name in members:
                if name not in KNOWN:
                    notes.add("unused_extension", f"{key}.{name}")
            parts = {name: member.data for name, member in members.items() if not member.odd}
            texts = _captions(key, members, parts, files) if files else ()
            if files and not files.lines and captions.num_lines(parts.get("txt", b"")) > 1:
                notes.add("several_lines", f"{key}.txt")
            sample = Sample(key, parts[extension], texts, offset=members[extension].offset)
        except SampleError as error:
            sample = Sample(key, b"", (), Status(error.status), error.message)
            if error.status == Status.MISSING_IMAGE and (dotted := _dotted_images(members)):
                notes.add("dots_in_name", f"{key}.{dotted[0]}", len(dotted))
        seen.add(key)
        yield sample


def read_parts(shard: Shard, extensions: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and {extension: bytes} of every sample, in the tar's order; of other extensions, and of files that are larger
    than LIMITS allows, the bytes are left out.

    Raises ShardError where it shows that the tar cannot be read to its end.
    """
    for key, members in _samples(shard, extensions):
        yield key, {extension: member.data for extension, member in members.items() if not member.odd}


def _samples(
    shard: Shard, extensions: tuple[str, ...], notes: Notes | None = None
) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and members by extension of every sample."""

    def wanted(path: str, length: int) -> bool:
        name = split(path)
        return name is not None and name[1] in extensions and length <= LIMITS.get(name[1], length)

    for key, copies in groups(tars.members(shard.url, wanted), notes):
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
        Place(key, *next((parts[name][:2] for name in IMAGES if name in parts and not parts[name].odd), (0, 0)))
        for key, copies in groups(tars.places(path))
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
                if split(name) != (key, extension) or "\0" in name:
                    raise ConfigError(f"{path}: '{name}' would not be read as key '{key}' and '{extension}'")
                yield name, data

    tars.write(path, named())


def _image(key: str, parts: Mapping[str, Member]) -> str:
    """The extension of its image. Raises SampleError where it has none that is read."""
    for extension in IMAGES:
        if extension in parts and not parts[extension].odd:
            return extension
    for extension in IMAGES:
        if extension in parts:
            raise SampleError(Status.MISSING_IMAGE, f"{key}.{extension}: {REMEDIES[str(parts[extension].odd)]}")
    if other := next((extension for extension in parts if extension in OTHER_IMAGES), None):
        raise SampleError(
            Status.UNKNOWN_IMAGE_FORMAT, f"{key}.{other}: by its name it is no JPEG, PNG or WebP; convert it"
        )
    few = ", ".join([*parts][:4]) + (", .." if len(parts) > 4 else "")
    remedy = "add one of " + ", ".join(IMAGES)
    if dotted := _dotted_images(parts):
        pictures = "1 picture" if len(dotted) == 1 else f"{len(dotted)} pictures"
        remedy = f"a key ends at the first dot, so that '{dotted[0]}' is an extension ({pictures} so): rename the files"
    raise SampleError(Status.MISSING_IMAGE, f"{key}: has no image, only {few}; {remedy}")


def _check_length(key: str, extension: str, members: Mapping[str, Member]) -> None:
    length, limit = members[extension].length, LIMITS[extension]
    if length > limit:
        raise SampleError(
            Status.FILE_TOO_LARGE, f"{key}.{extension}: has {length} bytes, and at most {limit} are read; shrink it"
        )


def _captions(key: str, members: Mapping[str, Member], parts: dict[str, bytes], files: CaptionFiles) -> tuple[str, ...]:
    """Its captions, none of a file that is too large. Such a json matters only where there is no other caption."""
    if "txt" in parts:
        _check_length(key, "txt", members)
    try:
        return captions.captions(key, parts, files)
    except SampleError:
        if "json" in parts:
            _check_length(key, "json", members)
        raise


def _dotted_images(parts: Iterable[str]) -> list[str]:
    return [name for name in parts if "." in name and name.rpartition(".")[2] in IMAGES]
