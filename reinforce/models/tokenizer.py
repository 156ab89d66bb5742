"""open_clip's tokenizers, in a time and a memory that texts cannot make endless.

open_clip merges the letters of a word pair by pair, over the whole word: 32,000 letters take a minute, of which a model
reads 77 tokens. And it remembers every word that it has ever seen.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from reinforce.errors import ConfigError, MissingExtra
from reinforce.models.open_clip import open_clip
from reinforce.models.weights import OFFLINE

MAX_LETTERS = 1 << 16  # of a text that is looked at
LONG = 256  # letters of a word that is read in part, if that gives enough tokens
MAX_WORDS = 1 << 16  # that are remembered
_LOWER = open_clip.tokenizer.get_clean_fn("lower")


class SimpleTokenizer(open_clip.tokenizer.SimpleTokenizer):
    """Gives the tokens that open_clip's gives. It stops where a model reads no further, and of a long word it takes as
    many letters as give twice the tokens that are read: what lies beyond them does not change these.

    A manifest has its name, which is open_clip's.
    """

    cache: dict[str, str]
    _most: int = open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH  # tokens that are read

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Texts -> int64 (n, context_length). Not for two threads at a time."""
        self._most = context_length or self.context_length
        tokens: Tensor = super().__call__(texts, context_length)
        if len(self.cache) > MAX_WORDS:
            self.cache = {word: word for word in map(self.decoder.__getitem__, self.all_special_ids)}
        return tokens

    def encode(self, text: str) -> list[int]:
        """Tokens of a text: at least as many as are read, where it has so many."""
        if self.reduction_fn is not None:  # it chooses among all
            return list(super().encode(text))
        tokens: list[int] = []
        for word in self.pat.finditer(self.clean_fn(text)):
            letters = "".join(self.byte_encoder[byte] for byte in word[0].encode("utf-8"))
            tokens += [self.encoder[part] for part in self._parts(letters)]
            if len(tokens) >= self._most:
                break
        return tokens

    def _parts(self, letters: str) -> list[str]:
        length = LONG
        while length < len(letters):
            part = letters[:length]
            found: list[str] = self.bpe(part).split(" ")
            self.cache.pop(part, None)
            if len(found) >= 2 * self._most:
                return found
            length *= 2
        return list(self.bpe(letters).split(" "))


def get_tokenizer(model: str) -> Any:
    """open_clip's tokenizer of a model; a vocabulary named in a model folder's config is looked up in that folder.

    Raises MissingExtra where it is one of transformers' (SigLIP's are) and that is not there, ConfigError where its
    files cannot be had.
    """
    own = {}
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        text_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        vocabulary = text_cfg.get("tokenizer_kwargs", {}).get("bpe_path")
        if vocabulary and not (folder / vocabulary).is_file():
            raise ConfigError(f"no {vocabulary} in {folder}, the words of its texts: copy a model's folder as a whole")
        if vocabulary:
            own = {"bpe_path": str(folder / vocabulary)}
    try:
        tokenizer = open_clip.get_tokenizer(model, **own)
    except ImportError as error:
        raise MissingExtra(
            f"the tokenizer of {model} needs {error.name}, which is not installed: pip install 'clip-reinforce[siglip]'"
        ) from error
    except (OSError, ValueError) as error:  # what transformers raises for files that it cannot get or read
        raise ConfigError(f"the tokenizer of {model} cannot be loaded: {error}; {OFFLINE}") from error
    if hasattr(tokenizer, "clean_fn"):
        tokenizer.clean_fn = partial(_cleaned, tokenizer.clean_fn)
    if type(tokenizer) is open_clip.tokenizer.SimpleTokenizer:
        tokenizer.__class__ = SimpleTokenizer
        tokenizer._most = tokenizer.context_length
    return tokenizer


def _cleaned(clean: Callable[[str], str], text: str) -> str:
    """As open_clip's `clean` cleans it. Most texts are plain, which have nothing that ftfy or HTML could mend."""
    text = text[:MAX_LETTERS]
    if clean is _LOWER and text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    return clean(text)
