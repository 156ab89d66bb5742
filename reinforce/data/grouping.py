"""Members of a tar that are one sample, by webdataset's convention: those that share the path up to the first dot of
their base name."""

import re
from collections.abc import Iterable, Iterator

from reinforce.data.notes import Notes
from reinforce.data.tars import Member

_META = re.compile(r"__[^/]*__(/|$)")


def split(path: str) -> tuple[str, str] | None:
    """Key and lower-case extension; None for what is no part of a sample: dotfiles, metadata, names without a dot."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or is_hidden(path):
        return None
    return folder + slash + stem, extension.lower()


def is_hidden(path: str) -> bool:
    """Dotfiles, webdataset's metadata, and what macOS adds."""
    folder, _, base = path.rpartition("/")
    return base.startswith(".") or bool(_META.match(path)) or "__MACOSX" in folder.split("/")


def groups(
    members: Iterable[tuple[str, Member]], notes: Notes | None = None
) -> Iterator[tuple[str, list[dict[str, Member]]]]:
    """Adjacent members of one key: the sample, then a copy for each time that one of its names comes again. What is no
    part of a sample, or no plain file, goes into the `notes`."""
    notes = Notes() if notes is None else notes
    current, copies = "", list[dict[str, Member]]()
    for path, member in members:
        if member.odd:
            notes.add(member.odd, path)
        if (name := split(path)) is None:
            if not member.odd:
                notes.add("hidden" if is_hidden(path) else "no_extension", path)
            continue
        key, extension = name
        if key != current and copies:
            yield current, copies
            copies = []
        current = key
        if member.odd and copies:  # it has no bytes: it is no copy of what has, and what has takes its place
            copies[0].setdefault(extension, member)
            continue
        parts = next((parts for parts in copies if extension not in parts or parts[extension].odd), None)
        if parts is None:
            copies.append(parts := {})
        parts[extension] = member
    if copies:
        yield current, copies
