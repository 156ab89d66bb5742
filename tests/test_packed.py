"""Shards of a folder of pictures, or of a table of paths and captions."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reinforce.__main__ import app
from reinforce.data.shards import Sample, expand, read
from reinforce.data.status import Status
from reinforce.errors import ConfigError
from reinforce.exchange.packed import pack
from tests import tiny
from tests.processes import here

PICTURE = tiny.picture(0)


def samples(folder: Path) -> dict[str, Sample]:
    return {sample.key: sample for shard in expand(f"{folder}/*.tar") for sample in read(shard)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures, two without a caption that is read, and what else lies in folders."""
    files = {
        "b/Track 2.0 (clean).jpg": PICTURE,
        "b/Track 2.0 (clean).txt": b"a dotted name",
        "a.JPG": tiny.picture(1),
        "a.txt": b"upper case",
        "a.json": b'["another"]',
        "a.png": tiny.picture(2),
        "c.webp": b"no picture inside",
        "d.jpg": PICTURE,
        "d.cls": b"3",
        "e.heic": b"",
        "f.txt": b"no picture",
        "notes.md": b"",
        "README": b"",
        ".DS_Store": b"",
        ".git/x.jpg": b"",
    }
    for name, data in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "photos/b/again").symlink_to(tmp_path / "photos")
    return tmp_path / "photos"


def test_a_folder_with_captions_beside_the_pictures(photos: Path, tmp_path: Path) -> None:
    report = pack(photos, tmp_path / "out", samples_per_shard=2)
    assert (report.shards, report.samples) == (3, 5)
    assert report.noted == {
        "hidden": 2,
        "no_caption": 2,
        "no_extension": 1,
        "no_picture": 1,
        "other_format": 1,
        "unused_extension": 1,
    }
    assert report.first["other_format"].startswith("e.heic: is a picture in a format that is not read")
    found = samples(tmp_path / "out")
    assert {key: sample.captions for key, sample in found.items() if sample.status == Status.GOOD} == {
        "a": ("upper case", "another"),
        "a-2": ("upper case", "another"),
        "b/Track 2_0 (clean)": ("a dotted name",),
    }
    assert found["a"].image == tiny.picture(1) and found["a-2"].image == tiny.picture(2)
    assert found["d"].status == found["c"].status == Status.MISSING_CAPTION

    for path in photos.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    pack(photos, tmp_path / "again", samples_per_shard=2)
    assert tiny.tree(tmp_path / "again") == tiny.tree(tmp_path / "out")


TABLES = {
    "comma.csv": 'caption,path,width\n"one, of\ntwo",photos/0.jpg,3\ntwo,photos/0.jpg,\n,photos/1.jpg,\nx,gone.jpg,\n',
    "open_clip.csv": "filepath\ttitle\nphotos/0.jpg\tone, of two\nphotos/0.jpg\ttwo\nphotos/1.jpg\t\ngone.jpg\tx\n",
    "own.tsv": "photo\twords\nphotos/0.jpg\tone, of two\nphotos/0.jpg\ttwo\nphotos/1.jpg\t\ngone.jpg\tx\n",
    "lists.parquet": "",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_paths_and_captions(name: str, tmp_path: Path) -> None:
    """Rows of one path are the captions of one picture; a picture that is not there costs itself, and exit code 1."""
    (tmp_path / "photos").mkdir()
    for i in range(2):
        (tmp_path / f"photos/{i}.jpg").write_bytes(tiny.picture(i))
    (tmp_path / name).write_text(TABLES[name])
    if name == "lists.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        rows = {"image": ["photos/0.jpg", "photos/1.jpg", "gone.jpg"], "captions": [["one, of two", "two"], [], ["x"]]}
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(rows), tmp_path / name)
    columns = ["--image-column", "photo", "--caption-column", "words"] if name == "own.tsv" else []
    ran = CliRunner().invoke(app, ["pack", f"{tmp_path}/{name}", "-o", f"{tmp_path}/out", "--json", *columns])
    told = json.loads(ran.stdout)
    assert ran.exit_code == 1 and told["noted"] == {"missing_file": 1, "no_caption": 1} and told["samples"] == 2
    assert told["first"]["missing_file"].startswith("gone.jpg")
    found = samples(tmp_path / "out")
    assert found["photos/0"].captions == ("one, of two", "two") and found["photos/0"].image == tiny.picture(0)
    assert found["photos/1"].status == Status.MISSING_CAPTION


