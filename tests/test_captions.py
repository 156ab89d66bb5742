"""Captions go out as keys and come in as a text set: from a model behind a real HTTP server, in any order and form."""

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from reinforce.__main__ import app
from reinforce.check.repack import repack
from reinforce.check.repair import redo
from reinforce.config import Recipe, RunOptions
from reinforce.data import shards
from reinforce.errors import ConfigError, StoreError
from reinforce.exchange.captions import export_keys, import_captions, run_with_captions
from reinforce.models.teacher import Teacher
from reinforce.run import driver
from reinforce.store.columns import Column
from reinforce.store.store import Store
from tests import tiny
from tests.conftest import Reinforced
from tests.processes import ROOT, here
from train.config import TrainConfig
from train.trainer import fit

VLM = Column("text", "vlm", "caption")


def seen(image: bytes) -> str:
    """What the model of these tests says of an image."""
    return f"an image of {hashlib.sha256(image).hexdigest()[:6]}"


class Queue(ThreadingHTTPServer):
    request_queue_size = 64  # of 5, the script's threads overrun it now and then, and are reset


class Server(BaseHTTPRequestHandler):
    """Answers as vLLM does."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = asked["messages"][0]["content"][1]["image_url"]["url"]
        said = seen(base64.b64decode(url.partition(",")[2]))
        choices = [{"message": {"content": f"{said}\n take {i} "}} for i in range(asked["n"])]
        body = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with Queue(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def store(reinforced: Reinforced, tmp_path: Path) -> str:
    """A copy, which a test may add to."""
    return str(shutil.copytree(reinforced.store, tmp_path / "store"))


def images(listed: str) -> dict[tuple[str, str], bytes]:
    return {
        (shard.name, sample.key): sample.image
        for shard in shards.expand(listed)
        for sample in shards.read(shard)
        if sample.image
    }


def test_the_way_of_the_document(
    reinforced: Reinforced, recipe: Recipe, store: str, server: str, tmp_path: Path
) -> None:
    before = {str(c): Store(store).read("00000", c).tobytes() for c in Store(store).promised().columns() if c.teacher}
    keys, captions = tmp_path / "keys.jsonl", tmp_path / "captions.jsonl"
    cli("export", "keys", store, "--shards", reinforced.shards, "--out", str(keys))
    [script] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/captions.md").read_text(), re.S)
    (tmp_path / "caption.py").write_text(script.replace("http://localhost:8000", server))
    subprocess.run([sys.executable, tmp_path / "caption.py", keys, captions], check=True)
    told = cli("import", "captions", str(captions), "--store", store, "--name", "vlm", "--source", "a server")
    assert (told["num_captions"], told["samples"], told["without_caption"], told["without_image"]) == (2, 32, 0, 0)
    report = driver.run(
        reinforced.shards, store, Store(store).promised().parsed_recipe(), RunOptions(workers="0", max_invalid=1)
    )
    assert report.failed == [] and report.done == 3

    found, shown = Store(store), images(reinforced.shards)
    assert found.promised().parsed_recipe().texts["vlm"].source == "a server"
    teacher = Teacher(recipe.teachers["vit"], recipe.batch_size, torch.device("cpu"))
    for shard in found.shards():
        good = found.read(shard, "status") == 0
        texts, keys_of = found.read(shard, VLM), found.read(shard, "key")
        embedded = found.read(shard, "text/vlm/vit")
        for row in np.flatnonzero(good):
            wanted = seen(shown[shard, keys_of[row]])
            assert texts[:, row].tolist() == [f"{wanted} take 0", f"{wanted} take 1"]
            [alone] = teacher.encode_texts([texts[1, row]])
            assert np.abs(alone.astype(float) - embedded[1, row].astype(float)).max() < 0.01
        assert texts[:, ~good].tolist() == 2 * [[""] * int((~good).sum())]
    assert before == {name: found.read("00000", name).tobytes() for name in before}

    config = TrainConfig(
        student=reinforced.student, shards=reinforced.shards, store=store, text_sets=["vlm"], distill=0.5,
        global_batch_size=8, steps=2, precision="fp32", workers=0, report_to=[],
    )  # fmt: skip
    assert fit(config, tmp_path / "run")["steps"] == 2


def cli(*asked: str) -> Any:
    done = CliRunner().invoke(app, [*asked, *(["--json"] if asked[0] == "import" else [])])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if asked[0] == "import" else done.stdout


def test_keys_say_where_images_lie(reinforced: Reinforced) -> None:
    told = list(export_keys(reinforced.store, reinforced.shards))
    shown = images(reinforced.shards)
    assert len(told) == 32 and {(row["shard"], row["key"]) for row in told} <= shown.keys()
    for row in told:
        with open(row["tar"], "rb") as tar:
            tar.seek(row["offset"])
            assert tar.read(row["length"]) == shown[row["shard"], row["key"]]
    assert all(row["caption"] for row in told)
    assert len(cli("export", "keys", reinforced.store, "--shards", reinforced.shards).splitlines()) == 32


def test_keys_go_through_a_pipe_and_to_where_a_link_leads(reinforced: Reinforced, tmp_path: Path) -> None:
    """A device or a pipe is written to; neither it nor a link is replaced by a file."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "keys.jsonl")
    asked = ["export", "keys", reinforced.store, "--shards", reinforced.shards, "--out"]
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(pipe.read_text)
        assert here(app, *asked, str(pipe))[0] == here(app, *asked, str(link))[0] == 0
        assert len(read.result(60).splitlines()) == 32
    assert pipe.is_fifo() and link.is_symlink() and link.read_text() == (tmp_path / "keys.jsonl").read_text() != ""


