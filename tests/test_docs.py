"""What the documents say is so: links lead somewhere, snippets run as they stand, the drawing names every room.

That every command and option they type exists is in test_house.py.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipelines.experiments import picture
from reinforce.__main__ import app as reinforce
from reinforce.check.repack import repack
from reinforce.config import RunOptions
from reinforce.errors import ConfigError
from reinforce.exchange.columns import export_columns
from reinforce.recipes import load_recipe
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny
from tests.conftest import Reinforced
from train.__main__ import app as train
from train.config import load_training

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("samples/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def snippets() -> list[tuple[str, str]]:
    """Python that runs on the samples' store. Those of two pages have tests of their own."""
    pages = [page for page in PAGES if page.name not in ("python.md", "captions.md")]
    return [(page.name, text) for page in pages for text in blocks(page, "python")]


def short_commands() -> list[str]:
    """What is quick and needs no data but the samples and their store."""
    lines = "\n".join(text.replace("\\\n", " ") for page in PAGES for text in blocks(page, "")).splitlines()
    short = re.compile(r"clip-(reinforce (recipes?|info|verify)|train recipes)\b")
    return sorted({line for line in lines if short.match(line) and ("stores/" not in line or "samples.zarr" in line)})


@pytest.fixture(scope="module")
def home(reinforced: Reinforced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `samples/train` and `stores/samples.zarr`, as after `make reinforce`, but of tiny models."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "samples/train").mkdir(parents=True)
    (folder / "stores").mkdir()
    for tar in reinforced.shards.split("::"):
        (folder / "samples/train" / Path(tar).name).symlink_to(tar)
    last = tiny.tar(folder / "samples/train/00003.tar", 1)
    store = shutil.copytree(reinforced.store, folder / "stores/samples.zarr")
    driver.run(last, str(store), Store(str(store)).promised().parsed_recipe(), RunOptions(workers="0", device="cpu"))
    repack(str(store), str(folder / "stores/small.zarr"), "int8")
    export_columns(str(store), ["view/base/vit"], folder / "columns", "npy")
    return folder


@pytest.mark.parametrize(("page", "text"), snippets(), ids=lambda value: value[:24].replace("\n", " "))
def test_a_snippet_runs_as_it_stands(page: str, text: str, home: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", text], cwd=home, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{page}: {ran.stderr}"
    assert bool(ran.stdout) == ("print(" in text)


def test_there_is_something_to_run() -> None:
    assert len(snippets()) >= 5
    assert len(short_commands()) >= 6


@pytest.mark.parametrize("line", short_commands())
def test_a_short_command_runs_as_it_stands(line: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    name, *arguments = shlex.split(line.partition(" > ")[0])
    ran = CliRunner().invoke({"clip-reinforce": reinforce, "clip-train": train}[name], arguments)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.strip()


def test_the_commands_that_pack_do_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / f"photos/{i}.jpg").write_bytes(tiny.picture(i))
        (tmp_path / f"photos/{i}.txt").write_text(f"picture {i}")
    (tmp_path / "pairs.csv").write_text("path,caption\nphotos/0.jpg,one\nphotos/2.jpg,two\n")
    text = "".join(blocks(ROOT / "docs/reinforcing.md", ""))
    lines = [line for line in text.splitlines() if line.startswith("clip-reinforce pack")]
    for line in lines:
        ran = CliRunner().invoke(reinforce, shlex.split(line)[1:])
        assert ran.exit_code == 0 and "noted: none" in ran.stdout, ran.output
    assert len(lines) == 2 and (tmp_path / "shards/photos/00000.tar").exists() and (tmp_path / "shards/pairs").exists()


def test_the_recipe_to_copy_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(blocks(ROOT / "docs/add.md", "python")[0])
    assert load_recipe(str(path)).name == "mine"
    assert load_training(str(path)).student == "mamba_small"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of the headings of a page: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_the_drawing_names_every_room() -> None:
    """Every module of the project is in ARCHITECTURE.md's list, and every module in it is there."""
    drawing = blocks(ROOT / "ARCHITECTURE.md", "")[0]
    drawn = set(re.findall(r"[\w]+\.py", drawing))
    rooms = {
        path
        for package in ("reinforce", "train", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        if len(ast.parse(path.read_text()).body) > 1  # an __init__ with a docstring alone is no room
    }
    recipes = {path for path in rooms if path.parent == ROOT / "pipelines" and path.stem in drawing}
    assert {path.name for path in rooms - recipes} <= drawn
    assert drawn <= {path.name for path in rooms}


def test_the_citation_can_be_read() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["authors"]
    assert (cited["title"], str(cited["version"])) == ("clip-reinforce", version("clip-reinforce"))
    assert len(cited["references"]) == 3
    assert all(work["type"] and work["title"] and work["authors"] for work in cited["references"])


def test_the_hooks_are_tools_of_the_venv() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pinned = (ROOT / "constraints.txt").read_text()
    for hook in hooks:
        tool = shlex.split(hook["entry"])[0]
        assert tool.startswith(".venv/bin/") and f"\n{Path(tool).name}==" in pinned


def test_a_picture_of_a_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    shards, store = "samples/train/{00000..00002}.tar", "stores/samples.zarr"
    picture.main(["--store", store, "--shards", shards, "--out", "out/picture.png"])
    picture.main(["--store", store, "--shards", shards, "--out", "out/other.png", "--key", "00002-2-004"])
    drawn, other = Image.open("out/picture.png"), Image.open("out/other.png")
    assert drawn.size == other.size == (1280, 706)  # one caption less than the samples: theirs are 3
    assert drawn.convert("RGB").tobytes() != other.convert("RGB").tobytes()
    with pytest.raises(ConfigError, match="no-such-key"):
        picture.main(["--store", store, "--shards", shards, "--key", "no-such-key"])


def test_the_picture_of_the_readme_is_small_and_wide() -> None:
    path = ROOT / "docs/picture.png"
    assert path.stat().st_size < 150_000
    assert Image.open(path).size == (1280, 744)
