"""Copies of remote tars, of a real server on loopback."""

import functools
import hashlib
import http.server
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from reinforce.data import copies
from reinforce.data.copies import local_copy
from reinforce.errors import ShardError
from tests import tiny


class Server(http.server.SimpleHTTPRequestHandler):
    """Says the version of a file, and notes what was asked."""

    asked: list[str]

    def log_message(self, *_: object) -> None: ...

    def send_head(self):
        self.asked.append(f"{self.command} {self.path[1:]}")
        return super().send_head()

    def end_headers(self) -> None:
        path = Path(self.directory, self.path[1:].partition("?")[0])
        if path.is_file():
            self.send_header("ETag", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
        super().end_headers()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A server of three tars of equal length: its address, its folder, and what it was asked."""
    folder, asked = tmp_path / "served", list[str]()
    folder.mkdir()
    tiny.tar(folder / "0.tar", 3)
    data = (folder / "0.tar").read_bytes()
    for name in ("a", "b", "c"):
        (folder / f"{name}.tar").write_bytes(data.replace(b"picture 0", f"picture {name}".encode()))
    handler = type("Handler", (Server,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(url=url, folder=folder, asked=asked, size=len(data), server=server)
        server.shutdown()


def there(folder: Path) -> list[str]:
    """The names of the tars whose copies are in a folder."""
    return sorted(path.name.split("-")[2] for path in folder.glob("*-*-*"))


def test_a_copy_is_fetched_once_and_again_where_the_server_has_another(web: SimpleNamespace, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = local_copy(f"{web.url}/a.tar?signature=x", str(cache), None)
    assert Path(first.path).read_bytes() == (web.folder / "a.tar").read_bytes() and first.path.endswith("-a.tar")
    assert local_copy(f"{web.url}/a.tar?signature=x", str(cache), None).path == first.path
    assert [of.split()[0] for of in web.asked].count("GET") == 1
    shutil.copy(web.folder / "b.tar", web.folder / "a.tar")  # as long as before
    second = local_copy(f"{web.url}/a.tar?signature=x", str(cache), None)
    assert Path(second.path).read_bytes() == (web.folder / "b.tar").read_bytes()


@pytest.mark.parametrize("damage", ["page", "cut", "empty"])
def test_a_copy_that_is_no_tar_is_fetched_again(web: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    path = Path(local_copy(f"{web.url}/a.tar", str(tmp_path / "cache"), None).path)
    data = {"page": b"<html>".ljust(web.size), "cut": path.read_bytes()[:-512], "empty": b""}[damage]
    path.write_bytes(data)
    again = local_copy(f"{web.url}/a.tar", str(tmp_path / "cache"), None)
    assert Path(again.path).read_bytes() == (web.folder / "a.tar").read_bytes()


def test_a_page_in_place_of_a_tar_is_not_kept(web: SimpleNamespace, tmp_path: Path) -> None:
    (web.folder / "page.tar").write_text("<html>please log in</html>" * 99)
    with pytest.raises(
        ShardError, match=r"page.tar: cannot be fetched to .*: the 2574 bytes that came are no tar of 2574"
    ):
        local_copy(f"{web.url}/page.tar", str(tmp_path / "cache"), None)
    assert there(tmp_path / "cache") == []


def test_the_least_recently_used_goes_and_nothing_else(web: SimpleNamespace, tmp_path: Path) -> None:
    cache, room = tmp_path / "cache", 2 * web.size + 100
    cache.mkdir()
    (cache / "mine.tar").write_bytes(bytes(10 * web.size))  # not a copy: not counted, not removed
    for name in ("a", "b", "a", "c"):
        local_copy(f"{web.url}/{name}.tar", str(cache), room)
    assert there(cache) == ["a.tar", "c.tar"] and (cache / "mine.tar").exists()
    with pytest.raises(ShardError, match=f"it has {web.size} bytes, and cache_bytes allows 100"):
        local_copy(f"{web.url}/b.tar", str(cache), 100)
    assert there(cache) == ["a.tar", "c.tar"]


def test_a_copy_in_use_stays_whoever_uses_it(
    web: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here, or in another process; what a process that was killed has left goes."""
    cache, code = tmp_path / "cache", "import sys; from reinforce.data.copies import local_copy\n"
    code += "copy = local_copy(*sys.argv[1:], None); print(copy.path, flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, f"{web.url}/a.tar", str(cache)], stdin=-1, stdout=-1, text=True
    )
    assert other.stdout and other.stdin
    path = Path(other.stdout.readline().strip())
    (cache / f"{'0' * 16}-{'1' * 16}-x.tar~{web.size}~{'2' * 32}").write_bytes(b"half")
    held = local_copy(f"{web.url}/b.tar", str(cache), 2 * web.size)
    assert there(cache) == ["a.tar", "b.tar"]
    with caplog.at_level(logging.WARNING):
        local_copy(f"{web.url}/c.tar", str(cache), 2 * web.size)
    assert there(cache) == ["a.tar", "b.tar", "c.tar"] and "allow more, or take fewer streams" in caplog.text
    other.communicate("")
    del held
    local_copy(f"{web.url}/c.tar", str(cache), web.size)  # there already: nothing has to go
    assert path.exists()
    (web.folder / "d.tar").write_bytes((web.folder / "a.tar").read_bytes())
    local_copy(f"{web.url}/d.tar", str(cache), web.size)
    assert there(cache) == ["d.tar"]