def test_rows_with_more_or_fewer_fields_or_without_a_path_are_told(tmp_path: Path) -> None:
    """A caption with a comma is whole in quotes, also over lines; without them its row is left out, not cut."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(tiny.picture(i))
    rows = [
        "path,caption",
        '0.jpg,"hello, ""you""\nthere"',
        "",
        "1.jpg,hello,there",
        "2.jpg",
        "3.jpg,x",
        ",lost",
        ",too",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    ran = CliRunner().invoke(app, ["pack", f"{tmp_path}/t.csv", "-o", f"{tmp_path}/out", "--json"])
    told = json.loads(ran.stdout)
    assert ran.exit_code == 1 and told["noted"] == {"no_path": 2, "wrong_fields": 2}
    assert told["first"]["no_path"].startswith(f"{tmp_path}/t.csv, the row of caption 'lost': names no picture")
    assert told["first"]["wrong_fields"].startswith(f"{tmp_path}/t.csv, line 5: has more or fewer fields")
    found = {key: sample.captions for key, sample in samples(tmp_path / "out").items()}
    assert found == {"0": ('hello, "you" there',), "3": ("x",)}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('path,caption\n0.jpg,"a, b\nc"\n1.jpg,"open\n2.jpg,two\n', "t.csv, line 4: the row that begins there"),
        ('path,caption\n1.jpg,"open\n2.jpg,"a, b"\n', "t.csv, line 2: .*close each quote"),
        ("path,caption,caption\n0.jpg,a,b\n", "has 2 columns called 'caption'; rename"),
        ("path,path,caption\n0.jpg,a,b\n", "has 2 columns called 'path'; rename"),
        ("path;caption\n0.jpg;a\n", "t.csv seems to be separated by ';'; save it with commas"),
        ("", "t.csv is empty; its first line has to name the columns"),
    ],
)
def test_a_table_that_cannot_be_read_as_it_is_meant_is_a_sentence(table: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ConfigError, match=told):
        pack(tmp_path / "t.csv", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_nothing_is_written_over_and_a_wrong_request_is_a_sentence(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    for source, out, words in [
        (photos, "out", "is there already"),
        (tmp_path / "t.csv", "new", "none of the columns .*--image-column: a, b"),
        (tmp_path / "t.txt", "new", "neither a folder nor a table"),
        (tmp_path / "gone.csv", "new", "gone.csv cannot be read"),
        (tmp_path / "half.parquet", "new", "half.parquet cannot be read"),
        (tmp_path / "empty", "new", "no picture to pack: it is empty"),
    ]:
        with pytest.raises(ConfigError, match=words):
            pack(source, tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "t.csv", "empty", "half.parquet", "photos"}
    assert tiny.tree(tmp_path / "out") == {"mine": b"x"}


@pytest.mark.parametrize(
    "command",
    [
        "pack photos --out s3://bucket/x",
        "pack s3://bucket/x --out out",
        "import clip-retrieval s3://bucket/x --images x.tar --store s --clip-model ViT-B/32",
        "import captions s3://bucket/x --store s --name mine",
        "export datacompdr s --shards x.tar --out s3://bucket/x",
        "export columns s size --out s3://bucket/x",
        "export keys s --shards x.tar --out s3://bucket/x",
    ],
)
def test_an_address_where_a_local_path_is_needed_is_a_sentence(
    command: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no folder called `s3:`."""
    monkeypatch.chdir(tmp_path)
    code, _, err = here(app, *command.split())
    assert (code, err) == (
        2,
        "error: s3://bucket/x: a local path is needed here; give one, and copy it to or from that address\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
