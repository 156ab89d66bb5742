"""A student as an open_clip folder and as ONNX, and the check that both say what the student says.

    open_clip_*     config and weights as trained, the vocabulary beside them; open_clip.create_model("local-dir:OUT")
    image.onnx      images (B, 3, H, W) float32, pixel / 255 less mean, over std -> image_features (B, D), unit norm
    text.onnx       tokens (B, context_length) int64 -> text_features (B, D), unit norm
    classifier.onnx of a student trained with comkd, in the place of the two: images -> logits (B, classes)
    export.json     preprocessing, context length, logit_scale (the multiplier), opset, versions; what the check found

open_clip and timm know our architectures after `import train.students`. ONNX needs none of them; its towers are folded.
"""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reinforce.errors import ConfigError, MissingExtra
from train import students
from train.comkd.classifier import Classifier
from train.comkd.classifier import load as load_classifier
from train.evaluation.metrics import embed_images, embed_texts
from train.students import Student
from train.students.fold import fold

try:
    import onnx  # noqa: F401  torch's exporter needs it, and onnxscript
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError as error:
    raise MissingExtra(
        f"{error.name} is not installed; exporting needs: pip install 'clip-reinforce[export]'"
    ) from error

OPSET = 20
# Of unit vectors. The open_clip folder has to be equal bit for bit.
ONNX_MAX_ABS_DIFF = 1e-5
ONNX_MIN_COSINE = 0.999999
BATCH_SIZE = 32
SENTENCES = ("a photo of a cat", "two dogs on a beach at sunset", "", "a red circle, a blue square and " + 20 * "more ")


@dataclass(frozen=True)
class Agreement:
    """How far the embeddings of one tower are from the student's, over all that was checked."""

    max_abs_diff: float
    min_cosine: float


@dataclass(frozen=True)
class ExportReport:
    """`agreement` by `open_clip/image`, `open_clip/text`, `onnx/image` and `onnx/text`; a sentence for each fault."""

    folder: str
    num_images: int
    num_texts: int
    agreement: dict[str, Agreement]
    faults: list[str]


def export(student: Student, out: Path, images: Sequence[Tensor], texts: Sequence[str]) -> ExportReport:
    """Write `out`, and check it on `images`, uint8 (3, H, W) as `EvalSet.load` gives them, and `texts`.

    An export that does not agree, or was not finished, is left beside it as OUT.partial until the next one. Raises
    ConfigError where there is something at `out` already.
    """
    partial = _beside(out)
    # The original may be on a GPU, whose sums differ, and in the middle of a training.
    student = replace(student, model=copy.deepcopy(student.model).cpu().eval())
    students.save(student, partial)
    _write_onnx(student, partial)
    return _finished(check(student, partial, images, texts), _facts(student), partial, out)


def export_classifier(classifier: Classifier, out: Path, images: Sequence[Tensor]) -> ExportReport:
    """The same for a student that tells classes apart: its folder (train/comkd/classifier.py), and `classifier.onnx`.

    Compared are the logits over `logit_scale`: `folder/logits`, and `onnx/logits`.
    """
    partial = _beside(out)
    classifier = copy.deepcopy(classifier).cpu().eval()
    classifier.save(partial)
    path, student = partial / "classifier.onnx", classifier.student
    example = torch.stack(noise(student, num_images=2)[0]).float()
    _write_tower(_Outputs(fold(classifier), "logits"), example, path, "images", "logits")
    pixels, scale = _pixels(student, images), classifier.model.logit_scale.exp()
    with torch.no_grad():
        loaded = load_classifier(partial)
        expected, again = (c.logits(pixels) / scale for c in (classifier, loaded))
        agreement = {
            "folder/logits": _agreement(expected, again),
            "onnx/logits": _agreement(expected, _run_onnx(path, pixels) / scale),
        }
    facts = _facts(student) | {"classes": classifier.names}
    faults = _changed(partial, classifier, loaded) + _faults(partial, agreement)
    return _finished(ExportReport(str(partial), len(images), 0, agreement, faults), facts, partial, out)


