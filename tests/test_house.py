"""House rules: who may import whom, no circle, heavy packages have one room, nothing is pickled, docs type what exists.

Every rule about imports is a function of a tree of files, and each is shown to find a fault that is planted for it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("reinforce", "train", "pipelines", "benchmarks")
GROUND = {"reinforce.config", "reinforce.errors", "reinforce.lines"}
SAMPLES = {"reinforce.data"} | GROUND
# What a place may import besides itself. A place is a module of a package, or one of its folders.
SEES = {
    "reinforce.__init__": {"reinforce.run", "reinforce.store", "reinforce.recipes", "reinforce.data"} | GROUND,
    "reinforce.__main__": {f"reinforce.{room}" for room in ("run", "check", "exchange", "recipes", "terminal")}
    | GROUND,
    "reinforce.exchange": {
        f"reinforce.{room}" for room in ("run", "models", "store", "recipes", "terminal", "progress")
    }
    | SAMPLES,
    "reinforce.run": {f"reinforce.{room}" for room in ("models", "store", "progress", "process", "signals")} | SAMPLES,
    "reinforce.page": {"reinforce.errors", "reinforce.lines"},
    "reinforce.check": {f"reinforce.{room}" for room in ("page", "run", "models", "store", "progress", "terminal")}
    | SAMPLES,
    "reinforce.models": SAMPLES | {"reinforce.process"},
    "reinforce.store": SAMPLES | {"reinforce.process"},
    "reinforce.data": GROUND | {"reinforce.process"},
    "reinforce.recipes": GROUND,
    "reinforce.config": {"reinforce.errors", "reinforce.lines"},
    "reinforce.terminal": {"reinforce.errors", "reinforce.lines", "reinforce.signals"},
    "reinforce.signals": set(),
    "reinforce.progress": {"reinforce.lines"},
    "reinforce.process": {"reinforce.errors"},
    "reinforce.errors": {"reinforce.lines"},
    "reinforce.lines": set(),
}
# What `train` may see of `reinforce`: what reads a store, the models, and the doors to the user. Never run or check.
SEEN = ("models", "store", "recipes", "terminal", "progress", "process", "page", "signals")
READER = SAMPLES | {f"reinforce.{room}" for room in SEEN}
# Modules that may load another by a name that is worked out: what they load is not ours.
LOADERS = {"train.students.scan"}
HEAVY = {
    "ray": {"reinforce.run.cluster", "pipelines.cluster.submit"},
    "zarr": {"reinforce.store.store", "reinforce.store.arrays", "reinforce.store.bfloat16"},
    "open_clip": {"reinforce.models.open_clip"},
    "numba": {"reinforce.data.bicubic"},
    "tarfile": {"reinforce.data.tars"},
    "onnx": {"train.export"},
    "onnxruntime": {"train.export"},
}
# What reads samples and stores needs no model.
LIGHT = ("reinforce.config", "reinforce.recipes", "reinforce.store", "reinforce.data")
PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "torch.package")
PICKLING = {"torch.save", "torch.load", "torch.serialization", "torch.jit.save", "torch.jit.load"}
# The published files of DataCompDR are such; only tensors are taken from them (weights_only, allow_pickle=False).
PICKLING_ROOMS = {"reinforce.exchange.datacompdr"}
PICKLING |= {"numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.load", "pandas.read_pickle"}


class House:
    """The modules below a folder, by their dotted names, and what each of them imports and mentions."""

    def __init__(self, root: Path) -> None:
        self.files = {
            ".".join(path.relative_to(root).with_suffix("").parts): path
            for package in PACKAGES
            for path in sorted((root / package).rglob("*.py"))
        }
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}

    @cache  # noqa: B019 - a house lives as long as the tests
    def imported(self, module: str) -> set[str]:
        """Dotted names that a module imports, each as long as it is known."""
        names = set()
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = module.split(".")[: -node.level] if node.level else []
                source = ".".join([*start, *([node.module] if node.module else [])])
                names |= {f"{source}.{alias.name}" for alias in node.names}
        return names

    def arrows(self, module: str) -> set[str]:
        """The modules of the house that a module imports, at the top or within a function."""
        found = {self._module(name) for name in self.imported(module)}
        return {name for name in found if name and name != module}

    def _module(self, name: str) -> str:
        while name and name not in self.files and f"{name}.__init__" not in self.files:
            name = name.rpartition(".")[0]
        return name if name in self.files or not name else f"{name}.__init__"

    def mentioned(self, module: str) -> Iterator[tuple[str, ast.AST]]:
        """Every name and chain of attributes, with imported names spelt out: `t.save` after `import torch as t` is
        `torch.save`; and `getattr(t, "save")` likewise."""
        names = {}
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

        def spelt(node: ast.AST) -> str:
            if isinstance(node, ast.Name):
                return names.get(node.id, node.id)
            if isinstance(node, ast.Attribute) and (base := spelt(node.value)):
                return f"{base}.{node.attr}"
            if isinstance(node, ast.Call) and spelt(node.func) == "getattr" and len(node.args) > 1:
                base, attribute = spelt(node.args[0]), node.args[1]
                return f"{base}.{attribute.value}" if base and isinstance(attribute, ast.Constant) else ""
            return ""

        for node in ast.walk(self.trees[module]):  # `t = torch`
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (name := spelt(node.value)):
                names.setdefault(node.targets[0].id, name)
        for name in names.values():
            yield name, self.trees[module]
        for node in ast.walk(self.trees[module]):
            if isinstance(node, (ast.Name, ast.Attribute, ast.Call)) and (name := spelt(node)):
                yield name.replace("np.", "numpy.", 1) if name.startswith("np.") else name, node


def place(module: str) -> str:
    return ".".join(module.split(".")[:2])


def below(name: str, places: set[str] | tuple[str, ...]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in places)


def arrows_that_point_up(house: House) -> list[str]:
    """Imports that SEES does not allow, places that it does not know, and `train` looking into the writer."""
    faults = []
    for module in house.files:
        seen = {place(name) for name in house.arrows(module)} - {place(module)}
        package = module.split(".")[0]
        if package == "reinforce":
            if place(module) not in SEES:
                faults.append(f"{module} is in no place that the plan knows")
            allowed = SEES.get(place(module), set())
        elif package == "train":
            allowed = READER | {name for name in seen if name.startswith("train.")}
        else:
            allowed = seen
        faults += [f"{module} imports {name}" for name in sorted(seen - allowed)]
    return faults


def circles(house: House) -> list[str]:
    """Modules that import each other around, and places that do."""
    modules = {module: house.arrows(module) for module in house.files}
    places: dict[str, set[str]] = {}
    for module, seen in modules.items():
        if module.count(".") > 1 or not module.endswith("__init__"):  # a package's own is the door, and not a room
            places.setdefault(place(module), set()).update(place(name) for name in seen)
    faults = []
    for graph in (modules, {name: seen - {name} for name, seen in places.items()}):
        found: dict[str, set[str]] = {}
        for name in graph:  # all that can be reached from it
            reached, todo = set[str](), [name]
            while todo:
                for following in graph.get(todo.pop(), set()) - reached:
                    reached.add(following)
                    todo.append(following)
            found[name] = reached
        faults += [f"{name} comes back to itself" for name, reached in found.items() if name in reached]
    return faults


def hidden_imports(house: House) -> list[str]:
    """Modules loaded by a name that no reader of imports sees: `importlib`, `__import__`, `runpy`, `exec`, `eval`."""
    ways = ("importlib.import_module", "importlib.util", "importlib.machinery", "runpy.run_module", "pkgutil")
    faults = []
    for module in house.files:
        if module in LOADERS:  # they may, but nothing of ours
            for node in ast.walk(house.trees[module]):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and below(node.value, PACKAGES):
                    faults.append(f"{module} may load {node.value}")
            continue
        for name, _ in house.mentioned(module):
            if below(name, ways) or name in ("__import__", "builtins.__import__", "exec", "eval"):
                faults.append(f"{module} uses {name}")
            if below(name, ("sys.modules",)) and module != "reinforce.process":
                faults.append(f"{module} uses {name}")
            if name == "importlib" or (below(name, ("runpy",)) and module != "reinforce.recipes"):
                faults.append(f"{module} uses {name}")
    return faults


def heavy_packages_elsewhere(house: House) -> list[str]:
    return [
        f"{module} imports {package}"
        for module in house.files
        if module.split(".")[0] in ("reinforce", "train")
        for package, rooms in HEAVY.items()
        if module not in rooms and any(below(name, (package,)) for name in house.imported(module))
    ]


def models_where_samples_are(house: House) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in house.files
        if below(module, LIGHT)
        for name in house.imported(module)
        if below(name, ("ray", "open_clip", "torch"))
    ]


def models_where_batches_are(house: House) -> list[str]:
    """What loads batches knows no model, but for the arithmetic of pixels."""
    return [
        f"{module} imports {name}"
        for module in house.files
        if below(module, ("train.data",))
        for name in house.arrows(module) - {"reinforce.models.pixels"}
        if below(name, ("reinforce.models", "train.students", "train.objective"))
    ]


def pickles(house: House) -> list[str]:
    """Pickle by any name, that of torch and of numpy's object arrays among them."""
    faults = []
    for module in house.files.keys() - PICKLING_ROOMS:
        for name, _ in house.mentioned(module):
            if below(name, PICKLES) or below(name, tuple(PICKLING)):
                faults.append(f"{module} uses {name}")
        for name in house.imported(module):
            if name.endswith(".*"):
                faults.append(f"{module} imports {name}, which hides what it uses")
            if below(name, PICKLES):
                faults.append(f"{module} imports {name}")
    for module, tree in house.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", 1):
                faults.append(f"{module} allows pickle")
            if isinstance(node, ast.keyword) and node.arg == "weights_only" and not getattr(node.value, "value", 0):
                faults.append(f"{module} loads more than weights")
    return faults


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


