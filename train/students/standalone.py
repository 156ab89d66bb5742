"""What an export takes along, so that it needs nothing of this project: `modeling.py`, and a card that says what it is.

modeling.py is the source of the student's own towers, joined: what they import of ours stands before them. Towers that
timm and open_clip know need none. MobileCLIP-S0's hybrid text tower cannot be had so: open_clip has no place for it.
"""

import ast
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import timm

from reinforce.errors import ReinforceError
from reinforce.process import CHECKED
from reinforce.store.store import Store
from train.students import fold, hybrid_text, mamba, mamba_v1, mambavision, mci, plain_scans

# Of each module what it needs of ours, which comes before it.
NEEDS: dict[ModuleType, list[ModuleType]] = {
    mamba: [plain_scans],
    mamba_v1: [plain_scans, mamba],
    mambavision: [plain_scans, fold],
    mci: [],
    hybrid_text: [fold],
}
# What scan.py would decide: without kernels there is little to decide.
SCANS = """
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    few = x.shape[1] <= (256 if x.is_cuda else CHUNK)
    return ssd_product(x, dt, A, B, C, D) if few else ssd_chunks(x, dt, A, B, C, D)


def selective_scan(*args: Any, **more: Any) -> Tensor:
    named = [more.get(name) for name in ("D", "z", "delta_bias")] + [more.get("delta_softplus", False)]
    scan = selective_scan_sequential if torch.is_grad_enabled() else selective_scan_doubling
    return scan(*args, *named[len(args) - 5 :])
"""
# In place of reinforce/process.py: open_clip has no way to add a kind of text tower.
TEXT_TOWER = f"""
def open_clip_text_tower(model: Any, build: Any) -> Any:
    if not hasattr(model, "_build_text_tower"):
        raise ImportError("open_clip_torch is another one; pip install open_clip_torch=={CHECKED["open_clip_torch"]}")
    own, model._build_text_tower = model._build_text_tower, build
    return own
"""
INSTEAD = {plain_scans: SCANS, hybrid_text: TEXT_TOWER}
HEAD = '''"""{name}: a student of clip-reinforce, for open_clip. Needs torch, open_clip_torch and timm.

    import sys
    sys.path.insert(0, "{folder}")
    import modeling

    model, preprocess, tokenizer = modeling.load()
    image_features = model.encode_image(preprocess(picture)[None], normalize=True)
    text_features = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)
"""

'''
LOADER = '''
HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "open_clip_config.json").read_text())


def load(device: str = "cpu") -> tuple[Any, Any, Any]:
    """The model in eval mode, what makes its input of a PIL image, and its tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{HERE}", device=device)
    vocabulary = CONFIG["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
    own = {"bpe_path": str(HERE / vocabulary)} if vocabulary else {}
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{HERE}", **own)
'''


def modeling(name: str, folder: str, model_cfg: dict[str, Any]) -> str:
    """The text of modeling.py for a student."""
    towers = [hybrid_text] if "mixer_kernel" in model_cfg["text_cfg"] else []
    own = _module_of(model_cfg["vision_cfg"].get("timm_model_name"))
    towers += [own] if own else []
    modules = list(dict.fromkeys(module for tower in towers for module in [*NEEDS[tower], tower]))
    parts = [text for module in modules for text in (INSTEAD.get(module, ""), _body(module)) if text]
    imports = {"import json", "from pathlib import Path", "from typing import Any", "import open_clip"}
    imports |= {line for module in modules for line in _imports(module)}
    head = HEAD.format(name=name, folder=folder) + "\n".join(sorted(imports))
    return "\n\n".join([head, *parts]) + "\n" + LOADER


def _module_of(name: str | None) -> ModuleType | None:
    """Ours that registers a model of timm."""
    if name is None or not timm.is_model(name):
        return None
    place = timm.model_entrypoint(name).__module__
    return next((module for module in NEEDS if module.__name__ == place), None)


