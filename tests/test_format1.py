"""What version 0.1.0 wrote (commit ac61c61, format 1) opens, verifies, resumes and trains as it did there.

tests/format1.tar.xz was written by that commit, on one CPU thread; this tree cannot write it anew. Paths in it are
relative to its folder:

    00000.tar, 00001.tar    5 good samples and a bad one, and 4 good ones
    teacher, student        open_clip models of a few thousand weights
    store.zarr              what `reinforce run` made of the tars by recipe.json
    run                     a training by training.json, as if killed after step 3 of 6
    weights_at_the_end..    the weights of the same training, left alone
    prompts.safetensors     what `train adapt` made of `labelled`, 2 classes of 2 + 2 images, by adaptation.json
    export                  the trained student, by `train export`
    classifier              a student trained in the same way with ComKD-CLIP's terms on the store's class set
    expected.json           the curve; what the classifier says of `labelled`, split test; digest and embeddings of the
                            adapted teacher, of a gray image and of "red"
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from reinforce.__main__ import app as reinforce
from reinforce.config import Teacher as Config
from reinforce.data import shards
from reinforce.models.open_clip import open_clip
from reinforce.models.teacher import Teacher
from reinforce.models.tokenizer import get_tokenizer
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here
from train.__main__ import app as train

ARCHIVE = Path(__file__).parent / "format1.tar.xz"
TARS = "00000.tar::00001.tar"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def answer(app: Any, *arguments: str) -> Any:
    code, out, err = here(app, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def run(store: str) -> Any:
    return answer(
        reinforce, "run", TARS, "--store", store, "--recipe", "recipe.json", "--workers", "0", "--device", "cpu",
        "--max-invalid", "0.5",
    )  # fmt: skip


def test_the_store_opens() -> None:
    found = answer(reinforce, "info", "store.zarr")
    assert (found["format_version"], found["shards"], found["samples"], found["valid"]) == (1, 2, 10, 9)
    assert found["missing_columns"] == [] and found["quarantined"] == {"unknown_image_format": 1}
    assert found["class_sets"]["kinds"]["classes"] == 2
    assert Store("store.zarr").read("00001", "text/original/caption").tolist() == [
        [f"picture {i} of b" for i in range(4)]
    ]


def test_the_store_verifies_and_replays() -> None:
    report = answer(reinforce, "verify", "store.zarr", "--shards", TARS, "--replay", "100", "--device", "cpu")
    assert (report["columns_checked"], report["corrupt"], report["missing"]) == (2 * 8 + 2, [], [])
    assert report["replay"]["views"] == report["replay"]["pixel_equal"] == 9 * 2
    assert report["replay"]["cosine_min"] >= 0.999


def test_a_run_finds_nothing_to_do() -> None:
    before = tiny.tree("store.zarr")
    assert run("store.zarr")["already_there"] == 2
    assert tiny.tree("store.zarr") == before


def test_the_same_tars_and_recipe_make_the_same_columns() -> None:
    """In format 2 they lie in other objects. Another processor may round an embedding otherwise."""
    run("again.zarr")
    old, new = Store("store.zarr"), Store("again.zarr")
    assert new.promised().recipe == old.promised().recipe and new.promised().format_version == 2
    assert old.shards() == new.shards() == ["00000", "00001"]
    for shard, columns in [
        ("__classes__", old.promised().class_columns()),
        *((s, old.promised().columns()) for s in old.shards()),
    ]:
        for column in columns:
            a, b = (store.read(shard, column) for store in (old, new))
            if column.teacher:
                assert_same_embeddings(a.astype(np.float64), b.astype(np.float64))
            elif column.part != "pixels":  # hashed in another way now: the replay of the old ones compares them
                assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), (shard, column)


def test_what_cannot_be_checked_is_said() -> None:
    assert answer(reinforce, "verify", "store.zarr")["unchecked"] == [
        "format 1 knows its tars by keys and sizes only, not by content: see docs/store.md"
    ]


def test_what_a_run_adds_is_checked_and_the_rest_is_read_as_before() -> None:
    """A column that is missing is written as format 2 writes it; the store stays one of format 1."""
    before = Store("store.zarr").read("00000", "view/base/clip")
    Store("store.zarr").remove("00000", "view/base/clip")
    assert run("store.zarr")["done"] == 1
    store = Store("store.zarr")
    assert_same_embeddings(before.astype(np.float64), store.read("00000", "view/base/clip").astype(np.float64))
    assert store.attributes("00000", "view/base/clip")["shard"] == "00000"
    assert "shard" not in store.attributes("00001", "view/base/clip")
    assert answer(reinforce, "verify", "store.zarr")["corrupt"] == []


def test_it_grows_and_stays_of_its_format() -> None:
    before = tiny.tree("store.zarr")
    added = json.dumps({"num_views": 1, "view_px": 24})
    told = answer(
        reinforce, "extend", TARS, "--store", "store.zarr", "--set", f"view_sets.more={added}", "--workers", "0",
        "--device", "cpu", "--max-invalid", "0.5",
    )  # fmt: skip
    assert (told["done"], told["failed"]) == (2, [])
    assert {path: data for path, data in tiny.tree("store.zarr").items() if path in before} == before
    store = Store("store.zarr")
    assert store.promised().format_version == 1 and store.read("00000", "view/more/clip").shape[0] == 1
    assert answer(reinforce, "verify", "store.zarr", "--shards", TARS)["corrupt"] == []


def test_it_is_upgraded_beside_itself() -> None:
    """The same columns, with what was missing; it is then as strict as one that was written anew, and goes on."""
    before = tiny.tree("store.zarr")
    told = answer(reinforce, "upgrade", "store.zarr", "--to", "new.zarr", "--shards", TARS)
    assert (told["shards"], told["done"], told["failed"]) == (2, 2, []) and tiny.tree("store.zarr") == before
    old, new = Store("store.zarr"), Store("new.zarr")
    for column in old.promised().columns():
        a, b = (store.read("00000", column) for store in (old, new))
        assert a.dtype == b.dtype and (a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes())
    assert answer(reinforce, "verify", "new.zarr", "--shards", TARS, "--strict")["unchecked"] == []
    whole = tiny.tree("new.zarr")
    assert answer(reinforce, "upgrade", "store.zarr", "--to", "new.zarr", "--shards", TARS)["done"] == 2
    assert tiny.tree("new.zarr") == whole and run("new.zarr")["already_there"] == 2
    Store("new.zarr").remove("00001", "view/base/clip")
    assert run("new.zarr")["done"] == 1
    code, _, err = here(reinforce, "upgrade", "new.zarr", "--to", "x.zarr", "--shards", TARS)
    assert code == 2 and "is of format 2 already" in err


def test_other_images_are_not_taken_for_those_of_the_store() -> None:
    first, second = TARS.split("::")
    edited = list(shards.read_parts(shards.expand(second)[0], ("jpg", "png", "txt")))
    pictures = [parts[next(iter(parts))] for _, parts in edited]
    for (_, parts), picture in zip(edited, pictures[1:] + pictures[:1], strict=True):
        parts[next(iter(parts))] = picture
    Path("other").mkdir()
    shards.write(f"other/{second}", edited)
    code, out, _ = here(
        reinforce, "upgrade", "store.zarr", "--to", "new.zarr", "--shards", f"{first}::other/{second}", "--json"
    )
    told = json.loads(out)
    assert code == 1 and told["done"] == 1 and len(told["failed"]) == 1
    assert told["failed"][0].startswith("00001: ") and Store("new.zarr").shards() == ["00000"]


def assert_same_embeddings(a: np.ndarray, b: np.ndarray) -> None:
    good = ~np.isnan(a).any(-1)
    assert (good == ~np.isnan(b).any(-1)).all() and good.sum() > 1
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine[good].min() > 0.99999


@pytest.mark.heavy
def test_a_training_goes_on_from_its_checkpoint() -> None:
    """The same but for rounding, of which AdamW makes much where a gradient is nothing else: the bias of keys."""
    expected = json.loads(Path("expected.json").read_text())["curve"]
    report = answer(
        train, "fit", "--shards", TARS, "--store", "store.zarr", "--recipe", "training.json", "--out", "run"
    )
    assert report["steps"] == 6
    curve = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    for line, wanted in zip(curve, expected, strict=True):
        for name in ("contrastive", "distill", "loss", "grad_norm", "lr"):
            assert line[name] == pytest.approx(wanted[name], abs=1e-5), (line["step"], name)
    for line, before in zip(curve[3:], expected[2:], strict=False):  # the scale after a step is that before the next
        assert line["logit_scale"] == pytest.approx(before["logit_scale"], abs=1e-5)
    weights, wanted = load_file("run/student/open_clip_model.safetensors"), load_file("weights_at_the_end.safetensors")
    torch.testing.assert_close(weights, wanted, atol=1e-4, rtol=0)


def test_prompts_are_known_again_and_adapt_their_teacher_as_they_did() -> None:
    before = Path("prompts.safetensors").read_bytes()
    report = answer(train, "adapt", "labelled", "--recipe", "adaptation.json", "--out", "prompts.safetensors")
    assert (report["teacher"], report["classes"], report["images"]) == ("local-dir:teacher", 2, 4)
    assert report["metrics"]["cross_entropy"] == 0.6477614045143127
    assert Path("prompts.safetensors").read_bytes() == before
    expected = json.loads(Path("expected.json").read_text())["adapted"]
    teacher = Teacher(Config(model="local-dir:teacher", prompts="prompts.safetensors"), 4, torch.device("cpu"))
    assert teacher.describe()["weights_sha256"] == expected["digest"]
    (image,), (text,) = teacher.encode_images(np.full((1, 16, 16, 3), 128, np.uint8)), teacher.encode_texts(["red"])
    assert_same_embeddings(np.stack([image, text]).astype(np.float64), np.array([expected["image"], expected["text"]]))


def test_an_export_loads_in_open_clip_and_agrees_with_its_onnx() -> None:
    model = open_clip.create_model("local-dir:export").eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = get_tokenizer("local-dir:export")(["a red circle", "a blue one", ""])
    with torch.no_grad():
        towers = {
            "image": model.encode_image(images, normalize=True),
            "text": model.encode_text(tokens, normalize=True),
        }
    for (tower, expected), (name, data) in zip(towers.items(), [("images", images), ("tokens", tokens)], strict=True):
        session = onnxruntime.InferenceSession(f"export/{tower}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run([f"{tower}_features"], {name: data.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_classifier_says_what_it_said() -> None:
    expected = json.loads(Path("expected.json").read_text())
    said = {{"top1": "acc1"}.get(name, name): value for name, value in expected["classifier"]["t"].items()}
    assert answer(train, "eval", "classifier", "t=labelled") == {"t": said}
    with tarfile.open("labelled/test/0.tar") as tar:
        tar.extractall(filter="data")
    for picture, shares in expected["classified"].items():
        found = answer(train, "classify", "classifier", picture)["classified"][picture]
        assert found == pytest.approx(dict(zip(["red", "blue"], shares, strict=True)), abs=1e-4)