RULES = [
    arrows_that_point_up,
    circles,
    hidden_imports,
    heavy_packages_elsewhere,
    models_where_samples_are,
    models_where_batches_are,
    pickles,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(house: House, rule) -> None:
    assert len(house.files) > 60
    assert rule(house) == []


PLANTED = [
    (arrows_that_point_up, {"reinforce/data/a.py": "from reinforce.run import b", "reinforce/run/b.py": ""}),
    (arrows_that_point_up, {"reinforce/data/a.py": "def f():\n    import train.b", "train/b.py": ""}),
    (arrows_that_point_up, {"reinforce/store/a.py": "from ..models import b", "reinforce/models/b.py": ""}),
    (arrows_that_point_up, {"train/a.py": "from reinforce.check.b import c", "reinforce/check/b.py": ""}),
    (arrows_that_point_up, {"train/a.py": "from pipelines import b", "pipelines/b.py": ""}),
    (arrows_that_point_up, {"reinforce/attic/a.py": ""}),
    (circles, {"train/a.py": "from train import b", "train/b.py": "def f():\n    from train.a import c"}),
    (circles, {"train/x/a.py": "import train.b", "train/b.py": "import train.x.c", "train/x/c.py": ""}),
    (
        circles,
        {
            "train/students/__init__.py": "from train.comkd import terms",
            "train/comkd/terms.py": "",
            "train/comkd/a.py": "from train import students",
        },
    ),
    (hidden_imports, {"train/a.py": "import sys\nsys.modules['pipelines.b'].f()"}),
    (models_where_batches_are, {"train/data/a.py": "from reinforce.models import b", "reinforce/models/b.py": ""}),
    (pickles, {"train/checkpoint.py": "import torch\nt = torch\nt.save({}, 'x')"}),
    (pickles, {"train/checkpoint.py": "from torch import *"}),
    (pickles, {"train/checkpoint.py": "import numpy as np\nnp.savez('x')"}),
    (hidden_imports, {"train/a.py": "import importlib\nimportlib.import_module('pipelines.b')"}),
    (hidden_imports, {"train/a.py": "from importlib import import_module as load\nload('pipelines.b')"}),
    (hidden_imports, {"reinforce/config.py": "__import__('train')"}),
    (hidden_imports, {"reinforce/config.py": "import runpy\nrunpy.run_path('train/a.py')"}),
    (hidden_imports, {"train/students/scan.py": "import importlib\nimportlib.import_module('pipelines.b')"}),
    (heavy_packages_elsewhere, {"reinforce/run/worker.py": "def f():\n    import ray.util"}),
    (heavy_packages_elsewhere, {"train/data/loader.py": "from zarr.storage import LocalStore"}),
    (models_where_samples_are, {"reinforce/data/images.py": "import torch"}),
    (pickles, {"train/checkpoint.py": "import torch as t\nt.save({}, 'x')"}),
    (pickles, {"train/checkpoint.py": "from torch import load as get\nget('x')"}),
    (pickles, {"train/checkpoint.py": "import torch\ngetattr(torch, 'save')({}, 'x')"}),
    (pickles, {"train/checkpoint.py": "import torch.serialization as s\ns.load('x')"}),
    (pickles, {"reinforce/run/worker.py": "from pickle import dumps"}),
    (pickles, {"reinforce/run/worker.py": "import numpy as np\nnp.load('x', allow_pickle=True)"}),
    (pickles, {"benchmarks/a.py": "import cloudpickle"}),
    (pickles, {"reinforce/exchange/datacompdr.py": "import torch\ntorch.load('x', weights_only=False)"}),
    (pickles, {"reinforce/exchange/datacompdr.py": "import numpy as np\nnp.load('x', allow_pickle=True)"}),
]


@pytest.mark.parametrize(("rule", "files"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_found(rule, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert rule(House(tmp_path))


def test_every_error_is_in_the_drawing() -> None:
    tree = ast.parse((ROOT / "reinforce/errors.py").read_text())
    drawing = ast.get_docstring(tree) or ""
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes and all(name in drawing for name in classes)


def documents() -> str:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(path.read_text() for path in pages)


def test_every_command_of_the_documents_exists() -> None:
    text, makefile = documents(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"^ *make ([a-z-]+)", text, re.M)) | set(re.findall(r"`make ([a-z-]+)", text))
    assert named and named <= targets
    for module in {name.replace(".", "/") for name in re.findall(r"python -m ([a-z_.]+)", text)}:
        assert (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists(), module


def test_every_option_that_the_documents_type_exists() -> None:
    import typer

    from reinforce.__main__ import app as reinforce
    from train.__main__ import app as train

    text = documents().replace("\\\n", " ")
    typed = re.findall(r"(?:-m |clip-)(reinforce|train) ([a-z]+)([^\n`]*)", text)
    assert len(typed) > 5
    for package, name, rest in typed:
        commands = typer.main.get_command({"reinforce": reinforce, "train": train}[package]).commands  # type: ignore[attr-defined]
        assert name in commands, f"{package} {name}"
        command = commands[name]
        if hasattr(command, "commands"):  # of a group, such as `import captions`
            command = command.commands[rest.split()[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{package} {name}{rest}"
