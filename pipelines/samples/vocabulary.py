"""A small byte-pair vocabulary in open_clip's own format (Sennrich et al. 2016, "Neural Machine Translation of Rare
Words with Subword Units"), so that `open_clip.tokenizer.SimpleTokenizer(bpe_path=...)` reads it.
"""

import collections
import gzip
import itertools
from collections.abc import Iterable

import regex

from reinforce.models.open_clip import open_clip

HEADER = "#version: byte-pair merges for open_clip.tokenizer.SimpleTokenizer"
NUM_OTHERS = 512 + 2  # the bytes, alone and at the end of a word; start and end of text


def learn_vocabulary(captions: Iterable[str], size: int) -> bytes:
    """The gzip file that `bpe_path` names, of at most `size` tokens learnt from `captions`.

    Any text can be encoded with it, since every byte is a token.
    """
    words = _words(captions)
    merges: list[tuple[str, str]] = []
    while len(merges) < size - NUM_OTHERS:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None:
            break
        merges.append(best)
        words = collections.Counter({_merge(word, best): count for word, count in words.items()})
    # No newline at the end: the tokenizer would read a last, empty merge there.
    lines = "\n".join([HEADER, *(" ".join(merge) for merge in merges)])
    return gzip.compress(lines.encode(), mtime=0)


def _words(captions: Iterable[str]) -> collections.Counter[tuple[str, ...]]:
    rules = open_clip.SimpleTokenizer()
    words: collections.Counter[tuple[str, ...]] = collections.Counter()
    for caption in captions:
        for token in regex.findall(rules.pat, rules.clean_fn(caption)):
            symbols = [rules.byte_encoder[byte] for byte in token.encode()]
            words[(*symbols[:-1], symbols[-1] + "</w>")] += 1
    return words


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + step]))
        i += step
    return tuple(merged)
