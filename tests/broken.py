"""Broken and odd tars, each with what is to come of it. `python -m tests.broken DIR` writes them to DIR."""

import bz2
import gzip
import io
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reinforce.data.status import Status
from tests.odd import ARITHMETIC_JPEG, flip, odd_captions, odd_images


@dataclass(frozen=True)
class Expected:
    """The samples that come out of a tar, in order, images decoded; then, where set, a ShardError with these words."""

    samples: tuple[tuple[str, Status], ...] = ()
    error: str = ""


def make(folder: Path) -> dict[str, Expected]:
    """Write every tar to `folder`. What is to come of each, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    tars = all_tars()
    for name, (data, _) in tars.items():
        (folder / name).write_bytes(data)
    return {name: expected for name, (_, expected) in tars.items()}


def all_tars() -> dict[str, tuple[bytes, Expected]]:
    """Bytes and what is to come of them, by file name."""
    images, captions = odd_images(), odd_captions()
    tars = {
        "images": (
            tar(*(m for key, (image, _) in images.items() for m in members(key, jpg=image, txt=b"a picture"))),
            Expected(tuple((key, status) for key, (_, status) in images.items())),
        ),
        "captions": (
            tar(*(m for key, (parts, _, _) in captions.items() for m in members(key, jpg=ARITHMETIC_JPEG, **parts))),
            Expected(tuple((key, status) for key, (_, status, _) in captions.items())),
        ),
        **odd_tars(),
        **broken_tars(),
    }
    return {f"{name}.tar": case for name, case in tars.items()}


def members(key: str, **parts: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", data) for extension, data in parts.items()]


def tar(*files: tuple[str | tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Files as they come, whatever their names: unlike `shards.write`, which refuses the odd ones."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def special(name: str, type: bytes, **pax: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.pax_headers = type, "a.jpg", pax
    return member


def hard_link(name: str, target: str) -> tarfile.TarInfo:
    member = special(name, tarfile.LNKTYPE)
    member.linkname = target
    return member


def header(name: str, size: int, kind: bytes = b"0", extended: int = 0) -> bytes:
    """Of a member that says it has `size` bytes, and, where `extended`, a map of holes in the next block."""
    member = special(name, kind)
    member.size = size
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[482] = extended
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def odd_tars() -> dict[str, tuple[bytes, Expected]]:
    """Tars that can be read to their end."""
    jpg = ARITHMETIC_JPEG
    a, b = members("a", jpg=jpg, txt=b"a"), members("b", jpg=jpg, txt=b"b")
    good_a, good_b = ("a", Status.GOOD), ("b", Status.GOOD)
    no_a, again_a = ("a", Status.MISSING_IMAGE), ("a", Status.DUPLICATE_KEY)
    long_names = [*members("folder/" * 30 + "x" * 120, jpg=jpg, txt=b"a"), *members("y" * 300, jpg=jpg, txt=b"a")]
    long_keys = (("folder/" * 30 + "x" * 120, Status.GOOD), ("y" * 300, Status.GOOD))
    names = ("犬/kätzchen", "with space, 'quotes' & %41", "two\nlines", "v1.0/dotted.folder/a", "./a", "/a", "A", "__a")
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"}
    no_file = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    no_sample = ("._a.jpg", "d/._a.jpg", ".hidden", "__MACOSX/a.jpg", "__index__", "__x__/a.jpg", "d/__x__", "plain")
    with_global = tarfile.TarInfo.create_pax_global_header({"comment": "as git archive writes"})
    cases: dict[str, tuple[bytes, list[tuple[str, Status]]]] = {
        "empty": (bytes(10240), []),
        "one_zero_block": (tar(*a, *b)[: 4096 + 512], [good_a, good_b]),
        "much_padding": (tar(*a) + bytes(1 << 20), [good_a]),
        "ustar": (tar(*a, *b, format=tarfile.USTAR_FORMAT), [good_a, good_b]),
        "global_header": (with_global + tar(*a), [good_a]),
        "names": (tar(*(m for n in names for m in members(n, jpg=jpg, txt=b"a"))), [(n, Status.GOOD) for n in names]),
        "long_names_pax": (tar(*long_names), [*long_keys]),
        "long_names_gnu": (tar(*long_names, format=tarfile.GNU_FORMAT), [*long_keys]),
        "names_not_utf8": (
            tar(*members("caf\udce9", jpg=jpg, txt=b"a"), format=tarfile.GNU_FORMAT),
            [("caf\\xe9", Status.GOOD)],
        ),
        "upper_case": (tar(("a.JPG", jpg), ("a.Txt", b"a"), ("b.JPEG", jpg), ("b.TXT", b"b")), [good_a, good_b]),
        "caption_first": (tar(*a[::-1], *b[::-1]), [good_a, good_b]),
        "two_images": (tar(("a.png", b"no image"), *a), [good_a]),
        "dots_in_key": (tar(("a.v2.jpg", jpg), ("a.v2.txt", b"a"), *b), [no_a, good_b]),
        "no_image": (tar(a[1], *b, ("c.md", b"")), [no_a, good_b, ("c", Status.MISSING_IMAGE)]),
        "no_files": (tar(a[0], *((special(f"a.{t!r}", t), b"") for t in no_file), a[1]), [good_a]),
        "no_samples": (tar(a[0], *((name, b"") for name in no_sample), a[1]), [good_a]),
        "sparse": (
            tar((special("a.jpg", b"0", **sparse), b"1\n0\n5\n".ljust(512, b"\0") + b"x" * 5), a[1], *b),
            [no_a, good_b],
        ),
        "hard_links": (
            tar(*a, (hard_link("b.jpg", "a.jpg"), b""), b[1], (hard_link("c.jpg", "b.jpg"), b""), b[1]),
            [good_a, good_b, ("c", Status.MISSING_CAPTION), ("b", Status.DUPLICATE_KEY)],
        ),
        "hard_link_to_nothing": (tar((hard_link("a.jpg", "x/a.jpg"), b""), a[1], *b), [no_a, good_b]),
        "symbolic_links": (
            tar((special("a.jpg", tarfile.SYMTYPE), b""), (special("a.txt", tarfile.SYMTYPE), b""), *b),
            [no_a, good_b],
        ),
        "symbolic_link_then_file": (tar((special("a.jpg", tarfile.SYMTYPE), b""), *a), [good_a]),
        "file_then_symbolic_link": (tar(*a, (special("a.jpg", tarfile.SYMTYPE), b""), *b), [good_a, good_b]),
        "symbolic_link_beside_a_picture": (
            tar((special("a.jpg", tarfile.SYMTYPE), b""), ("a.png", jpg), a[1], *b),
            [good_a, good_b],
        ),
        "sparse_alone": (
            tar(
                *((special(f"{key}.jpg", b"0", **sparse), b"1\n0\n5\n".ljust(512, b"\0") + b"x" * 5) for key in "xyz"),
                *a,
            ),
            [*((key, Status.MISSING_IMAGE) for key in "xyz"), good_a],
        ),
        "avif_by_name": (
            tar(("a.avif", b"\0\0\0 ftypavif"), a[1], ("b.jpg", b"\0\0\0 ftypavif"), b[1]),
            [("a", Status.UNKNOWN_IMAGE_FORMAT), ("b", Status.UNKNOWN_IMAGE_FORMAT)],
        ),
        "again_at_once": (tar(*a, *a, *b), [good_a, again_a, good_b]),
        "again_later": (tar(*a, *b, *a), [good_a, good_b, again_a]),
        "again_one_member": (tar(a[0], *a, *b), [good_a, again_a, good_b]),
        "again_in_upper_case": (tar(*a, ("a.TXT", b"A")), [good_a, again_a]),
        "interleaved": (
            tar(a[0], b[0], a[1], b[1]),
            [("a", Status.MISSING_CAPTION), ("b", Status.MISSING_CAPTION), again_a, ("b", Status.DUPLICATE_KEY)],
        ),
    }
    return {name: (data, Expected(tuple(samples))) for name, (data, samples) in cases.items()}


def broken_tars() -> dict[str, tuple[bytes, Expected]]:
    """Tars that cannot; of three samples of 2048 bytes each, so that cuts are easy to place.

    A sample comes out when the first file of the next one is read.
    """
    whole = tar(*(m for key in "abc" for m in members(key, jpg=ARITHMETIC_JPEG, txt=b"a")))
    long_name, noise = tar(("x" * 300 + ".txt", b"x")), np.random.default_rng(0).bytes(20_000)
    cut, other, data, after = "empty or cut off", "a tar header should be", "unexpected end", "after its end"
    at_start = {
        "zero_bytes": (b"", cut),
        "short_html": (b"<h1>404</h1>", cut),
        "html": (b"<!DOCTYPE html><title>404 Not Found</title>".ljust(2048), other),
        "text": (b"not a tar\n" * 99, other),
        "image": (ARITHMETIC_JPEG * 5, other),
        "random": (noise, other),
        "gzip": (gzip.compress(noise, mtime=0), other),
        "bzip2": (bz2.compress(noise), other),
        "cut_in_first_header": (whole[:300], cut),
        "cut_in_first_data": (whole[:600], data),
        "cut_in_long_name": (long_name[:1024], cut),
        "cut_after_first_sample": (whole[:2048], cut),
    }
    in_first_of_c = {
        "cut_in_header": (whole[: 4096 + 300], cut),
        "cut_in_data": (whole[: 4096 + 600], data),
        "cut_between_samples": (whole[:4096], cut),
        "flipped_name": (flip(whole, 4096 + 3), other),
        "flipped_type": (flip(whole, 4096 + 156), other),
        "sparse_map_of_letters": (
            whole[:4096] + tar((special("c.jpg", b"0", **{"GNU.sparse.map": "0,x"}), b"")),
            "'x'",
        ),
        "sparse_map_cut": (whole[:4096] + header("c.jpg", 0, tarfile.GNUTYPE_SPARSE, 1), "index out of range"),
        "hole": (whole[:4096] + bytes(512) + whole[4608:], after),
    }
    after_first_of_c = {
        "huge_size": (whole[:4096] + header("c.jpg", 1 << 62) + whole[4608:], data),
        "huge_size_unread": (whole[:4096] + header("c.bin", 1 << 62) + whole[4608:], data),
        "cut_in_sample": (whole[: 4096 + 1024], cut),
        "negative_size": (whole[:4096] + header("c.jpg", -2048) + whole[4608:], "backwards"),
        "cut_in_padding": (whole[: 6144 - 1], data),
        "without_end": (whole[:6144], cut),
        "joined": (whole + whole, after),
    }
    a, b = ("a", Status.GOOD), ("b", Status.GOOD)
    return {
        name: (content, Expected(samples, error))
        for cases, samples in ((at_start, ()), (in_first_of_c, (a,)), (after_first_of_c, (a, b)))
        for name, (content, error) in cases.items()
    }


if __name__ == "__main__":
    print(f"{len(make(Path(sys.argv[1])))} tars in {sys.argv[1]}")
