"""What the machine and the network do wrong is a sentence: full disks, cut connections, servers that say no."""

import errno
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reinforce.__main__ import app
from reinforce.config import Recipe, RunOptions
from reinforce.data import shards
from reinforce.data.copies import local_copy
from reinforce.data.remote import as_os_errors
from reinforce.data.shards import expand
from reinforce.errors import ConfigError, ShardError, Unwritable
from reinforce.run import driver
from reinforce.run.on_ray import _absolute
from reinforce.store import objects
from reinforce.store.store import Store
from reinforce.terminal import errors_as_sentences
from tests import broken, tiny
from tests.conftest import Reinforced
from tests.processes import ROOT, here
from train.__main__ import app as train
from train.evaluation.sets import EvalSet

RUN = RunOptions(workers="0", device="cpu")


class Server(http.server.SimpleHTTPRequestHandler):
    """`cut` tars end in the middle, `secret` ones may not be had."""

    def log_message(self, *told: Any) -> None: ...

    def end_headers(self) -> None:
        if "links" in self.path:
            self.send_header("Accept-Ranges", "none")
        super().end_headers()

    def do_GET(self) -> None:
        if "secret" in self.path:
            self.send_error(401)
        elif "cut" in self.path:
            data = Path(self.directory, self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    for name in ("whole", "cut", "secret"):
        tiny.tar(tmp_path / f"served/{name}.tar", 5)
    handler = functools.partial(Server, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_connection_that_breaks_costs_its_own_shard(served: str, recipe: Recipe, tmp_path: Path) -> None:
    tars = "::".join(f"{served}/{name}.tar" for name in ("cut", "whole", "secret", "nowhere"))
    report = driver.run(tars, str(tmp_path / "s"), recipe, RUN)
    told = {failure.shard: failure for failure in report.failed}
    assert report.done == 1 and set(told) == {"cut", "secret", "nowhere"}
    assert told["cut"].attempts == 3 and "ClientPayloadError" in told["cut"].reason and "cut.tar" in told["cut"].reason
    assert "401" in told["secret"].reason or "Unauthorized" in told["secret"].reason
    assert "nowhere.tar" in told["nowhere"].reason


@pytest.mark.parametrize("name", ["cut", "secret", "nowhere"])
def test_a_training_says_what_it_cannot_fetch(served: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=rf"{name}.tar: cannot be fetched to .*; check the address, your access and"):
        local_copy(f"{served}/{name}.tar", str(tmp_path / "cache"), None)
    assert not list((tmp_path / "cache").glob("*"))  # nothing half is left, to be taken for the whole
    assert Path(local_copy(f"{served}/whole.tar", str(tmp_path / "cache"), None).path).stat().st_size


def test_hard_links_behind_a_server_that_gives_whole_files_only(served: str, tmp_path: Path) -> None:
    data = (tmp_path / "served/whole.tar").read_bytes()[:-10240]
    link = broken.hard_link("z.jpg", "whole-0-000.jpg").tobuf()
    (tmp_path / "served/links.tar").write_bytes(data + link + bytes(10240))
    with pytest.raises(ShardError, match="it has hard links, and the server does not give parts of it"):
        list(shards.read(*expand(f"{served}/links.tar")))
    assert [sample.key for sample in shards.read(*expand(str(tmp_path / "served/links.tar")))][-1] == "z"


def test_faults_of_ours_stay_what_they_are() -> None:
    with pytest.raises(KeyError), as_os_errors():
        raise KeyError("a fault of ours")
    foreign = type("ClientError", (Exception,), {"__module__": "botocore.exceptions"})
    with pytest.raises(OSError, match="^ClientError: no credentials$"), as_os_errors():
        raise foreign("no credentials")
    missing = FileNotFoundError(errno.ENOENT, "No such file", "x")
    with pytest.raises(FileNotFoundError), as_os_errors():
        raise missing


def test_a_full_disk_ends_a_run_at_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = "::".join(tiny.tar(tmp_path / f"{i:05d}.tar", 4, seed=i) for i in range(2))
    opened, room = objects._opened, [9]

    def full(partial: str) -> Any:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(partial)

    monkeypatch.setattr(objects, "_opened", full)
    with pytest.raises(Unwritable, match=r"s takes no more: No space left on device; free some room .*run again"):
        driver.run(tars, str(tmp_path / "s"), recipe, RUN)
    monkeypatch.setattr(objects, "_opened", opened)
    assert driver.run(tars, str(tmp_path / "s"), recipe, RUN).done == 2


@pytest.mark.skipif(not shutil.which("setpriv"), reason="root writes anywhere, unless setpriv takes that from it")
def test_a_folder_that_may_not_be_written_is_told_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    asked = ["--store", str(closed / "s"), "--recipe", str(tmp_path / "recipe.json"), "--workers", "0"]
    rights = "-dac_override,-dac_read_search"
    done = subprocess.run(
        ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", sys.executable, "-m", "reinforce", "run"]
        + [tiny.tar(tmp_path / "00000.tar", 4), *asked],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {closed}: Permission denied; ask for the right to it, or write somewhere else\n"


@pytest.mark.parametrize("command", ["info", "verify", "report"])
def test_a_store_of_no_known_kind_is_a_sentence(command: str) -> None:
    code, out, err = here(app, command, "foo://bar/x")
    assert (code, out, err) == (
        2,
        "",
        "error: foo://bar/x: no file system is called 'foo'; try s3://, gs:// or hf://\n",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system wants root")
def test_a_training_on_a_full_disk(reinforced: Reinforced, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        (small / "fill").write_bytes(bytes(60 << 10))
        asked = ["--shards", reinforced.shards, "--store", reinforced.store, "--student", reinforced.student]
        # TensorBoard writes in a thread of its own, which would say it a second time.
        few = ("global_batch_size=8", "steps=1", "workers=0", "streams=4", "report_to=[]")
        code, _, err = here(train, "fit", *asked, *(f"--set={name}" for name in few), "--out", str(small / "run"))
        assert code == 1 and f"{small / 'run'}: No space left on device; free some room there" in err, err
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; ask for the right to it"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system; it can only be read"),
        (OSError("ClientError: 503"), "ClientError: 503; see that it can be reached, and run the same command again"),
    ],
)
def test_what_the_machine_does_is_said(error: OSError, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors_as_sentences():
        raise error
    assert ended.value.code == 1 and f"error: {told}" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`clip-reinforce recipe sample | head -1`."""
    command = f"{sys.executable} -m reinforce recipe sample | head -c 20"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(done.stdout) == 20 and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_home_is_the_same_place_for_all(
    reinforced: Reinforced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a shell leaves `~` to us: `--store=~/s`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert _absolute("~/s") == Store("~/s").objects.root == str(tmp_path / "s")
    assert _absolute("s3://b/~/s") == "s3://b/~/s"
    (tmp_path / "student").symlink_to(reinforced.student)
    (tmp_path / "store").symlink_to(reinforced.store)
    asked = ["--shards", reinforced.shards, "--store=~/store", "--student=~/student", "--out=~/run"]
    settings = [f"--set={name}" for name in ("global_batch_size=8", "steps=1", "workers=0", "streams=4")]
    code, _, err = here(train, "fit", *asked, *settings)
    assert code == 0, err
    assert (tmp_path / "run/student").is_dir()
    assert here(train, "report", str(tmp_path / "run"), "--out=~/page.html")[0] == 0
    assert here(app, "export", "keys", "~/store", "--shards", reinforced.shards, "--out=~/keys")[0] == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "keys").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("x/0.tar.gz", "x/0.tar.gz is compressed, .* unpack it to NAME.tar"),
        ("https://h/0.tgz?download=true", r"0.tgz.\*\*\* is compressed"),
        ("pipe:aws s3 cp s3://b/0.tar -", "pipes are not read; name the file itself, as s3://BUCKET/NAME.tar"),
    ],
)
def test_what_is_no_shard_is_told_why(pattern: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/0.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=told):
        expand(pattern)


def test_an_address_may_be_signed(served: str, recipe: Recipe, tmp_path: Path) -> None:
    [shard] = expand(f"{served}/whole.tar?X-Signature=a/b.c&download=true")
    assert shard.name == "whole"
    report = driver.run(f"{served}/whole.tar?X-Signature=a/b.c&download=true", str(tmp_path / "s"), recipe, RUN)
    assert (report.done, report.valid) == (1, 5)


def test_a_page_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("<!doctype html>\n<p>wait")
    with pytest.raises(ConfigError, match=r"is a page about the file; .* give .../resolve/main"):
        EvalSet(str(tmp_path))
