"""A student as a folder and as ONNX, and the check that both give what the student gives.

    open_clip_*     config and weights as trained, the vocabulary beside them; open_clip.create_model("local-dir:OUT")
    image.onnx      images (B, 3, H, W) float32, pixel / 255 less mean, over std -> image_features (B, D), unit norm
    text.onnx       tokens (B, context_length) int64 -> text_features (B, D), unit norm
    classifier.onnx of a student trained with comkd, in place of these two: images -> logits (B, classes)
    modeling.py     of a student of two towers: loads the folder with open_clip and without this project
    README.md       what it is, how to use it, how it was trained and what it reaches
    export.json     preprocessing, context length, logit_scale (the multiplier), opset, versions, result of the check

open_clip and timm know our architectures after `import modeling`, or `import train.students`. ONNX needs neither; its
graphs are folded, and each file has the facts of export.json as its metadata.
"""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reinforce.errors import ConfigError, MissingExtra

OPSET = 20
# Of unit vectors. The folder has to be equal bit for bit.
ONNX_MAX_ABS_DIFF = 1e-5
ONNX_MIN_COSINE = 0.999999
PACKAGES = ("clip-reinforce", "onnx", "onnxruntime", "onnxscript", "open_clip_torch", "timm", "torch")


@dataclass(frozen=True)
class Graph:
    """One function of a student, written as `file`, and the inputs that it is checked on, at least two.

    `name` is its name in the report. `names` are those of input and output in the file. Outputs are compared after
    division by `scale`, so that the tolerances are for vectors of about unit norm.
    """

    name: str
    file: str
    module: nn.Module
    inputs: Tensor
    names: tuple[str, str]
    scale: float = 1.0


class Exportable(Protocol):
    """What an export asks of a student of any kind."""

    @property
    def module(self) -> nn.Module:
        """All its weights."""

    @property
    def reader(self) -> str:
        """Who reads its folder, in the report."""

    def save(self, folder: Path) -> None: ...

    def graphs(self, folded: bool) -> list[Graph]:
        """`folded` are the same functions with fewer operations."""

    def facts(self) -> dict[str, Any]:
        """What an application has to know: the head of export.json, beginning with the name as `student`."""

    def documents(self, folder: str, checked: dict[str, Any]) -> dict[str, str]:
        """Files for its readers, by name, of an export to `folder` whose check found `checked`."""


Kind = TypeVar("Kind", bound=Exportable)


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of one graph are from the student's, over all that was checked."""

    max_abs_diff: float
    min_cosine: float


@dataclass(frozen=True)
class ExportReport:
    """`agreement` by who computes and what: of two towers `open_clip/image`, `open_clip/text`, `onnx/image` and
    `onnx/text`, of a classifier `folder/logits` and `onnx/logits`. `faults` has a sentence for each fault."""

    folder: str
    num_images: int
    num_texts: int
    agreement: dict[str, Agreement]
    faults: list[str]


def export(student: Kind, out: Path, load: Callable[[Path], Kind]) -> ExportReport:
    """Write `out`, and check it on noise and a few sentences. `load` reads what `student.save` writes.

    An export that does not agree, or was not finished, stays beside it as OUT.partial until the next one. Raises
    ConfigError if something is at `out` already, MissingExtra if the packages for ONNX are not installed.
    """
    _onnxruntime()
    partial = _beside(out)
    # The original may be on a GPU, whose sums differ, and in the middle of a training.
    student = copy.deepcopy(student)
    student.module.cpu().eval()
    student.save(partial)
    for graph in student.graphs(folded=True):
        _write(graph, partial / graph.file, student.facts())
    report = check(student, partial, load)
    if not report.faults:
        report = replace(report, folder=str(out))
    facts = student.facts() | {"opset": OPSET, "versions": {package: version(package) for package in PACKAGES}}
    (partial / "export.json").write_text(json.dumps(facts | {"check": asdict(report)}, indent=1) + "\n")
    for name, text in student.documents(str(out), asdict(report)).items():
        (partial / name).write_text(text)
    if not report.faults:
        os.replace(partial, out)
    return report