def _beside(out: Path) -> Path:
    """Where an export is written until it is whole."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; export to another folder, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    return partial


def _finished(report: ExportReport, facts: dict[str, object], partial: Path, out: Path) -> ExportReport:
    if not report.faults:
        report = replace(report, folder=str(out))
    (partial / "export.json").write_text(json.dumps(facts | {"check": asdict(report)}, indent=1) + "\n")
    if not report.faults:
        os.replace(partial, out)
    return report


def noise(student: Student, num_images: int = 4) -> tuple[list[Tensor], list[str]]:
    """Images and texts for the check where there are no real ones: the same ones each time."""
    shape = (num_images, 3, student.image_px, student.image_px)
    drawn = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return list(torch.from_numpy(drawn)), list(SENTENCES)


def check(student: Student, folder: Path, images: Sequence[Tensor], texts: Sequence[str]) -> ExportReport:
    """Compare what an exported folder says with the student, which is on the CPU and in eval mode."""
    loaded = students.create(str(folder))
    loaded.model.eval()
    expected = {"image": embed_images(student, images, BATCH_SIZE), "text": embed_texts(student, texts, BATCH_SIZE)}
    again = {"image": embed_images(loaded, images, BATCH_SIZE), "text": embed_texts(loaded, texts, BATCH_SIZE)}
    inputs = {"image": _pixels(student, images), "text": student.tokenizer(list(texts))}
    agreement = {f"open_clip/{tower}": _agreement(expected[tower], again[tower]) for tower in expected}
    agreement |= {
        f"onnx/{tower}": _agreement(expected[tower], _run_onnx(folder / f"{tower}.onnx", inputs[tower]))
        for tower in expected
    }
    faults = _changed(folder, student.model, loaded.model)
    if loaded.preprocess_cfg != student.preprocess_cfg:
        faults.append(f"{folder}: preprocessing is {loaded.preprocess_cfg}, and was {student.preprocess_cfg}")
    return ExportReport(str(folder), len(images), len(texts), agreement, faults + _faults(folder, agreement))


def _changed(folder: Path, trained: nn.Module, loaded: nn.Module) -> list[str]:
    weights = loaded.state_dict()
    return [
        f"{folder}: {name} is not as trained"
        for name, tensor in trained.state_dict().items()
        if not torch.equal(tensor, weights[name])
    ]


def _pixels(student: Student, images: Sequence[Tensor]) -> Tensor:
    mean, std = (torch.tensor(student.preprocess_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (torch.stack(list(images)).float() / 255 - mean) / std


def _faults(folder: Path, agreement: dict[str, Agreement]) -> list[str]:
    faults = []
    for name, found in agreement.items():
        exact = name.startswith("open_clip")
        most, least = (0.0, 0.0) if exact else (ONNX_MAX_ABS_DIFF, ONNX_MIN_COSINE)
        if not (found.max_abs_diff <= most and found.min_cosine >= least):  # nor where they are NaN
            faults.append(
                f"{folder}: {name} differs from the student's by up to {found.max_abs_diff:.1e} "
                f"(at most {most:.0e}), their cosine falls to {found.min_cosine:.6f} (at least {least})"
            )
    return faults


class _Outputs(nn.Module):
    """A method of a model as a module."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.model, self.method)(x)
        return out


class _Tower(_Outputs):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


def _write_onnx(student: Student, folder: Path) -> None:
    folded = fold(student.model)
    images, texts = noise(student, num_images=2)
    for tower, name, example in (
        ("image", "images", torch.stack(images).float()),
        ("text", "tokens", student.tokenizer(texts)),
    ):
        path = folder / f"{tower}.onnx"
        _write_tower(_Tower(folded, f"encode_{tower}"), example, path, name, f"{tower}_features")


def _write_tower(tower: nn.Module, example: Tensor, path: Path, input_name: str, output_name: str) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own use of torch
        torch.onnx.export(
            tower.eval(),
            (example,),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def _run_onnx(path: Path, inputs: Tensor) -> Tensor:
    """Embeddings by onnxruntime: of the first row alone, then of the others, since any batch size has to do."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat(
        [torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in (inputs[:1], inputs[1:])]
    )


def _agreement(expected: Tensor, found: Tensor) -> Agreement:
    cosine = F.cosine_similarity(expected.double(), found.double())
    return Agreement((expected - found).abs().max().item(), cosine.min().item())


def _facts(student: Student) -> dict[str, object]:
    packages = ("clip-reinforce", "onnx", "onnxruntime", "onnxscript", "open_clip_torch", "timm", "torch")
    return {
        "student": student.name,
        "preprocess": student.preprocess_cfg | {"size": student.image_px},
        "context_length": student.tokenizer.context_length,
        "logit_scale": student.model.logit_scale.exp().item(),
        "opset": OPSET,
        "versions": {package: version(package) for package in packages},
    }