def test_of_a_store_that_waits_for_embeddings_is_said_what_is_next(
    store: str, reinforced: Reinforced, tmp_path: Path
) -> None:
    rows = [{"key": row["key"], "caption": "a"} for row in export_keys(store, reinforced.shards)]
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    import_captions(tmp_path / "c.jsonl", store, "vlm")
    with pytest.raises(StoreError, match="lacks text/vlm/.* more columns; .* `clip-reinforce extend` it"):
        repack(store, str(tmp_path / "new"), "int8")


def test_half_a_character_is_refused_before_the_store_is_touched(store: str, tmp_path: Path) -> None:
    before = tiny.tree(Path(store))
    for row in ('{"key": "%s", "caption": "\\ud83d"}', '{"key": "\\ud83d%s", "caption": "a"}'):
        (tmp_path / "c.jsonl").write_text(row % "a")
        with pytest.raises(ConfigError, match=r"c.jsonl, row 1 holds half a character.*\\ud83d"):
            import_captions(tmp_path / "c.jsonl", store, "vlm")
    assert tiny.tree(Path(store)) == before


def test_a_wrong_request_for_keys_leaves_the_file_as_it_is(reinforced: Reinforced, tmp_path: Path) -> None:
    (tmp_path / "keys.jsonl").write_text("mine")
    strange = tiny.tar(tmp_path / "strange.tar", 1)
    asked = ["export", "keys", reinforced.store, "--shards", f"{reinforced.shards}::{strange}"]
    code, _, err = here(app, *asked, "--out", str(tmp_path / "keys.jsonl"))
    assert code == 2 and "has no shard strange" in err
    assert tiny.tree(tmp_path) == {"keys.jsonl": b"mine", "strange.tar": Path(strange).read_bytes()}


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_any_form_and_order(reinforced: Reinforced, store: str, tmp_path: Path, form: str) -> None:
    rows = [
        {"shard": row["shard"], "key": row["key"], "captions": [f"{row['key']} {i}" for i in range(1 + n % 3)]}
        for n, row in enumerate(export_keys(store, reinforced.shards))
    ]
    left_out, stranger = rows.pop(4), {"shard": "00000", "key": "nobody", "captions": ["x"]}
    path = tmp_path / f"captions.{form}"
    write(path, [stranger, *reversed(rows)])
    report = import_captions(path, store, "vlm", source="us")
    assert (report.num_captions, report.without_caption, report.without_image) == (3, 1, 1)
    wanted = {(row["shard"], row["key"]): row["captions"] for row in rows}
    found = Store(store)
    for shard in found.shards():
        texts, keys = found.read(shard, VLM), found.read(shard, "key")
        own = found.read(shard, "text/original/caption", 0)
        for row, key in enumerate(keys):
            if (shard, key) in wanted:
                given = wanted[shard, key]
                assert texts[:, row].tolist() == [given[i % len(given)] for i in range(3)]
            elif (shard, key) == (left_out["shard"], left_out["key"]):
                assert texts[:, row].tolist() == [own[row]] * 3
    again = import_captions(path, store, "vlm", source="us")
    assert again == report
    write(path, rows)
    with pytest.raises(
        ConfigError, match="has captions 'vlm' already, imported from another file; give another --name"
    ):
        import_captions(path, store, "vlm", source="us")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_rows_of_one_key_add_up_and_a_number_can_be_asked_for(store: str, tmp_path: Path) -> None:
    keys = Store(store).read("00000", "key")
    rows = [{"key": keys[0], "text": text} for text in ("one", " two\nwords ", "one", "")]
    write(tmp_path / "a.jsonl", rows)
    import_captions(tmp_path / "a.jsonl", store, "vlm", num=3)
    with pytest.raises(ConfigError, match="'vlm' of this file already, imported with --num-captions 3 --source ''"):
        import_captions(tmp_path / "a.jsonl", store, "vlm", source="us")
    assert Store(store).read("00000", VLM)[:, 0].tolist() == ["one", "two words", "one"]


