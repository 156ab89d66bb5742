"""The objects of a store, on a local disk or behind an fsspec URL: each appears whole, once, and stays as it is.

`create` never changes an object that is there. On a local disk that is a hard link to a file that is synced to the disk
first; on S3 and Google's storage a conditional put. So two writers that write the same name at once, or a writer that
wakes up late, leave the object of the first one. File systems that can do neither are asked whether the object is there
before it is put: two writers within that moment would leave the object of the last one.
"""

import errno
import os
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePosixPath
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from reinforce.data.remote import as_os_errors, file_system
from reinforce.errors import ConfigError, StoreError

PARTIAL = ".partial"  # where objects of a local store wait until they are whole
_OLD_S = 3600.0  # what has waited for so long belongs to nobody who is alive
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Objects:
    """Paths are relative to the address of the store, with '/'."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for an empty address or one of no known kind, MissingExtra."""
        if not url.strip():
            raise ConfigError("the address of the store is empty; name a local path or an fsspec URL")
        self.url = url
        file_system(url)
        # Listings are never cached: another process may have written since.
        self._fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.local = isinstance(self._fs, LocalFileSystem)
        # Otherwise s3fs asks for the size of each object first, to read a large one in parts at once.
        self._in_one_request = {"max_concurrency": 1} if "s3" in self._fs.protocol else {}

    def within(self, other: "Objects") -> bool:
        """Whether one lies in the folder of another, or is the same."""
        own, others = (f"{os.path.realpath(of.root) if of.local else of.root}/" for of in (self, other))
        return type(self._fs) is type(other._fs) and own.startswith(others)

    def check_writable(self) -> None:
        """Before there is anything to write, as far as that is known: raises PermissionError where a folder on a local
        disk, or the one that it will be made in, may not be written to."""
        path = os.path.abspath(self.root)
        while self.local and not os.path.lexists(path):
            path = os.path.dirname(path)
        if self.local and os.path.isdir(path) and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    @as_os_errors()
    def get(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        try:
            if self.local:  # a tenth of the time that fsspec takes, and a run reads one for each shard
                with open(self._at(path), "rb") as file:
                    return file.read()
            data: bytes = self._fs.cat_file(self._at(path), **self._in_one_request)
        except NotADirectoryError:
            raise StoreError(f"{self.url} is a file, and a store is a folder; give another STORE") from None
        return data

    @as_os_errors()
    def exists(self, path: str) -> bool:
        there = os.path.exists if self.local else self._fs.exists
        return bool(there(self._at(path)))

    def there(self, folder: str, paths: Iterable[str]) -> set[str]:
        """Those of the `paths` in a folder that are objects. They are asked for one by one where that is cheap, and
        else the folder is listed once."""
        if self.local:
            root = self._at(folder)
            return {path for path in paths if os.path.exists(f"{root}/{path}")}
        return set(self.tree(folder)).intersection(paths)

    @as_os_errors()
    def size(self, path: str) -> int:
        """Bytes."""
        return int(self._fs.size(self._at(path)))

    @as_os_errors()
    def total_bytes(self, folder: str) -> int:
        """Of all objects in a folder and the folders in it."""
        try:
            return int(self._fs.du(self._at(folder)))
        except FileNotFoundError:
            return 0

    def files(self, folder: str) -> list[str]:
        """The names in a folder that are objects, sorted; none where there is no such folder."""
        return self._names(folder, "file")

    def folders(self, folder: str = "") -> list[str]:
        return self._names(folder, "directory")

    @as_os_errors()
    def tree(self, folder: str) -> list[str]:
        """The paths of all objects in a folder and the folders in it, from there."""
        try:
            found = self._fs.find(self._at(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(path.removeprefix(f"{self._at(folder)}/") for path in found)

    @as_os_errors()
    def create(self, path: str, *parts: bytes) -> bool:
        """Put an object, its parts one after the other, whole or not at all. Gives False where there is one by that
        name already, which stays."""
        if self.local:
            return self._link(path, parts)
        data = b"".join(parts)
        try:
            self._fs.pipe_file(self._at(path), data, mode="create")
        except FileExistsError:
            return False
        except TypeError:  # a file system whose puts know no conditions
            if self.exists(path):
                return False
            self._fs.pipe_file(self._at(path), data)
        return True

    @as_os_errors()
    def remove(self, path: str) -> None:
        """An object that is gone already is no error."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    @as_os_errors()
    def remove_folder(self, path: str) -> None:
        """A folder with all that is in it."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(path), recursive=True)

    def sync(self, folder: str) -> None:
        """Make the names in a local folder, and the folders above it, survive a power cut."""
        for name in [folder, *map(str, PurePosixPath(folder).parents)] if self.local else []:
            descriptor = os.open(self._at(name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sweep(self) -> None:
        """Remove what writers that were killed in mid-write have left, never what one that is alive is writing."""
        if not self.local:
            return  # an object store shows an object when it is whole, or not at all
        for name in self.files(PARTIAL):
            with suppress(FileNotFoundError):  # its writer has finished it
                if _is_left(name, os.path.getmtime(self._at(f"{PARTIAL}/{name}"))):
                    os.unlink(self._at(f"{PARTIAL}/{name}"))
        with suppress(OSError):  # there is none, or somebody writes
            os.rmdir(self._at(PARTIAL))

    def _link(self, path: str, parts: Iterable[bytes]) -> bool:
        target = self._at(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        partial = self._at(f"{PARTIAL}/{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}")
        try:
            with _opened(partial) as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            return _linked(partial, target)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)

    @as_os_errors()
    def _names(self, folder: str, kind: str) -> list[str]:
        if self.local:  # a twentieth of the time that fsspec takes, and a store has a folder for each shard
            try:
                with os.scandir(self._at(folder)) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir() == (kind == "directory"))
            except (FileNotFoundError, NotADirectoryError):
                return []
        try:
            found = self._fs.ls(self._at(folder), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = (entry["name"].rstrip("/") for entry in found if entry["type"] == kind)
        # S3 has markers of folders: objects without bytes, named as the folder itself.
        return sorted(path.rsplit("/", 1)[-1] for path in paths if path != self._at(folder))

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path not in ("", ".") else self.root


def _linked(partial: str, target: str) -> bool:
    try:
        os.link(partial, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.exists(target):
            return False
        os.rename(partial, target)
    return True


def _opened(partial: str) -> BinaryIO:
    while True:
        with suppress(FileNotFoundError, FileExistsError):  # another run's sweep has just removed the empty folder
            os.makedirs(os.path.dirname(partial), exist_ok=True)
            return open(partial, "xb")


def _is_left(name: str, modified: float) -> bool:
    """Whether the writer of a partial object is dead, or must be: nothing takes an hour."""
    host, _, rest = name.partition("~")
    number = rest.partition("~")[0]
    if host == socket.gethostname() and number.isdigit() and not _runs(int(number)):
        return True
    return time.time() - modified > _OLD_S


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive. One that was killed and that nobody has waited for is not."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"])
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError):
        return True  # somebody else's; or a machine without /proc, where it is alive
