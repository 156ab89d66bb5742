"""House rules: imports go down only, heavy packages have one room each, nothing is pickled, commands are documented."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top down; a room imports rooms of lower levels only.
REINFORCE = [
    {"__main__"},
    {"driver", "verify"},
    {"crew", "info", "replay"},
    {"worker", "progress"},
    {"captioner", "teachers", "feed"},
    {"coca", "models", "store"},
    {"prompts"},
    {"manifest", "reports", "images", "compat", "bfloat16", "terminal"},
    {"augment", "shards"},
    {"config", "draws", "tars", "tensorfile"},
    {"errors"},
]
TRAIN = [
    {"__main__"},
    {"trainer", "export", "latency", "adapt"},
    {"distilled", "checkpoint", "journal"},
    {"classifier", "objective", "ranks"},
    {"comkd", "protocol", "loader", "losses"},
    {"evaluate", "order", "sources"},
    {"evalsets"},
    {"students"},
    {"config"},
]
STUDENTS = [{"__init__"}, {"mamba", "mambavision", "hybrid_text", "mci"}, {"scan", "fold"}]
HOUSE = [("reinforce", REINFORCE), ("train", TRAIN), ("train/students", STUDENTS)]
# What `train` may see of `reinforce`: what reads a store, and the doors to open_clip and to the user.
READER = {"errors", "config", "draws", "manifest", "shards", "tars", "images", "augment", "store", "bfloat16"}
HEAVY = {
    "ray": {"reinforce/crew.py"},
    "zarr": {"reinforce/store.py", "reinforce/bfloat16.py"},
    "open_clip": {"reinforce/compat.py"},
    "tarfile": {"reinforce/tars.py"},
    "onnx": {"train/export.py"},
    "onnxruntime": {"train/export.py"},
}


def rooms(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(path: Path, package: str) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")}


def below(levels: list[set[str]], name: str) -> set[str]:
    """The names of all lower levels."""
    return set().union(*levels[next(i for i, names in enumerate(levels) if name in names) + 1 :])


@pytest.mark.parametrize(("folder", "levels"), HOUSE, ids=[folder for folder, _ in HOUSE])
def test_every_room_has_a_level_and_imports_go_down_only(folder: str, levels: list[set[str]]) -> None:
    package, known = folder.replace("/", "."), set().union(*levels)
    files = {path.stem: path for path in (ROOT / folder).glob("*.py")}
    if package in ("reinforce", "train"):
        del files["__init__"]
    inner = {path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").exists()}
    assert {*files, *inner} == known
    for stem, path in files.items():
        names = {name.removeprefix(f"{package}.").split(".")[0] for name in imported(path) if name.startswith(package)}
        assert names & known <= below(levels, stem), path


def test_packages_know_of_none_above_them() -> None:
    for path in rooms("reinforce"):
        assert not {name.split(".")[0] for name in imported(path)} & {"train", "pipelines"}, path
    for path in rooms("train"):
        assert "pipelines" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("path", rooms("train"), ids=lambda path: path.stem)
def test_train_sees_only_what_reads_a_store(path: Path) -> None:
    # Prompts are the one part that teacher and student share; only adapting a teacher loads one.
    models = {"models"} if path.stem == "adapt" else set()
    assert within(path, "reinforce") <= READER | {"compat", "terminal", "prompts", "tensorfile"} | models


def test_what_reads_a_store_imports_nothing_else_of_the_writer() -> None:
    for name in READER:
        assert within(ROOT / f"reinforce/{name}.py", "reinforce") & set().union(*REINFORCE) <= READER
        assert not {n.split(".")[0] for n in imported(ROOT / f"reinforce/{name}.py")} & {"ray", "open_clip", "torch"}


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_have_a_room(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in [*rooms("reinforce"), *rooms("train")]
        if any(name.split(".")[0] == package for name in imported(path))
    }
    assert users == HEAVY[package]


def test_what_loads_batches_knows_no_model() -> None:
    for name in ("order", "sources", "loader"):
        path = ROOT / f"train/{name}.py"
        assert "compat" not in within(path, "reinforce") and not within(path, "train") & {"students", "objective"}


def test_nothing_is_pickled() -> None:
    for path in [*rooms("reinforce"), *rooms("train"), *rooms("pipelines")]:
        assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "dill", "cloudpickle", "shelve"}, path
        assert "allow_pickle=True" not in path.read_text(), path


def test_every_error_is_in_the_drawing() -> None:
    text = (ROOT / "reinforce/errors.py").read_text()
    tree = ast.parse(text)
    drawing = ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            assert node.name in drawing


def test_every_command_of_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"^ *make ([a-z-]+)", readme, re.M)) | set(re.findall(r"`make ([a-z-]+)", readme))
    assert named and named <= targets
    modules = {name.replace(".", "/") for name in re.findall(r"python -m ([a-z_.]+)", readme)}
    for module in modules:
        assert (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists(), module


def test_every_option_that_the_readme_types_exists() -> None:
    import importlib

    import typer

    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    typed = re.findall(r"(?:python|torchrun[^\n]*?) -m (reinforce|train) ([a-z]+)([^\n`]*)", readme)
    assert len(typed) > 5
    for package, name, rest in typed:
        commands = typer.main.get_command(importlib.import_module(f"{package}.__main__").app).commands  # type: ignore[attr-defined]
        assert name in commands, f"python -m {package} {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"python -m {package} {name}{rest}"
