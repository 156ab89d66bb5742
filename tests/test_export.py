import ast
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file
from torch import nn

from reinforce.data import images
from reinforce.errors import ConfigError, MissingExtra
from reinforce.models.open_clip import open_clip
from reinforce.models.tokenizer import get_tokenizer
from tests import tiny
from train import export, students
from train.students import Student, standalone
from train.students.fold import fold

SMALL = ["vit_tiny", "mamba_tiny", "mobileclip_s0_tiny"]
LARGE = [name for name in students.names() if name not in SMALL]


def trained(name: str) -> Student:
    """A student in the middle of training: in training mode, biases and BatchNorm statistics not as they start."""
    student = students.create(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        for module in student.model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean += 0.1 * torch.randn(module.num_features, generator=generator)
                module.running_var *= 1 + torch.rand(module.num_features, generator=generator)
    student.model.train()
    return student


@pytest.fixture(scope="module", params=SMALL)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One export of each small student; tests copy the folder before they change it."""
    torch.manual_seed(0)
    student = trained(request.param)
    out = tmp_path_factory.mktemp("export") / request.param
    report = student.export(out)
    yield SimpleNamespace(student=student, out=out, report=report)


def load(folder: Path) -> Student:
    return students.create(str(folder))


def frozen(student: Student) -> Student:
    student.model.eval()
    return student


def test_the_check_finds_agreement(exported: SimpleNamespace) -> None:
    report = exported.report
    assert report.faults == []
    assert (report.folder, report.num_images, report.num_texts) == (str(exported.out), 4, 4)
    for name, found in report.agreement.items():
        assert found.max_abs_diff <= (0 if name.startswith("open_clip") else 1e-6), name
        assert found.min_cosine > 1 - 1e-9, name
    assert set(report.agreement) == {"open_clip/image", "open_clip/text", "onnx/image", "onnx/text"}


def test_the_student_goes_on_training(exported: SimpleNamespace, tmp_path: Path) -> None:
    assert all(module.training for module in exported.student.model.modules())
    again = students.create(exported.student.name)
    assert exported.student.model.state_dict().keys() == again.model.state_dict().keys()  # not folded


def test_open_clip_loads_it_bit_for_bit(exported: SimpleNamespace) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported.out}")
    model.eval()
    picture = images.decode(tiny.picture(0))
    tokens = get_tokenizer(f"local-dir:{exported.out}")(["a cat", "a red circle"])
    assert torch.equal(tokens, exported.student.tokenizer(["a cat", "a red circle"]))
    original = frozen(exported.student).model
    with torch.no_grad():
        pixels = preprocess(picture)[None]
        assert torch.equal(model.encode_image(pixels), original.encode_image(pixels))
        assert torch.equal(model.encode_text(tokens), original.encode_text(tokens))
    original.train()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_onnx_is_all_that_an_application_needs(exported: SimpleNamespace, batch_size: int) -> None:
    """From export.json and the two graphs, without open_clip: what the student says of pictures and texts."""
    facts = json.loads((exported.out / "export.json").read_text())
    preprocess, px = facts["preprocess"], facts["preprocess"]["size"]
    pictures = [images.decode(tiny.picture(i)).resize((px, px)) for i in range(batch_size)]
    mean, std = (np.array(preprocess[name], np.float32)[:, None, None] for name in ("mean", "std"))
    pixels = np.stack([(np.asarray(p, np.float32).transpose(2, 0, 1) / 255 - mean) / std for p in pictures])
    tokens = exported.student.tokenizer(["a red circle"] * batch_size)
    assert tokens.shape[1] == facts["context_length"]
    original = frozen(exported.student).model
    with torch.no_grad():
        out = original(torch.from_numpy(pixels), tokens)
    original.train()
    for tower, name, data in (("image", "images", pixels), ("text", "tokens", tokens.numpy())):
        session = onnxruntime.InferenceSession(exported.out / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run([f"{tower}_features"], {name: data})
        assert found.shape == (batch_size, out[f"{tower}_features"].shape[1])
        assert np.abs(found - out[f"{tower}_features"].numpy()).max() < 1e-6
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert facts["logit_scale"] == pytest.approx(out["logit_scale"].item())


def test_what_is_written_is_whole_and_described(exported: SimpleNamespace) -> None:
    assert {path.name for path in exported.out.iterdir()} >= {
        "open_clip_config.json", "open_clip_model.safetensors", "image.onnx", "text.onnx", "export.json"
    }  # fmt: skip
    assert not exported.out.with_name(f"{exported.out.name}.partial").exists()
    facts = json.loads((exported.out / "export.json").read_text())
    assert facts["check"] == json.loads(json.dumps(dataclasses.asdict(exported.report)))
    for tower in ("image", "text"):
        graph = onnx.load(exported.out / f"{tower}.onnx")
        onnx.checker.check_model(graph)
        session = onnxruntime.InferenceSession(exported.out / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        said = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
        facts = json.loads((exported.out / "export.json").read_text())
        assert said and said == {name: facts[name] for name in said} and said["preprocess"]["mean"]
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", facts["opset"])]
        assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_towers_in_onnx_are_folded(exported: SimpleNamespace) -> None:
    folded = fold(exported.student.model)
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]
    nodes = [node for tower in ("image", "text") for node in onnx.load(exported.out / f"{tower}.onnx").graph.node]
    assert len([node for node in nodes if node.op_type == "Conv"]) == len(convolutions)


def checked(exported: SimpleNamespace, folder: Path) -> list[str]:
    student = frozen(exported.student)
    try:
        return export.check(student, folder, load).faults
    finally:
        student.model.train()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_altered_graph_is_found(tower: str, exported: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.out, tmp_path / "altered")
    graph = onnx.load(folder / f"{tower}.onnx")
    matrices = {tensor.name: tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    name = next(name for node in reversed(graph.graph.node) for name in node.input if name in matrices)
    values = onnx.numpy_helper.to_array(matrices[name]).copy()
    values[0, 0] += 0.1  # one weight of the projection
    matrices[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(graph, folder / f"{tower}.onnx")
    (fault,) = checked(exported, folder)
    assert f"onnx/{tower} differs from the student's by up to" in fault


def test_one_altered_weight_is_found_even_where_no_probe_meets_it(exported: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.out, tmp_path / "altered")
    weights = load_file(folder / students.WEIGHTS)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name][1500, 0] += 1e-3  # a word that none of the sentences has
    save_file(weights, folder / students.WEIGHTS)
    (fault,) = checked(exported, folder)
    assert fault == f"{folder}: {name} is not as trained"


def test_other_preprocessing_is_found(exported: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.out, tmp_path / "altered")
    config = json.loads((folder / students.CONFIG).read_text())
    config["preprocess_cfg"] |= {"mean": [0.5] * 3}
    (folder / students.CONFIG).write_text(json.dumps(config))
    assert any("preprocess is" in fault for fault in checked(exported, folder))


def test_an_embedding_that_is_no_number_is_a_fault(exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_run_onnx", lambda path, inputs: torch.full((4, 128), float("nan")))
    assert len(checked(exported, exported.out)) == 2


# Around the export itself, which is made quick.


@pytest.fixture
def no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_write", lambda graph, path, facts: None)


def test_an_export_that_disagrees_is_reported_and_not_put_in_place(
    no_onnx: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = students.create("vit_tiny")
    monkeypatch.setattr(export, "_run_onnx", lambda path, inputs: torch.eye(4, 128))
    report = student.export(tmp_path / "out")
    assert len(report.faults) == 2
    assert report.folder == str(tmp_path / "out.partial")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.partial/export.json").read_text())["check"]["faults"] == report.faults


def test_an_export_that_fails_leaves_nothing_that_looks_whole_and_does_not_hinder_the_next(
    no_onnx: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = students.create("vit_tiny")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile):
        student.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial/left over").touch()
    (tmp_path / "out").mkdir()  # an empty one is no obstacle
    right = embeddings(student)
    monkeypatch.setattr(export, "_run_onnx", lambda path, inputs: right[path.stem])
    assert student.export(tmp_path / "out").faults == []
    assert not (tmp_path / "out/left over").exists() and not (tmp_path / "out.partial").exists()


def embeddings(student: Student) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(student.model).eval()
    with torch.no_grad():
        out = model(student.probe(), student.tokenizer(list(students.SENTENCES)))
    return {tower: out[f"{tower}_features"] for tower in ("image", "text")}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path) -> None:
    student = students.create("vit_tiny")
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
        path = path / "precious"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="out: is there already; export to another folder"):
        student.export(tmp_path / "out")
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_without_the_extra_there_is_a_sentence_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed.*'clip-reinforce\[export\]'"):
        students.create("vit_tiny").export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_every_student_of_the_table_exports(name: str, tmp_path: Path) -> None:
    student = students.create(name)
    report = student.export(tmp_path / name)
    assert report.faults == []


ALONE = """
import sys
import torch
try:
    import torchvision
except RuntimeError:  # of an index whose torchvision does not fit its torch; its parts in Python are all that is used
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.insert(0, sys.argv[1])
import modeling
from PIL import Image
from safetensors.torch import save_file
model, preprocess, tokenizer = modeling.load()
image = preprocess(Image.open(sys.argv[2]).convert("RGB"))[None]
with torch.no_grad():
    image = model.encode_image(image, normalize=True)
    text = model.encode_text(tokenizer(["a red circle", "two dogs"]), normalize=True)
classes = (model.logit_scale.exp() * image @ text.T).softmax(-1)
save_file({"image": image, "text": text, "classes": classes}, sys.argv[3])
for name in ("reinforce", "train", "pipelines", "onnx"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is here, too")
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has open_clip_torch, what it requires, what that requires, and no more.

    These are links to the packages of this environment: to install torch again would take minutes and a network.
    """
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [own] = (folder / "lib").glob("python*/site-packages")
    todo, seen = ["open_clip_torch"], set[str]()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        there = distribution(name)
        for part in {file.parts[0] for file in there.files or []} - {"..", "__pycache__"}:
            (own / part).symlink_to(there.locate_file(part))
        wanted = [Requirement(line) for line in there.requires or []]
        todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder / "bin/python"


def test_an_export_stands_alone(exported: SimpleNamespace, fresh: Path, tmp_path: Path) -> None:
    """It loads, tokenizes and classifies where open_clip is and this project is not, and says the same."""
    (tmp_path / "picture.jpg").write_bytes(tiny.picture(3))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run(
        [fresh, "-c", ALONE, exported.out, tmp_path / "picture.jpg", tmp_path / "found.safetensors"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported.out}")
    model.eval()
    tokens = exported.student.tokenizer(["a red circle", "two dogs"])
    with torch.no_grad():
        image = model.encode_image(preprocess(images.decode(tiny.picture(3)))[None], normalize=True)
        text = model.encode_text(tokens, normalize=True)
    assert torch.equal(found["image"], image) and torch.equal(found["text"], text)
    assert torch.allclose(found["classes"], (model.logit_scale.exp() * image @ text.T).softmax(-1))


@pytest.mark.parametrize("name", students.names())
def test_the_code_of_every_student_is_whole(name: str) -> None:
    """It compiles, knows every name that it uses, and holds nothing of ours; no name comes twice."""
    code = standalone.modeling(
        name, "FOLDER", json.loads((students.find(name) / students.CONFIG).read_text())["model_cfg"]
    )
    tree = ast.parse(code)
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in imported if module.split(".")[0] in ("train", "reinforce")]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(set(defined)) == len(defined)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811", "-"],
        input=code,
        text=True,
        check=False,
    )
    assert done.returncode == 0


def test_the_card_tells_of_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    student = students.create("vit_tiny")
    student.save(folder / "student")
    described = {"config": {"global_batch_size": 8, "distill": 0.75, "store": None}, "software": {"torch": "2"}}
    (folder / "config.json").write_text(json.dumps(described))
    told = {"student": "vit_tiny", "steps": 5, "samples": 40, "evaluated": {"own": {"acc1": 0.25, "num": 4}}}
    (folder / "report.json").write_text(json.dumps(told))
    card = students.create(str(folder / "student")).documents("X", {"agreement": {"onnx/image": {"min_cosine": 1.0}}})[
        "README.md"
    ]
    for line in ("| steps, samples a step | 5, 8 |", "| own | acc1 | 0.2500 |", "| store | none: captions alone |"):
        assert line in card.splitlines()