def check(student: Kind, folder: Path, load: Callable[[Path], Kind]) -> ExportReport:
    """Compare what an exported folder gives with the student, which is on the CPU and in eval mode."""
    loaded = load(folder)
    loaded.module.cpu().eval()
    saved, graphs = {}, {}
    numbers = {"images": 0, "tokens": 0}
    for graph, again in zip(student.graphs(folded=False), loaded.graphs(folded=False), strict=True):
        with torch.no_grad():
            expected, found = (g.module(graph.inputs) / graph.scale for g in (graph, again))
        saved[f"{student.reader}/{graph.name}"] = _agreement(expected, found)
        by_onnx = _run_onnx(folder / graph.file, graph.inputs) / graph.scale
        graphs[f"onnx/{graph.name}"] = _agreement(expected, by_onnx)
        numbers[graph.names[0]] += len(graph.inputs)
    faults = _changed(folder, student, loaded) + _faults(folder, saved, 0.0, 0.0)
    faults += _faults(folder, graphs, ONNX_MAX_ABS_DIFF, ONNX_MIN_COSINE)
    return ExportReport(str(folder), numbers["images"], numbers["tokens"], saved | graphs, faults)


class Method(nn.Module):
    """A method of a model as a module; with `unit_norm`, its rows are scaled to unit norm."""

    def __init__(self, model: nn.Module, method: str, unit_norm: bool = False) -> None:
        super().__init__()
        self.model, self.method, self.unit_norm = model, method, unit_norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.model, self.method)(x)
        return F.normalize(out, dim=-1) if self.unit_norm else out


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401  torch's exporter needs it, and onnxscript
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"{error.name} is not installed; exporting needs: pip install 'clip-reinforce[export]'"
        ) from error
    return onnxruntime


def _beside(out: Path) -> Path:
    """Where an export is written until it is whole."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; export to another folder, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    return partial


def _changed(folder: Path, student: Exportable, loaded: Exportable) -> list[str]:
    weights, facts = loaded.module.state_dict(), loaded.facts()
    faults = [
        f"{folder}: {name} is not as trained"
        for name, tensor in student.module.state_dict().items()
        if not torch.equal(tensor, weights[name])
    ]
    return faults + [
        f"{folder}: {name} is {facts[name]}, and was {value}"
        for name, value in student.facts().items()
        if name != "student" and facts[name] != value  # the name is that of the folder
    ]


def _faults(folder: Path, agreement: dict[str, Agreement], most: float, least: float) -> list[str]:
    return [
        f"{folder}: {name} differs from the student's by up to {found.max_abs_diff:.1e} "
        f"(at most {most:.0e}), their cosine falls to {found.min_cosine:.6f} (at least {least})"
        for name, found in agreement.items()
        if not (found.max_abs_diff <= most and found.min_cosine >= least)  # NaN is a fault, too
    ]


def _write(graph: Graph, path: Path, facts: dict[str, Any]) -> None:
    """With the facts as metadata, in JSON: what one who has this file alone has to know."""
    import onnx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own use of torch
        torch.onnx.export(
            graph.module.eval(),
            (graph.inputs[:2],),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=[graph.names[0]],
            output_names=[graph.names[1]],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.save(model, path)


def _run_onnx(path: Path, inputs: Tensor) -> Tensor:
    """Outputs by onnxruntime: of the first row alone, then of the others, because every batch size has to work."""
    session = _onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat(
        [torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in (inputs[:1], inputs[1:])]
    )


def _agreement(expected: Tensor, found: Tensor) -> Agreement:
    cosine = F.cosine_similarity(expected.double(), found.double())
    return Agreement((expected - found).abs().max().item(), cosine.min().item())
