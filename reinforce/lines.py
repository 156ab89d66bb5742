"""What is shown to people: lines of plain text, in which no foreign name can forge a line or steer a terminal, and
addresses without their secrets."""

import logging
import re
import sys
import traceback
from typing import TextIO

# Control characters, marks of direction, line and paragraph separators, what has no width, halves of a character.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/?#\"<>]*@)?"
    r"(?P<path>(?:(?!::)[^\s?#\"<>])*)(?P<query>\?(?:(?!::)(?!'(?!\w))[^\s\"<>])*)?"
)
_OF_THE_WEB = ("http", "ftp", "sftp", "ssh", "webdav")  # of others, such as abfs://, a name before @ is no secret


def plain(text: object) -> str:
    """One line: what cannot be seen is written as Python writes it."""
    return _UNSEEN.sub(_escaped, str(text))


def without_secrets(text: str) -> str:
    """A text in whose URLs `***` stands for user and password, and for a query, which may be a signature."""
    return _ADDRESS.sub(_hidden, text) if "://" in text else text


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, each as one, on stdout or another stream."""
    for line in lines or ("",):
        print(plain(without_secrets(str(line))), file=file)


def say_error(error: object) -> None:
    """Print what went wrong on stderr; the message may have lines of its own."""
    say(*f"error: {error}".split("\n"), file=sys.stderr)


class LogFormatter(logging.Formatter):
    """A record as one line; a traceback below it has lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return plain(without_secrets(super().formatMessage(record)))

    def formatException(self, ei: object) -> str:  # noqa: N802
        return _block(super().formatException(ei))  # type: ignore[arg-type]


def show_traceback(error: BaseException) -> None:
    """On stderr, as Python shows it, without secrets and control characters."""
    print(_block("".join(traceback.format_exception(error))), file=sys.stderr, end="")


def _block(text: str) -> str:
    return "\n".join(map(plain, without_secrets(text).split("\n")))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _hidden(match: re.Match[str]) -> str:
    scheme, user, path, query = match["scheme"], match["user"] or "", match["path"], match["query"] or ""
    secret = ":" in user or scheme.lower().startswith(_OF_THE_WEB)
    return scheme + ("***@" if user and secret else user) + path + ("?***" if "=" in query else query)
