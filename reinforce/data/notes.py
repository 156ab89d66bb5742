"""What is noted of a tar besides its samples: what is in it and is not used, or may not be read as it was meant."""

from collections import Counter
from dataclasses import dataclass, field

# Kinds, and what to do about them. In reports they are counted under these names.
REMEDIES = {
    "no_extension": "has no extension, and so no part in a sample; name it KEY.EXTENSION",
    "hidden": "is hidden or metadata, as its name begins with '.' or '__'; nothing is to be done",
    "unused_extension": "has an extension that is not read; nothing is to be done where it is no image and no caption",
    "symbolic_link": "is a symbolic link, which is not followed; write the tar with --dereference",
    "hard_link": "is a hard link to a file that does not come before it in the tar; add that file",
    "sparse_file": "is a sparse file, which is not read; write the tar without --sparse",
    "special_file": "is a device or a pipe; leave it out",
    "dots_in_name": "is a picture in a name of several dots: a key ends at the first dot; rename the files, or let "
    "`clip-reinforce pack` do so",
    "several_lines": "has several lines, which are one caption; --set caption_lines=true makes each of them one",
    "other_format": "is a picture in a format that is not read; convert it to JPEG, PNG or WebP",
    "missing_file": "cannot be read; check its path",
    "wrong_fields": "has more or fewer fields than the table's first line, and is left out; put a caption that has the "
    "separator in it into quotes",
    "no_path": "names no picture, and is left out; write the path of one into it",
    "no_picture": "has no picture of its name beside it",
    "no_caption": "has no caption; --set num_original_captions=0 reinforces pictures that have none",
    "fewer_captions": "has fewer captions than are asked for, which are repeated; ask for fewer",
}


HARMLESS = {"hidden", "unused_extension"}  # nothing is to be done


@dataclass
class Notes:
    """`counts` by kind, and `first`: a sentence about the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str, num: int = 1) -> None:
        """`name`: of the member or the sample; `kind`: one of REMEDIES."""
        self.counts[kind] += num
        self.first.setdefault(kind, f"{name}: {REMEDIES[kind]}")

    def told(self) -> list[str]:
        """A phrase for each kind, for a message."""
        return [f"{num} {kind}, as {self.first[kind]}" for kind, num in sorted(self.counts.items())]
