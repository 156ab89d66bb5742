"""Tokens are open_clip's, whatever the text; and no text takes long, or leaves much behind."""

import pickle
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.config import Recipe
from reinforce.models import tokenizer as tokenizers
from reinforce.models.captioner import Captioner
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip
from reinforce.models.teacher import Teacher
from reinforce.models.tokenizer import LONG, MAX_LETTERS, MAX_WORDS, SimpleTokenizer, get_tokenizer
from tests import tiny
from train import students

CPU = torch.device("cpu")


@cache
def both() -> tuple[Any, Any]:
    """Ours and open_clip's."""
    return get_tokenizer("ViT-B-32"), open_clip.get_tokenizer("ViT-B-32")


@cache
def vocabulary() -> list[str]:
    """What its tokens are as text, the longest first."""
    theirs = both()[1]
    found = {theirs.decode([number]).strip() for number in range(512, theirs.vocab_size - 2)}
    return sorted((text for text in found if "\N{REPLACEMENT CHARACTER}" not in text), key=len, reverse=True)


def same(text: str, context_length: int | None = None) -> bool:
    ours, theirs = both()
    return torch.equal(ours(text, context_length), theirs(text, context_length))


# Words of letters that say nothing, of parts that the vocabulary has, of one part again and again.
letters = st.text(st.characters(categories=["L", "N", "P", "S", "M"]), min_size=1, max_size=LONG + 50)
parts = st.lists(st.integers(0, 40_000), min_size=1, max_size=60).map(
    lambda numbers: "".join(vocabulary()[number % len(vocabulary())] for number in numbers)
)
again = st.tuples(st.text(st.characters(categories=["L", "P"]), min_size=1, max_size=4), st.integers(1, 1500)).map(
    lambda of: of[0] * min(of[1], 1500 // len(of[0]))
)
words = st.one_of(letters, parts, again)


@given(st.lists(words, min_size=1, max_size=4).map(" ".join), st.sampled_from([None, 3, 77, 200]))
@settings(deadline=None, max_examples=60)
def test_tokens_are_those_of_open_clip(text: str, context_length: int | None) -> None:
    assert same(text, context_length)


@given(st.text(max_size=400))
@settings(deadline=None, max_examples=60)
def test_so_they_are_of_any_text(text: str) -> None:
    assert same(text)


@given(st.text(st.characters(max_codepoint=127), max_size=400))
@settings(deadline=None, max_examples=120)
def test_so_they_are_of_texts_that_look_plain(text: str) -> None:
    """Which may have HTML's entities, tabs and control characters in them."""
    assert same(text)


@pytest.mark.parametrize("text", ["", "a dog", "A caf&eacute; &amp; bar <end_of_text> x", "word " * 3000, "don't" * 99])
def test_so_they_are_of_ordinary_ones(text: str) -> None:
    assert same(text)


def test_the_longest_tokens_that_there_are_fill_a_text() -> None:
    """Fewer tokens a letter than any other word has: it is read in longer and longer parts."""
    text = "".join(part for part in vocabulary()[:400] if part.isalpha())
    assert len(text) > 4 * LONG and same(text)
    assert same("." * 20_000) and same("a" * 3000)


@pytest.mark.parametrize("text", ["qxzjvkwyphf" * 3000, "ab" * MAX_LETTERS, "x y " * 500_000, "&amp;" * 300_000])
def test_no_text_takes_long(text: str) -> None:
    start = time.monotonic()
    tokens = get_tokenizer("ViT-B-32")([text])
    assert time.monotonic() - start < 5 and int(tokens[0, -1]) == 49407


def test_words_that_are_remembered_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "MAX_WORDS", 500)
    ours = get_tokenizer("ViT-B-32")
    expected = [tokens.tolist() for tokens in ours(["a dog on <start_of_text>", "word17"])]
    for first in range(0, 3000, 30):
        ours(
            [
                f"{'abcdefghij'[number % 10]}{'qrstuvwxyz'[number // 10 % 10]}{'klm' * (number // 100)}"
                for number in range(first, first + 30)
            ]
        )
        assert len(ours.cache) <= 530
    assert [tokens.tolist() for tokens in ours(["a dog on <start_of_text>", "word17"])] == expected
    long = "qxzjvkwyphf" * 300
    ours([long])
    assert max(map(len, ours.cache)) < LONG
    assert MAX_WORDS * 155 < 11_000_000  # bytes


def test_every_door_has_it(recipe: Recipe, tmp_path: Path) -> None:
    text = "qxzjvkwyphf" * 3000
    student = students.create(tiny.student(tmp_path / "student"), 0, None)
    doors = [
        Teacher(recipe.teachers["vit"], 4, CPU).frozen.tokenizer,
        Captioner(recipe.captioners["coca"], 4, CPU).frozen.tokenizer,
        FrozenModel(recipe.teachers["conv"], CPU).tokenizer,
        student.tokenizer,
    ]
    for door in doors:
        assert type(door) is SimpleTokenizer and type(door).__name__ == open_clip.tokenizer.SimpleTokenizer.__name__
        assert door([text]).shape == (1, door.context_length)
        assert torch.equal(pickle.loads(pickle.dumps(door))(["a dog"]), door(["a dog"]))  # to a loader's workers
