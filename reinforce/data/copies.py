"""Copies of remote tars on the local disk: compared with what the server has, bounded, the oldest let go."""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import uuid
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from reinforce.data import tars
from reinforce.data.remote import as_os_errors
from reinforce.errors import ShardError

_SPARE = 1 << 30  # bytes of the disk that are left to others where no bound is asked for
# What file systems call the version of an object: HTTP, S3, Google, Azure, Hugging Face, and fsspec's memory.
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "Last-Modified", "LastModified", "updated", "created")

_OURS = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-[^~]*(~\d+~[0-9a-f]{32})?")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """A tar at a local path. As long as this object lives, no process takes the copy away."""

    path: str
    lock: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.lock is not None:
            weakref.finalize(self, os.close, self.lock)


def local_copy(url: str, folder: str | None, max_bytes: int | None) -> Copy:
    """A local tar as it is; of a remote one its copy in `folder` (by default the user's own cache), fetched where there
    is none, and where the server has another length or version. A copy that is no tar is fetched again.

    All copies there take at most `max_bytes`, by default as many as the disk has room for: those that were not used for
    the longest time go first, and none that is in use. Raises ShardError where it cannot be fetched.
    """
    if fsspec.utils.get_protocol(url) in ("file", "local"):
        return Copy(url)
    where = _folder(folder)
    try:
        with as_os_errors():
            files, remote = fsspec.core.url_to_fs(url, use_listings_cache=False)
            about: dict[str, Any] = files.info(remote)
    except OSError as error:
        if kept := _newest(where, url):
            log.warning("%s: cannot be compared with its copy, which is taken as it is: %s", url, error)
            return kept
        raise _cannot(url, where, error) from error
    size = about.get("size")
    version = [str(about[name]) for name in _VERSIONS if about.get(name) is not None][:1]
    path = where / f"{_stem(url)}-{_hash(size, *version)}-{_base(url)}"
    try:
        kept = _held(path)
        if kept and _is_whole(path, size):
            return kept
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_room(where, size or 0, max_bytes)
        return _fetched(files, remote, path, size, damaged=kept is not None)
    except OSError as error:
        raise _cannot(url, where, error) from error


def _fetched(files: Any, remote: str, path: Path, size: int | None, damaged: bool) -> Copy:
    """`damaged`: what is there is to be replaced; otherwise what another process has put there meanwhile is taken."""
    # Its name says how much room it will need, to others who make room meanwhile; its lock, that it is being written.
    partial = path.with_name(f"{path.name}~{size or 0}~{uuid.uuid4().hex}")
    partial.touch(0o600)
    while (lock := _locked(partial)) is None:  # taken for one of a killed process, before it was locked
        partial.touch(0o600)
    copy = Copy(str(path), lock)
    try:
        with as_os_errors():
            files.get_file(remote, str(partial))
        if not _is_whole(partial, size):
            expected = "" if size is None else f" of {size} bytes"
            raise OSError(f"the {partial.stat().st_size} bytes that came are no tar{expected}")
        while not damaged:
            try:
                os.link(partial, path)
                return copy
            except FileExistsError:  # another process was faster, and uses its own
                if other := _held(path):
                    return other
            except OSError:  # a file system without links
                break
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return copy


def _make_room(folder: Path, size: int, max_bytes: int | None) -> None:
    """For `size` bytes more."""
    if max_bytes is not None and size > max_bytes:
        raise OSError(f"it has {size} bytes, and cache_bytes allows {max_bytes} for all copies; allow more")
    copies = []
    for path in filter(_is_ours, folder.iterdir()):
        if "~" in path.name and _let_go(path):  # left by a process that was killed
            continue
        with suppress(FileNotFoundError):
            copies.append((path.stat().st_mtime_ns, path, _room(path)))
    taken = sum(room for *_, room in copies)

    def is_enough() -> bool:
        if max_bytes is not None:
            return taken + size <= max_bytes
        return shutil.disk_usage(folder).free >= size + _SPARE

    for _, path, room in sorted(copies):
        if is_enough():
            return
        if "~" not in path.name and _let_go(path):
            taken -= room
    if max_bytes is not None and not is_enough():
        log.warning(
            "%s: the copies that are in use take %d bytes, and one of %d is needed: more than cache_bytes=%d; allow "
            "more, or take fewer streams",
            *(folder, taken, size, max_bytes),
        )


def _is_ours(path: Path) -> bool:
    """Whether this file was made here: in the folder may be others, which are nobody's to remove."""
    return _OURS.fullmatch(path.name) is not None


def _room(path: Path) -> int:
    """Bytes that a copy takes, or will take when it is whole."""
    return int(path.name.split("~")[1]) if "~" in path.name else path.stat().st_size


def _let_go(path: Path) -> bool:
    """Remove a copy, but not one that a process uses."""
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # somebody else's
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError:  # it is in use; or a file system without locks, which cannot tell
        return False
    finally:
        os.close(lock)


def _held(path: Path) -> Copy | None:
    """A copy that is there, marked as used now."""
    lock = _locked(path)
    if lock is None:
        return None
    with suppress(OSError):  # somebody else's, which may be read and no more
        os.utime(path)
    return Copy(str(path), lock)


def _locked(path: Path) -> int | None:
    """Say that a copy is in use, until what this gives is closed. None where there is none, or where it just goes."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks: then it is not let go of either
        fcntl.flock(lock, fcntl.LOCK_SH)
    if os.fstat(lock).st_nlink:
        return lock
    os.close(lock)
    return None


def _newest(folder: Path, url: str) -> Copy | None:
    """The copy of an address that was used last, whatever its version."""
    found = [path for path in folder.glob(f"{_stem(url)}-*") if "~" not in path.name and _is_whole(path, None)]
    return _held(max(found, key=lambda path: path.stat().st_mtime_ns)) if found else None


def _is_whole(path: Path, size: int | None) -> bool:
    return size in (None, path.stat().st_size) and tars.begins_as_tar(str(path))


def _folder(asked: str | None) -> Path:
    if asked:
        return Path(asked).expanduser()
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "clip-reinforce"
    if not folder.is_absolute():
        raise ShardError("there is no home folder to keep copies of remote tars in; name another one: cache_dir")
    return folder


def _stem(url: str) -> str:
    return _hash(url)[:16]


def _base(url: str) -> str:
    """The name of the tar, without a signature behind it."""
    return url.partition("?")[0].rpartition("/")[2].replace("~", "_")


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _cannot(url: str, folder: Path, error: OSError) -> ShardError:
    return ShardError(
        f"{url}: cannot be fetched to {folder}: {error}; check the address, your access and the room there (cache_dir)"
    )
