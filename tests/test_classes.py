"""Class texts of a store: written once, known to all that look at a store; and images without captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reinforce.check.info import info
from reinforce.check.verify import verify
from reinforce.config import ClassSet, Recipe, RunOptions, parse
from reinforce.data import shards
from reinforce.errors import ConfigError, ManifestMismatch
from reinforce.models import prompts
from reinforce.models.frozen import FrozenModel
from reinforce.models.prompts import Prompts
from reinforce.models.teacher import Teacher
from reinforce.run import driver
from reinforce.run.worker import Worker
from reinforce.store.columns import CLASSES, columns
from reinforce.store.manifest import LATER, Manifest
from reinforce.store.store import Store
from tests import tiny

CPU = RunOptions(workers="0", device="cpu")
KINDS = ClassSet(classnames=("hat", "shoe", "long sleeve"), templates=("a photo of a {}.", "{c}"))


def with_classes(recipe: Recipe, **changes) -> Recipe:
    """Unlabelled and uncaptioned: no text set, one set of classes."""
    changes = {"class_sets": {"kinds": KINDS}, "num_original_captions": 0, "captioners": {}} | changes
    return Recipe.model_validate(recipe.model_dump() | changes)


def bare_tar(path: Path, num: int) -> str:
    shards.write(str(path), [(f"{path.stem}-{i}", {"jpg": tiny.picture(i)}) for i in range(num)])
    return str(path)


@pytest.fixture
def made(recipe: Recipe, tmp_path: Path) -> tuple[Recipe, str, str]:
    asked = with_classes(recipe)
    tars = "::".join(bare_tar(tmp_path / f"{i:05d}.tar", 5) for i in range(2))
    assert driver.run(tars, str(tmp_path / "s"), asked, CPU).failed == []
    return asked, tars, str(tmp_path / "s")


def test_classes_are_stored_once_beside_uncaptioned_images(made) -> None:
    recipe, tars, url = made
    store = Store(url)
    assert store.shards() == ["00000", "00001"]
    assert not [column for column in columns(recipe) if column.kind == "text"]
    assert (store.read("00000", "status") == 0).all()
    assert store.read(CLASSES, "kinds/name").tolist() == list(KINDS.classnames)
    for name, config in recipe.teachers.items():
        stored = store.read(CLASSES, f"kinds/{name}").astype(np.float32)
        teacher = Teacher(config, 4, torch.device("cpu"))
        slow = []
        for classname in KINDS.classnames:
            said = teacher.encode_texts([f"a photo of a {classname}.", classname]).astype(np.float64)
            slow.append(said.mean(0) / np.linalg.norm(said.mean(0)))
        np.testing.assert_allclose(stored, np.array(slow), atol=0.01)
        np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=0.01)
        array = store.open_array(CLASSES, f"kinds/{name}")
        assert array.attrs["rows"] == array.chunks[0] == 3
    told = info(url)
    assert told["class_sets"] == {"kinds": {"classes": 3, "templates": 2, "teachers": ["vit", "conv"]}}
    assert (told["text_sets"], told["shards"], told["missing_columns"]) == ({}, 2, [])
    report = verify(url, tars, 4, "cpu")
    assert report.sound and report.columns_checked == 2 * len(columns(recipe)) + 3


def test_lost_classes_are_written_again_and_are_the_same(made) -> None:
    recipe, tars, url = made
    whole = tiny.tree(url)
    (Path(url) / CLASSES / "kinds/vit/zarr.json").unlink()
    assert info(url)["missing_columns"] == verify(url, None, 0).missing == ["__classes__/kinds/vit"]
    driver.run(tars, url, recipe, CPU)  # no shard lacks anything
    assert tiny.tree(url) == whole
    Worker(recipe, url, CPU)
    assert tiny.tree(url) == whole


def test_damaged_classes_are_found(made) -> None:
    _, _, url = made
    store = Store(url)
    ones = np.ones_like(store.read(CLASSES, "kinds/vit"))
    for column, array in (("kinds/vit", ones), ("kinds/name", np.array(["hat"], dtype=object))):
        store.remove(CLASSES, column)
        store.commit(CLASSES, column, array)
    assert verify(url, None, 0).corrupt == [
        "__classes__/kinds/name: 1 rows, the manifest has 3",
        "__classes__/kinds/vit: embeddings of good samples that are not unit vectors",
    ]


def test_other_classes_and_other_prompts_are_another_recipe(made, tmp_path: Path) -> None:
    recipe, _, url = made
    with pytest.raises(ManifestMismatch, match=r"class_sets.kinds.classnames: the store has .*'shoe'"):
        Worker(with_classes(recipe, class_sets={"kinds": ClassSet(classnames=("hat", "coat"))}), url, CPU)
    vit = recipe.teachers["vit"]
    frozen = FrozenModel(vit, torch.device("cpu"))
    path = tmp_path / "p.safetensors"

    def adapted(seed: int) -> Recipe:
        added = Prompts.fresh(frozen.model, 2, 1, seed, frozen.tokenizer)
        prompts.save(added, path, "vit", frozen.digest, {})
        return with_classes(recipe, teachers={"vit": vit.but(prompts=str(path))})

    Worker(adapted(0), str(tmp_path / "adapted"), CPU)
    Worker(adapted(0), str(tmp_path / "adapted"), CPU)
    with pytest.raises(ManifestMismatch, match=r"models.teachers.vit.weights_sha256"):
        Worker(adapted(1), str(tmp_path / "adapted"), CPU)
    with pytest.raises(ManifestMismatch, match=r"models.teachers.vit.weights_sha256"):
        Worker(adapted(0), url, CPU)


def test_a_store_from_before_there_were_classes_is_still_the_same(recipe: Recipe, tmp_path: Path) -> None:
    Worker(recipe, str(tmp_path / "s"), CPU).promise()
    path = tmp_path / "s/zarr.json"
    root = json.loads(path.read_text())
    told = root["attributes"]["reinforce"]
    del told["recipe"]["class_sets"]
    for teacher in told["recipe"]["teachers"].values():
        del teacher["prompts"]
    for model in (model for kind in told["models"].values() for model in kind.values()):
        for later in LATER:
            del model[later]
    old = Manifest(told["recipe"], told["models"], told["augment_fields"], told["software"], 1)
    path.write_text(json.dumps({"attributes": {"reinforce": old.to_json()}}))
    manifest = Store(str(tmp_path / "s")).manifest()
    assert manifest and manifest.parsed_recipe() == recipe
    driver.run(tiny.tar(tmp_path / "00000.tar", 3), str(tmp_path / "s"), recipe, CPU)
    assert info(str(tmp_path / "s"))["class_sets"] == {}


def test_class_names_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("hat\nlong sleeve\n")
    read = parse(ClassSet, {"classnames": str(tmp_path / "classnames.txt")}, "x")
    assert read.classnames == ("hat", "long sleeve") and read.texts()[1] == "a photo of a long sleeve."


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"classnames": ["hat"]}, "at least two classes"),
        ({"classnames": ["hat", ""]}, "no name may be empty"),
        ({"classnames": ["hat", "hat"]}, "names 'hat' twice"),
        ({"classnames": "/none/classnames.txt"}, "cannot be read from '/none/classnames.txt'"),
        ({"classnames": ["a", "b"], "templates": ["a hat"]}, "'a hat' has no place for the class"),
    ],
)
def test_wrong_classes_get_a_sentence(tree: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(ClassSet, tree, "classes")