def test_a_shard_whose_captions_are_not_there_is_refused(reinforced: Reinforced, store: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"key": Store(store).read("00000", "key")[0], "text": "one"}])
    import_captions(tmp_path / "a.jsonl", store, "vlm")
    Store(store).remove("00002", VLM)
    asked = reinforced.shards, store, Store(store).promised().parsed_recipe(), RunOptions(workers="0", max_invalid=1)
    report = driver.run(*asked)
    assert report.done == 2 and "no captions of 'vlm' yet" in report.failed[0].reason
    import_captions(tmp_path / "a.jsonl", store, "vlm")
    assert driver.run(*asked).done == 1


@pytest.fixture
def written(reinforced: Reinforced, tmp_path: Path) -> Path:
    """Two captions of each image, but of the first, and two of one that is not there."""
    rows = [
        {"key": row["key"], "captions": ["a " + row["key"], "b"]}
        for row in export_keys(reinforced.store, reinforced.shards)
    ]
    write(tmp_path / "vlm.jsonl", [*rows[1:], {"key": "nobody", "captions": ["c"]}])
    return tmp_path / "vlm.jsonl"


def test_run_takes_captions_along(reinforced: Reinforced, recipe: Recipe, written: Path, tmp_path: Path) -> None:
    """Into a new store: it is that of run, import captions and extend, byte for byte."""
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = ["run", reinforced.shards, "--store", str(tmp_path / "new"), "--recipe", str(tmp_path / "recipe.json")]
    command += ["--workers", "0", "--device", "cpu", "--max-invalid", "0.5", "--texts", f"vlm={written}", "--json"]
    code, out, err = here(app, *command)
    assert code == 0, err
    told = json.loads(out)
    assert (told["done"], told["samples"], told["valid"], told["failed"]) == (3, 34, 32, [])
    [captions] = told["captions"]
    assert (captions["num_captions"], captions["samples"]) == (2, 32)
    assert (captions["without_caption"], captions["without_image"], captions["unfinished"]) == (1, 1, 0)

    steps = str(shutil.copytree(reinforced.store, tmp_path / "steps"))
    import_captions(written, steps, "vlm")
    options = RunOptions(workers="0", device="cpu", max_invalid=0.5, extend=True)
    driver.run(reinforced.shards, steps, Store(steps).promised().parsed_recipe(), options)
    assert tiny.tree(tmp_path / "new") == tiny.tree(steps)

    before = tiny.tree(steps)
    code, out, err = here(app, *command[:-1])
    assert code == 0 and "nothing to do" in out and "Captions 'vlm': 2 for each of 32 samples" in out, err
    assert tiny.tree(tmp_path / "new") == before