def test_a_full_disk_makes_room_by_itself(
    web: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [2 << 30, 1 << 20, 2 << 30]  # of the disk, each time that it is asked
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))
    for name in ("a", "b", "c"):
        local_copy(f"{web.url}/{name}.tar", str(tmp_path / "cache"), None)
    assert there(tmp_path / "cache") == ["b.tar", "c.tar"] and not free


def test_without_the_server_the_copy_is_taken_as_it_is(
    web: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = local_copy(f"{web.url}/a.tar", str(tmp_path / "cache"), None).path
    web.server.shutdown()
    web.server.server_close()
    assert local_copy(f"{web.url}/a.tar", str(tmp_path / "cache"), None).path == path
    assert "cannot be compared with its copy" in caplog.text
    with pytest.raises(ShardError, match="b.tar: cannot be fetched"):
        local_copy(f"{web.url}/b.tar", str(tmp_path / "cache"), None)


def test_copies_are_in_a_folder_of_the_users_own(
    web: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = Path(local_copy(f"{web.url}/a.tar", None, None).path)
    assert path.parent == tmp_path / "home/.cache/clip-reinforce"
    assert path.parent.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert Path(local_copy(f"{web.url}/a.tar", None, None).path).parent == tmp_path / "elsewhere/clip-reinforce"


def test_a_local_tar_is_no_copy(tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "0.tar", 1)
    assert local_copy(tar, str(tmp_path / "cache"), 1).path == tar and not os.path.exists(tmp_path / "cache")


READER = """
import hashlib, logging, random, sys, time
from pathlib import Path
from reinforce.data.copies import local_copy
logging.disable(logging.WARNING)
seed, url, served, cache, max_bytes, seconds = sys.argv[1:]
rng, end, num = random.Random(int(seed)), time.monotonic() + float(seconds), 0
while time.monotonic() < end:
    name = f"{rng.choice('abcdefghij')}.tar"
    copy = local_copy(f"{url}/{name}", cache, int(max_bytes))
    time.sleep(rng.random() / 100)
    assert Path(copy.path).read_bytes() == Path(served, name).read_bytes(), name
    num += 1
print(num)
"""


@pytest.mark.chaos
def test_processes_that_share_a_small_folder_take_nothing_from_each_other(web: SimpleNamespace, tmp_path: Path) -> None:
    data = (web.folder / "a.tar").read_bytes()
    for name in "abcdefghij":
        (web.folder / f"{name}.tar").write_bytes(data.replace(b"picture a", f"picture {name}".encode()))
    arguments = [web.url, str(web.folder), str(tmp_path / "cache"), str(2 * web.size), "15"]
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(seed), *arguments], stdout=-1, stderr=-1, text=True)
        for seed in range(4)
    ]
    for reader in readers:
        out, err = reader.communicate()
        assert reader.returncode == 0 and int(out) > 100, err
    assert len(there(tmp_path / "cache")) <= 8  # of each reader the one in use, and the one that is fetched