def _nodes(module: ModuleType) -> tuple[list[str], list[ast.stmt]]:
    source = inspect.getsource(module)
    return source.splitlines(), ast.parse(source).body


def _imports(module: ModuleType) -> Iterator[str]:
    """Each name of each import of others, a line each, so that two modules may have some in common."""
    for node in _nodes(module)[1]:
        if isinstance(node, ast.Import):
            yield from (ast.unparse(ast.Import([alias])) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("train", "reinforce")):
            yield from (ast.unparse(ast.ImportFrom(node.module, [alias], 0)) for alias in node.names)


def _body(module: ModuleType) -> str:
    """The source after the imports, with the comments between."""
    lines, nodes = _nodes(module)
    last = max(node.end_lineno or 0 for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(lines[last:]).strip("\n") + "\n"


def card(facts: dict[str, Any], checked: dict[str, Any], training: Path | None) -> str:
    """README.md of an export. `facts` are those of export.json, `training` the folder of the fit that it comes from."""
    size, name = facts["preprocess"]["size"], facts["student"]
    told = ["---", "library_name: open_clip", "pipeline_tag: zero-shot-image-classification", "tags: [clip]", "---"]
    told += [f"# {name}", "", "A small CLIP: images and texts to vectors of one space, written by clip-reinforce.", ""]
    told += ["```python", 'import sys; sys.path.insert(0, "FOLDER")  # this one', "import modeling", ""]
    told += ["model, preprocess, tokenizer = modeling.load()  # torch, open_clip_torch, timm", "```", ""]
    preprocess = facts["preprocess"]
    told += [
        f"`image.onnx` and `text.onnx` need no code. Images are {size} x {size} RGB, pixel / 255 less "
        f"{preprocess['mean']}, over {preprocess['std']}; texts are {facts['context_length']} tokens. Both give unit "
        f"vectors; similarities are cosines times {facts['logit_scale']:.2f}. `export.json` says it for programs.",
        "",
    ]
    told += _of_training(training) if training else []
    least = min(found["min_cosine"] for found in checked["agreement"].values())
    told += ["## Checked", "", f"Folder and ONNX gave what the student gave: least cosine {least:.9f}.", ""]
    return "\n".join(told)


def _of_training(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    asked = config["config"]
    stores = [part["store"] for part in asked.get("data") or [asked] if part["store"]]
    told = ["## Trained", "", "| | |", "|---|---|"]
    told += [f"| {what} | {value} |" for what, value in {
        "student": report["student"],
        "steps, samples a step": f"{report['steps']}, {asked['global_batch_size']}",
        "samples": report["samples"],
        "weight of the teachers (`distill`)": asked["distill"],
        "store": ", ".join(Path(store).name for store in stores) or "none: captions alone",
        "versions": ", ".join(f"{package} {number}" for package, number in config["software"].items()),
    }.items()]  # fmt: skip
    told += ["", *itertools.chain(*map(_of_teachers, stores))]
    rows = [
        f"| {name} | {metric} | {value:.4f} |"
        for name, found in report["evaluated"].items()
        for metric, value in found.items()
        if isinstance(value, float)
    ]
    if rows:
        told += ["## Measured", "", "| set | metric | |", "|---|---|---|", *rows, ""]
    return told


def _of_teachers(store: str) -> list[str]:
    """Who taught; where the store is not to be had any more, nothing."""
    try:
        manifest = Store(store).manifest()
    except (ReinforceError, OSError):
        return []
    if manifest is None:
        return []
    told = ["It learned from these, whose licences hold for what is learned from them; look them up:", ""]
    for kind in ("teachers", "captioners"):
        for name, model in manifest.recipe[kind].items():
            weights = manifest.models[kind][name].get("weights_sha256", "imported")[:16]
            told.append(f"- {kind[:-1]} `{name}`: {model['model']} {model.get('pretrained') or ''} (weights {weights})")
    return [*told, ""]
