"""The addresses of tars that a pattern names."""

import math
import re
from collections.abc import Iterator

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from reinforce.data.remote import as_os_errors, file_system
from reinforce.errors import ConfigError

MAX_SHARDS = 10_000_000  # that a pattern may name, a hundred times the largest collections: more is a slip
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def urls(pattern: str) -> Iterator[str]:
    """Every address that a pattern of braces and `*` names. Raises ConfigError, MissingExtra."""
    try:
        if (num := _num_named(pattern)) > MAX_SHARDS:
            raise ConfigError(f"{pattern} names {num:,} tars, and at most {MAX_SHARDS:,} are taken: see to its braces")
        named = list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"{pattern}: {error}; write braces as {{00000..00127}} or {{a,b}}") from None
    for url in named:
        if url.startswith("pipe:"):
            raise ConfigError(f"{url}: pipes are not read; name the file itself, as s3://BUCKET/NAME.tar")
        local = issubclass(file_system(url), LocalFileSystem)
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
            raise ConfigError(
                f"{url} is a folder; a shard is a tar: write '{url.rstrip('/')}/*.tar', or make tars of its pictures: "
                f"clip-reinforce pack {url} -o DIR"
            )
        if not found:
            raise ConfigError(f"{url or 'the empty pattern'}: names no file; check the path, or leave it out")
        yield from found if local else map(files.unstrip_protocol, found)


def _num_named(pattern: str) -> int:
    """How many names the ranges in braces stand for."""
    ranges = _RANGE.findall(pattern)
    return math.prod(abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1 for first, last, step in ranges)
