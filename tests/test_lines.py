"""What is shown holds no foreign line, no control character and no secret, at whatever door."""

import ast
import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from reinforce import __main__ as reinforce
from reinforce import page
from reinforce.config import Recipe, RunOptions
from reinforce.data.status import Status
from reinforce.errors import ConfigError, Corrupt, MissingExtra, ReinforceError, SampleError, ShardError
from reinforce.lines import LogFormatter, plain, say, without_secrets
from reinforce.run import driver
from reinforce.run.reports import RunReport, ShardReport
from tests import tiny
from tests.broken import members, tar
from tests.processes import ROOT
from train import __main__ as train
from train import checkpoint
from train.comkd.adapt import AdaptConfig
from train.config import DataConfig, TrainConfig

FORGED = "a\x1b]0;title\x07\x1b[2K\rb\nerror: all is lost\u202ejpg\u2028c\x9b31m"
URLS = {
    "https://user:pass@host/a.tar": "https://***@host/a.tar",
    "https://token@host:8080/a": "https://***@host:8080/a",
    "s3://key:secret@bucket/{0..9}.tar": "s3://***@bucket/{0..9}.tar",
    "https://h/a.tar?X-Amz-Signature=ab'c&x=%2F::https://g/b.tar?sig=z": "https://h/a.tar?***::https://g/b.tar?***",
    "simplecache::https://u:p@h/a?b=c": "simplecache::https://***@h/a?***",
    "'https://h/a.tar?sig=secret': cannot be read": "'https://h/a.tar?***': cannot be read",
    '{"url": "gs://b/a?token=t", "n": 1}': '{"url": "gs://b/a?***", "n": 1}',
    # no secrets
    "abfs://container@account.dfs.core.windows.net/a": "abfs://container@account.dfs.core.windows.net/a",
    "s3://bucket/who@where/0000?.tar": "s3://bucket/who@where/0000?.tar",
    "a?b=c @ d": "a?b=c @ d",
    "/data/a@b?c=d.tar": "/data/a@b?c=d.tar",
}


@pytest.mark.parametrize("text", URLS)
def test_addresses_have_no_secrets(text: str) -> None:
    assert without_secrets(text) == URLS[text]
    assert without_secrets(URLS[text]) == URLS[text]


@given(st.text())
def test_a_line_is_one_line_that_can_be_written(text: str) -> None:
    line = plain(text)
    assert (len(line.splitlines()) <= 1 and line.isprintable()) or set(line) - {" "}
    assert not {*line} & {*map(chr, range(32)), "\x7f", "\x9b", "\u202e", "\u2028", "\u200f", "\ud800"}
    assert plain(line) == line
    line.encode()


@pytest.mark.parametrize("text", ["犬 🐕 כלב e\u0301 un café", "👩\u200d🚀", "می\u200cخواهم", ""])
def test_what_can_be_read_stays(text: str) -> None:
    assert plain(text) == text


def test_lines_are_said_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    say("one", FORGED, "https://u:p@h/")
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and out.splitlines()[1] == plain(FORGED) and "\x1b" not in out and "u:p" not in out


@pytest.mark.parametrize("kind", [ConfigError, Corrupt, MissingExtra, ShardError])
def test_an_error_has_its_own_lines_alone(kind: type[ReinforceError]) -> None:
    error = kind(f"{FORGED} https://u:p@h/a?sig=b")
    assert str(error) == plain(FORGED) + " https://***@h/a?***"
    assert str(ConfigError("one", f"  {FORGED}")) == f"one\n  {plain(FORGED)}"
    assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)


def test_that_of_a_sample_too() -> None:
    error = SampleError(Status.EMPTY_IMAGE, FORGED)
    assert (str(error), error.message, error.status) == (plain(FORGED), plain(FORGED), Status.EMPTY_IMAGE)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.status) == (plain(FORGED), Status.EMPTY_IMAGE)


def test_a_record_of_a_log_is_one_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s at https://u:p@h/", (FORGED,), None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == f"WARNING {plain(FORGED)} at https://***@h/"


def test_settings_are_saved_without_secrets() -> None:
    """As JSON: in config.json, in a checkpoint, for wandb. Signed anew, they are the same training."""
    url, other = "https://u:secret@h/0.tar?sig=secret", "https://v:secret@h/0.tar?sig=other"
    for make in (
        lambda url: TrainConfig(shards=url, store=url, eval_sets={"a": url}),
        lambda url: TrainConfig(data=[DataConfig(shards=url, store=url)]),
        lambda url: AdaptConfig(data=url, eval_sets={"a": url}),
    ):
        config: Any = make(url)
        assert "secret" not in config.model_dump_json() + json.dumps(config.model_dump(mode="json"))
        assert config.but() == config  # the settings themselves have them
        assert checkpoint.differences(config.model_dump(mode="json"), make(other), Path()) == []


