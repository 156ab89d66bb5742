"""A folder goes to a hub by HTTP: what a small server of the hub's protocol holds afterwards, and what it refuses."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from reinforce.errors import ConfigError, HubError
from tests import tiny
from tests.processes import here
from train import export, students
from train.__main__ import app
from train.hub import Repository


class Hub(ThreadingHTTPServer):
    """Repositories by name, files by path. Large files come as Git LFS has them, the others within the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.broken: set[str] = set()  # parts of paths that are answered with 403


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.refused():
            return
        repository = "/".join(self.path.replace(".git/", "/").removeprefix("/api/models").strip("/").split("/")[:2])
        there = self.server.repositories.get(repository)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}"}, status)
        elif self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")
            lacks = not head[1].startswith("library_name: open_clip") if head[0] == "" and len(head) > 2 else True
            self.answer(
                {"warnings": [], "errors": [{"message": "no metadata"}] if lacks else []}, 400 if lacks else 200
            )
        elif there is None:
            self.answer({"error": "Repository not found"}, 404)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": modes[f["size"] > 100_000], "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [o | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]
            self.answer({"transfer": "basic", "objects": upload})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    there[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    there[value["path"]] = self.server.objects[value["oid"]]
            self.answer({"success": True, "commitUrl": f"{self.server.url}/{repository}/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": f"no such place: {self.path}"}, 404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refused(signed=True):
            return
        name = self.path.rpartition("/")[2]
        right = hashlib.sha256(data).hexdigest() == name
        self.server.objects |= {name: data} if right else {}
        self.answer({}, 200 if right else 400)

    def do_GET(self) -> None:
        if not self.refused():
            self.answer({"error": "Repository not found"}, 404)

    def refused(self, signed: bool = False) -> bool:
        if not signed and self.headers["Authorization"] not in ("Bearer good", "Bearer poor"):
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.headers["Authorization"] == "Bearer poor" or any(part in self.path for part in self.server.broken):
            self.answer({"error": "You don't have the rights to create a model under the namespace me."}, 403)
        else:
            return False
        return True

    def answer(self, told: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where HF_ENDPOINT points, with a token that may write; files go there by HTTP, not by Xet's protocol.

    huggingface_hub reads its environment when it is imported, which the tests do with the network forbidden."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "good")
        yield hub
        hub.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export's files, of sizes that go both ways."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: open_clip\n---\n# small\n")
    (folder / "open_clip_model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "image.onnx").write_bytes(b"onnx" * 50_000)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_is_there_as_it_was(hub: Hub, folder: Path) -> None:
    assert Repository("me/small").push(folder) == f"{hub.url}/me/small"
    assert hub.repositories == {"me/small": files(folder)}
    (folder / "export.json").write_text("{}")
    assert Repository("small").push(folder) == f"{hub.url}/me/small"  # it is there already, and a bare name is mine
    assert hub.repositories == {"me/small": files(folder)}


@pytest.mark.parametrize(
    ("token", "name", "told"),
    [
        ("", "me/small", r"no token for http.*run `hf auth login`, or set HF_TOKEN"),
        ("strange", "me/small", "401, Invalid username or password.; the token is not known there"),
        ("poor", "me/small", "403, You don't have the rights .*; the token may not write there"),
        ("good", "a/b/c", "a/b/c is no name of a repository"),
    ],
)
def test_a_wrong_request_is_told_before_any_work(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, name: str, told: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=told):
        Repository(name)
    assert hub.repositories == {}


def test_a_hub_that_is_not_there_is_a_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9, repository me/small: .*onnect"):
        Repository("me/small")
    code, out, err = here(app, "export", "vit_tiny", str(tmp_path / "out"), "--push-to-hub", "me/small")
    assert (code, out) == (1, "") and err.startswith("error: http://127.0.0.1:9") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["/preupload/", "/lfs/", "/commit/"])
def test_what_fails_on_the_way_says_how_to_go_on(hub: Hub, folder: Path, broken: str) -> None:
    repository = Repository("me/small")
    hub.broken.add(broken)
    with pytest.raises(HubError, match=f"403.*{folder} is whole and stays: `hf upload me/small {folder}` tries again"):
        repository.push(folder)
    hub.broken.clear()
    repository.push(folder)
    assert hub.repositories == {"me/small": files(folder)}


def test_the_command_puts_there_what_it_writes(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But for ONNX, which takes ten seconds and is tried in test_export.py."""
    student = students.create(tiny.student(tmp_path / "s"))
    right = {graph.file: graph.module.eval()(graph.inputs).detach() for graph in student.graphs(folded=False)}
    monkeypatch.setattr(export, "_write", lambda graph, path, facts: path.write_bytes(b"onnx"))
    monkeypatch.setattr(export, "_run_onnx", lambda path, inputs: right[path.name])
    out = tmp_path / "out"
    code, told, err = here(app, "export", str(student.folder), str(out), "--push-to-hub", "me/s", "--json")
    assert code == 0, err
    assert json.loads(told)["pushed"] == f"{hub.url}/me/s"
    assert hub.repositories == {"me/s": files(out)} and {"README.md", "modeling.py", "image.onnx"} <= files(out).keys()

    monkeypatch.setattr(export, "_run_onnx", lambda path, inputs: 2 * right[path.name])
    code, told, _ = here(app, "export", str(student.folder), f"{out}2", "--push-to-hub", "me/wrong", "--json")
    assert code == 1 and "pushed" not in json.loads(told) and hub.repositories["me/wrong"] == {}