def test_a_store_with_captions_of_others_grows(
    reinforced: Reinforced, recipe: Recipe, written: Path, store: str, tmp_path: Path
) -> None:
    options = RunOptions(workers="0", device="cpu", max_invalid=0.5)
    run_with_captions(reinforced.shards, store, recipe, {"vlm": written}, options)
    more = "::".join([reinforced.shards, tiny.tar(tmp_path / "00003.tar", 5, seed=3)])
    alone = driver.run(more, store, Store(store).promised().parsed_recipe(), options)
    [failure] = alone.failed
    assert "00003 has no captions of 'vlm' yet; all that needs none is there" in failure.reason
    assert Store(store).has("00003", Column("text", "original", "vit")) and not Store(store).has("00003", VLM)
    report, [told] = run_with_captions(more, store, recipe, {"vlm": written}, options)
    assert report.failed == [] and told.samples == 37 and told.without_caption == 6  # the new ones have their own
    assert Store(store).has("00003", Column("text", "vlm", "vit"))


def test_a_wrong_file_for_a_run_is_told_before_any_work(
    reinforced: Reinforced, recipe: Recipe, written: Path, store: str, tmp_path: Path
) -> None:
    def run(name: str, path: Path, where: str) -> None:
        run_with_captions(reinforced.shards, where, recipe, {name: path}, RunOptions(workers="0", device="cpu"))

    new = str(tmp_path / "new")
    with pytest.raises(ConfigError, match="cannot be read"):
        run("vlm", tmp_path / "none.jsonl", new)
    with pytest.raises(ConfigError, match="'coca' names a captioner and an imported text set"):
        run("coca", written, new)
    assert not Path(new).exists()
    import_captions(written, store, "vlm")
    before = tiny.tree(store)
    write(tmp_path / "other.jsonl", [{"key": "x", "text": "one"}])
    with pytest.raises(ConfigError, match="has captions 'vlm' already, imported from another file"):
        run("vlm", tmp_path / "other.jsonl", store)
    assert tiny.tree(store) == before
    code, _, err = here(app, "run", "x.tar", "--store", new, "--recipe", "sample", "--texts", "vlm")
    assert code == 2 and "--texts vlm: write NAME=FILE, such as vlm=captions.jsonl" in err