def test_a_report_has_none() -> None:
    report = RunReport("s", 1, 0)
    report.add(ShardReport("0", error=f"OSError: 403, url=https://u:secret@h/0.tar?sig=secret {FORGED}"), 3)
    assert report.failed[0].reason == f"OSError: 403, url=https://***@h/0.tar?*** {plain(FORGED)}"


def test_a_page_has_none(tmp_path: Path) -> None:
    template = tmp_path / "template.html"
    template.write_text("<style>{{style}}</style><script>{{script}}</script>{{policy}}{{facts}}")
    page.write(str(tmp_path / "page.html"), template, {"store": "https://u:secret@h/s?sig=secret", "b": "c"})
    text = (tmp_path / "page.html").read_text()
    assert "secret" not in text and '"store": "https://***@h/s?***", "b": "c"' in text


def command(package: Any, *words: str) -> str:
    """Everything that a command shows."""
    done = CliRunner().invoke(package.app, list(words))
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def hostile(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store and its tar, whose keys and captions are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    forged = FORGED.replace(".", "")
    files = [m for i in range(4) for m in members(f"{i}{forged}", jpg=tiny.picture(i), txt=forged.encode())]
    files += members(f"bad{forged}", jpg=b"<html>", txt=b"x") + members(f"mute{forged}", jpg=tiny.picture(9))
    (folder / "00000.tar").write_bytes(tar(*files))
    driver.run(f"{folder}/00000.tar", f"{folder}/store", recipe, RunOptions(workers="0", device="cpu", max_invalid=1))
    return folder / "store", folder / "00000.tar"


def test_no_command_passes_on_what_a_tar_says(hostile: tuple[Path, Path], recipe: Recipe, tmp_path: Path) -> None:
    store, shards = map(str, hostile)
    own = tmp_path / "recipe.json"
    own.write_text(recipe.model_dump_json())
    run = ("run", shards, "--store", str(tmp_path / "s"), "--recipe", str(own), "--workers", "0", "--device", "cpu")
    for words in (
        (reinforce, "info", store, "--quarantine"),
        (reinforce, *run),  # refused
        (reinforce, *run, "--json"),
        (reinforce, "verify", store, "--shards", shards, "--replay", "3"),
        (
            train,
            "fit",
            "--shards",
            shards,
            "--set",
            "distill=0",
            "--set",
            "global_batch_size=64",
            "--out",
            f"{tmp_path}/t",
        ),
    ):
        shown = command(*words)
        lines = [line for line in shown.splitlines() if line.startswith("error: all is lost")]
        assert shown and not lines and not {*shown} & {"\x1b", "\x07", "\u202e", "\u2028", "\x9b"}, (words, shown)


def test_no_command_shows_a_secret(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    store, _ = map(str, hostile)
    url = "http://user:secret@127.0.0.1:9/0.tar?sig=secret"  # where nobody listens
    for words in (
        (reinforce, "run", url, "--store", store, "--workers", "0", "--device", "cpu", "--attempts", "1"),
        (reinforce, "run", url, "--store", store, "--workers", "0", "--device", "cpu", "--attempts", "1", "--json"),
        (reinforce, "info", "http://user:secret@127.0.0.1:9/s"),
        (reinforce, "verify", store, "--shards", url),
        (train, "fit", "--shards", url, "--set", "distill=0", "--out", f"{tmp_path}/t"),
        (train, "eval", tiny.student(tmp_path / "student"), f"a={url}"),
    ):
        shown = command(*words)
        assert shown and "secret" not in shown, (words, shown)


def test_a_traceback_has_neither() -> None:
    script = (
        "import typer; from reinforce import terminal; app = typer.Typer(pretty_exceptions_enable=False)\n"
        "@app.command()\n"
        "def fail():\n"
        "    try: raise KeyError('https://u:secret@h/a?sig=secret')\n"
        "    except KeyError as error: raise RuntimeError('\\x1b[2K') from error\n"
        "terminal.start(app)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "RuntimeError: \\x1b[2K" in ended.stderr and "KeyError: 'https://***@h/a?***'" in ended.stderr
    assert "\x1b" not in ended.stderr and ended.returncode == 1
    assert "secret" not in "".join(line for line in ended.stderr.splitlines() if "raise" not in line)


def test_nothing_is_printed_elsewhere() -> None:
    """`print` and the streams have one room; export as JSON lines is data, and not for people."""
    for path in [*(ROOT / "reinforce").rglob("*.py"), *(ROOT / "train").rglob("*.py")]:
        if path.name == "lines.py" or path.match("exchange/commands.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")), path
