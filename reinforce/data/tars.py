"""Members of a tar, in order; a tar that is not whole is an error.

Stricter than tarfile, which takes a damaged header or a missing end for the end.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal, NamedTuple

import fsspec

from reinforce.data.remote import as_os_errors
from reinforce.errors import ShardError

Odd = Literal["symbolic_link", "hard_link", "sparse_file", "special_file"]
# What tarfile and the file systems below it raise on damaged or unreachable bytes; found by fuzzing.
_FAULTS = (tarfile.TarError, OSError, ValueError, IndexError)
# UTF-8 whatever the locale; a name that is not stays a valid string, as a store needs.
_NAMES: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


MAX_HEADER_BYTES = 1 << 20  # of what comes before a member: its name, its PAX records
_EXTENSIONS = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}
_EXTENSIONS |= {tarfile.SOLARIS_XHDTYPE}


class Member(NamedTuple):
    """A file of a tar: where its bytes begin, how many there are, and they themselves where they were wanted. `odd` is
    what it is where it is no plain file and no link to one; then it has no bytes."""

    offset: int = 0
    length: int = 0
    data: bytes = b""
    odd: Odd | None = None


def members(url: str, wanted: Callable[[str, int], bool]) -> Iterator[tuple[str, Member]]:
    """Name and member of every file, in order; of those that are not wanted, asked by name and length, no bytes.

    Raises ShardError where it shows that the tar cannot be read to its end.
    """
    try:
        with as_os_errors(), fsspec.open(url, "rb") as file:
            stream = _File(file)
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, **_NAMES) as tar:
                for header, member in _files(tar):
                    if member.length and wanted(header.name, member.length):
                        data = stream.at(member) if header.islnk() else tar.extractfile(header).read()  # type: ignore[union-attr]
                        member = member._replace(data=data)
                    yield header.name, member
                tail = bytes(1 << 16)
                while len(tail) == 1 << 16:
                    tail = tar.fileobj.read(1 << 16)  # type: ignore[union-attr]
                    if tail.strip(b"\0"):
                        raise tarfile.ReadError(
                            "there is data after its end-of-archive marker (joined tars, or a hole)"
                        )
    except _FAULTS as error:
        raise _cannot(url, error) from error


def places(path: str) -> Iterator[tuple[str, Member]]:
    """Name and member of every file of a local tar; none is read.

    Raises ShardError where the tar cannot be followed to its end.
    """
    try:
        with tarfile.open(path, mode="r:", tarinfo=_Header, **_NAMES) as tar:
            for header, member in _files(tar):
                yield header.name, member
    except _FAULTS as error:
        raise _cannot(path, error) from error


def begins_as_tar(path: str) -> bool:
    """Whether a local file begins as a tar does: not a page that a server sent in its place."""
    with open(path, "rb") as file:
        first = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(first, **_NAMES)
    except tarfile.HeaderError:
        return first == bytes(tarfile.BLOCKSIZE)  # one without a member
    return True


def write(path: str, files: Iterable[tuple[str, bytes]]) -> None:
    """A tar of (name, bytes), the same bytes for the same files: their owner and time are 0."""
    with as_os_errors(), fsspec.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _files(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, Member]]:
    """What is no folder. A hard link has the place of the file that it stands for, which comes before it."""
    before: dict[str, Member] = {}
    while (header := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else it remembers every header
        if header.isdir():
            continue
        if header.islnk():
            member = before.get(header.linkname, Member(odd="hard_link"))
        elif header.issparse():  # one of a few bytes may claim to be of any size
            member = Member(odd="sparse_file")
        elif header.isreg():
            member = Member(header.offset_data, header.size)
        else:
            member = Member(odd="symbolic_link" if header.issym() else "special_file")
        before[header.name] = member
        yield header, member


def _cannot(url: str, error: Exception) -> ShardError:
    return ShardError(f"{url}: cannot be read: {error}; fetch or write it again, or leave it out")


class _File(io.RawIOBase):
    """Raises where tarfile would read on and on past the end, to skip a member of absurd size."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.file = file
        self.ended = False

    def read(self, size: int = -1, /) -> bytes:
        if self.ended:
            raise tarfile.ReadError("unexpected end of data")
        data = self.file.read(size)
        self.ended = not data
        return data

    def at(self, member: Member) -> bytes:
        """The bytes of a member that was passed already."""
        here = self.file.tell()
        try:
            self.file.seek(member.offset)
            data = self.file.read(member.length)
            self.file.seek(here)
        except ValueError:  # a server that gives whole files only
            raise tarfile.ReadError(
                "it has hard links, and the server does not give parts of it; write it with --hard-dereference"
            ) from None
        return data


class _Header(tarfile.TarInfo):
    """A member's header that is whole or an error; only blocks of zeros are the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # its stubs leave it out
            raise
        except tarfile.HeaderError:
            if len(buf) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is empty or cut off: there is no end-of-archive marker") from None
            raise tarfile.ReadError(
                f"it holds {bytes(buf[:8])!r} where a tar header should be (not a tar, compressed, or damaged)"
            ) from None
        if header.type in _EXTENSIONS and header.size > MAX_HEADER_BYTES:  # tarfile reads it whole
            raise tarfile.ReadError(f"a name or another field of a header has {header.size} bytes")
        return header