def test_a_shard_whose_samples_are_not_known_is_left_out_of_an_import(written: Path, store: str) -> None:
    Store(store).remove("00001", Column("sample", "", "status"))
    report = import_captions(written, store, "vlm")
    assert (report.unfinished, report.samples) == (1, 23)
    assert not Store(store).has("00001", VLM) and Store(store).has("00002", VLM)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"key": "x"}', "row 1 has no `key` with one of caption, captions, text, texts"),
        ("a.jsonl", b'{"caption": "x"}', "row 1 has no `key`"),
        ("a.jsonl", b'{"key": 7, "caption": "x"}', "row 1 has no `key`"),
        ("a.jsonl", b'{"key": "x", "caption": 7}', "holds something that is no text"),
        ("a.jsonl", b'{"key": "x", "caption": "a"}\n{', "line 2, is no JSON"),
        ("a.jsonl", b"", "holds no captions"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.csv", b"key,caption", "captions come in .jsonl, .jsonl.gz or .parquet"),
    ],
)
def test_a_file_that_is_none_is_told(store: str, tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    before = Store(store).manifests
    with pytest.raises(ConfigError, match=told):
        import_captions(tmp_path / name, store, "vlm")
    assert Store(store).manifests == before


def test_what_is_wrong_with_the_request_is_told(reinforced: Reinforced, store: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"key": "x", "text": "one"}])
    with pytest.raises(ConfigError, match="has a text set 'coca' already"):
        import_captions(tmp_path / "a.jsonl", store, "coca")
    with pytest.raises(ConfigError, match="cannot be read"):
        import_captions(tmp_path / "none.jsonl", store, "vlm")
    write(tmp_path / "b.jsonl", [{"key": "x", "text": str(i)} for i in range(65)])
    with pytest.raises(ConfigError, match="more than 64 captions"):
        import_captions(tmp_path / "b.jsonl", store, "vlm")
    with pytest.raises(ConfigError, match="'coca' names a captioner and an imported text set"):
        Store(store).promised().parsed_recipe().but(texts={"coca": {"num_captions": 1, "sha256": "x"}})


@pytest.mark.parametrize("shard", ["", "00000.tar"])
def test_a_file_that_knows_no_image_takes_no_name(store: str, tmp_path: Path, shard: str) -> None:
    """Neither by a key that is not there, nor by one that is said to be of a shard that is not."""
    key = Store(store).read("00000", "key")[0] if shard else "nobody"
    write(tmp_path / "a.jsonl", [{"key": key, "shard": shard, "text": "one"}])
    before = tiny.tree(store)
    code, out, err = here(app, "import", "captions", str(tmp_path / "a.jsonl"), "--store", store, "--name", "vlm")
    assert (code, out) == (2, "") and "has captions of no image in" in err
    assert f"a key there is '{key}'" + (f" in shard '{shard}'" if shard else "") + ", and one in the store '" in err
    assert tiny.tree(store) == before


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("import captions a.jsonl --store s --name a/b", "--name"),
        ("run x.tar --store s --recipe sample --texts a/b=a.jsonl", "--texts"),
        ("import clip-retrieval x --images x.tar --store s --clip-model ViT-B/32 --teacher a/b", "--teacher"),
    ],
)
def test_a_name_that_cannot_be_one_is_told_as_it_was_typed(command: str, option: str) -> None:
    code, _, err = here(app, *command.split())
    assert code == 2 and err.startswith(
        f"error: {option} a/b: 'a/b' cannot name a column: use letters, digits, '-' and"
    )


def test_what_was_imported_is_kept_where_images_are_the_same_and_asked_for_where_not(
    reinforced: Reinforced, recipe: Recipe, written: Path, store: str, tmp_path: Path
) -> None:
    options = RunOptions(workers="0", device="cpu", max_invalid=1)
    run_with_captions(reinforced.shards, store, recipe, {"vlm": written}, options)
    before, names = tiny.tree(store), ["00000", "00001", "00002"]
    found = redo(store, names, reinforced.shards, options)
    assert found.sound and f"00000/{VLM}" not in found.removed and "00000/text/vlm/vit" in found.removed
    assert tiny.tree(store) == before

    tiny.tar(tmp_path / "00001.tar", 5, seed=9)  # other images under the name of one
    command = ["--device", "cpu", "--workers", "0", "--shards", str(tmp_path / "00001.tar")]
    code, out, err = here(app, "redo", store, "00001", *command)
    assert code == 1, err
    assert "imported:" in out and f"import captions FILE --store {store} --name vlm" in out
    assert not Store(store).has("00001", VLM) and Store(store).has("00000", VLM)

    shutil.rmtree(Path(store) / "00000" / "text" / "vlm" / "caption")
    code, out, err = here(app, "repair", store, *command[:-1], reinforced.shards)
    assert code == 1 and f"import captions FILE --store {store} --name vlm" in out, err
