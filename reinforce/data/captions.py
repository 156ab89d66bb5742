"""The files of a sample that hold captions or a class in, texts or a label out."""

import json
from typing import Any

from reinforce.config import CaptionFiles
from reinforce.data.status import Status
from reinforce.errors import SampleError

EXTENSIONS = ("txt", "json")
LABEL = "cls"  # the number of a class: no caption, but a file that sets of images have


def captions(key: str, parts: dict[str, bytes], files: CaptionFiles) -> tuple[str, ...]:
    """Those of txt, then those of json, equal ones once, runs of white space as one space.

    Raises SampleError where there is none.
    """
    texts = _of_txt(key, parts["txt"], files.lines) if "txt" in parts else []
    fault, tree = "", None
    if "json" in parts:
        try:
            tree = json.loads(parts["json"])
            texts += _of_json(tree, files.keys)
        except (ValueError, RecursionError) as error:  # matters only where there is no other caption
            fault = str(error)
    found = tuple(dict.fromkeys(caption for text in texts if (caption := " ".join(text.split()))))
    if found:
        return found
    if fault:
        raise SampleError(Status.CAPTION_JSON_BROKEN, f"{key}.json: {fault}; repair it, or add .txt")
    if texts:
        raise SampleError(Status.EMPTY_CAPTION, f"{key}: its captions are empty; fill or remove them")
    raise SampleError(Status.MISSING_CAPTION, f"{key}: has no .txt, and no captions in .json; {_remedy(parts, tree)}")


def label(parts: dict[str, bytes]) -> int:
    """The class in `.cls`, or else in `.json`: a number, or an object with one. Raises ValueError, RecursionError."""
    if LABEL in parts or "json" not in parts:
        return int(parts.get(LABEL, b"").decode())
    found = json.loads(parts["json"])
    if isinstance(found, dict):
        found = next((found[name] for name in ("cls", "label", "class") if name in found), None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError("holds no label")
    return found


def num_lines(txt: bytes) -> int:
    """How many captions it would be, a line each."""
    return sum(bool(line.strip()) for line in txt.splitlines()) if b"\n" in txt else 1


def _of_txt(key: str, data: bytes, lines: bool) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(
            Status.CAPTION_NOT_UTF8, f"{key}.txt: byte {error.start} is not UTF-8; convert it to UTF-8"
        ) from None
    if "\0" in text:  # UTF-16 without its mark, or a binary file
        raise SampleError(Status.CAPTION_NOT_TEXT, f"{key}.txt: holds NUL characters; convert it to UTF-8 text")
    return text.splitlines() if lines else [text]


def _of_json(tree: Any, keys: tuple[str, ...]) -> list[str]:
    if isinstance(tree, dict):
        values = [tree[name] for name in keys if tree.get(name) is not None]
        tree = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not isinstance(tree, list):
        raise ValueError(f"is neither a list of captions nor an object with {' or '.join(map(repr, keys))}")
    for text in tree:
        if not isinstance(text, str) or "\0" in text:
            raise ValueError("holds a caption that is not text")
        text.encode()  # JSON can spell half a surrogate pair, which no store and no tokenizer can hold
    return tree


def _remedy(parts: dict[str, bytes], tree: Any) -> str:
    """What to do about a sample without captions, whose metadata are `tree`."""
    fields = [name for name, value in tree.items() if isinstance(value, str)] if isinstance(tree, dict) else []
    if fields:
        few = ", ".join(fields[:6]) + (", .." if len(fields) > 6 else "")
        how = "--set caption_keys=KEY (eval: --caption-key KEY)"
        return f"its .json has texts under {few}: name the right ones with {how}, or add .txt"
    if LABEL in parts:
        return "it has a class: --set num_original_captions=0 reinforces images that have no captions"
    return "add one"
