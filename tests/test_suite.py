"""DataComp's tasks: found by any of their names, each with the metric that counts, and an average of what is there."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.data import shards
from reinforce.errors import ConfigError
from tests import tiny
from tests.processes import here
from train import students
from train.__main__ import app
from train.evaluation import metrics as ev
from train.evaluation.sets import EvalSet, write_classification_set
from train.evaluation.suite import DATACOMP, evaluate_suite, find
from train.students import Student


@pytest.fixture(scope="module")
def student() -> Student:
    student = students.create("vit_tiny")
    student.model.eval()
    return student


def npy(*numbers: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array(numbers))
    return file.getvalue()


def classes(folder: Path, num: int = 12, groups: int = 0, num_classes: int = 7) -> str:
    """Pictures of classes 0, 1, 2, ..; with `groups`, each says of which it is, as WILDS' sets do."""
    names = [f"thing {i}" for i in range(num_classes)]
    samples = (
        (f"{i:03d}", {"jpg": tiny.picture(i)} | ({"npy": npy(i % groups, 2020)} if groups else {}), i % num_classes)
        for i in range(num)
    )
    write_classification_set(str(folder), names, ["a photo of a {c}."], samples, samples_per_shard=5)
    return str(folder)


def captions(folder: Path, num: int = 6) -> str:
    samples = [(f"{i}", {"jpg": tiny.picture(i), "txt": f"one {i}\ntwo {i}\n".encode()}) for i in range(num)]
    shards.write(str(folder / "test/0.tar"), samples)
    (folder / "test/nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets as DataComp and CLIP_benchmark call them, one that is cut off, and one that is none of DataComp's."""
    folder = tmp_path_factory.mktemp("sets")
    classes(folder / "wds_cifar10_test")
    classes(folder / "wds_vtab-caltech101", 10)
    classes(folder / "wds_wilds-fmow_test", groups=3)
    classes(folder / "wds_dollar_street_test", groups=4)
    classes(folder / "wilds/iwildcam")
    captions(folder / "wds_flickr30k")
    classes(folder / "wds_dmlab")
    broken = Path(classes(folder / "wds_mnist"), "test/0.tar")
    broken.write_bytes(broken.read_bytes()[:3000])
    return folder


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("wds_vtab-cifar100_test", "vtab/cifar100"),
        ("wds/vtab/cifar100", "vtab/cifar100"),
        ("vtab_cifar100", "vtab/cifar100"),
        ("CIFAR-100", "vtab/cifar100"),
        ("wds_vtab-cifar10", "cifar10"),
        ("imagenet", "imagenet1k"),
        ("ImageNet 1k", "imagenet1k"),
        ("imagenet_a", "imagenet-a"),
        ("wds_imagenet-a", "imagenet-a"),
        ("imagenet-v2", "imagenetv2"),
        ("stanford_cars", "cars"),
        ("Oxford-IIIT Pet", "vtab/pets"),
        ("flowers102", "vtab/flowers"),
        ("wds_mscoco_captions", "retrieval/mscoco_2014_5k_test_image_text_retrieval"),
        ("retrieval/flickr_1k_test_image_text_retrieval", "retrieval/flickr_1k_test_image_text_retrieval"),
        ("wds_geode_test", "fairness/geode"),
        ("wds_wilds-camelyon17_test", "wilds/camelyon17"),
    ],
)
def test_a_task_is_found_by_each_of_its_names(tmp_path: Path, written: str, key: str) -> None:
    (tmp_path / "se[t]s" / written / "test").mkdir(parents=True)
    (tmp_path / "se[t]s" / written / "test/nshards.txt").write_text("1")
    [(task, url)] = find(f"{tmp_path}/se[t]s/").items()
    assert (task.key, url) == (key, f"{tmp_path}/se[t]s/{written}")


def test_they_are_thirty_eight_and_no_name_is_of_two() -> None:
    assert len(DATACOMP) == 38
    names = [name for task in DATACOMP for name in task.names]
    assert len(names) == len(set(names))
    assert {task.name for task in DATACOMP if task.metric == "mean_per_class_recall"} == {
        "Caltech-101", "FGVC Aircraft", "Oxford Flowers-102", "Oxford-IIIT Pet"
    }  # fmt: skip


def test_what_cannot_be_told_apart_or_is_not_there(tmp_path: Path) -> None:
    for name in ("wds_cifar10_test", "vtab/cifar10"):
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "test/nshards.txt").write_text("1")
    with pytest.raises(ConfigError, match=r"vtab/cifar10 and .*wds_cifar10_test are both CIFAR-10"):
        find(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds none of DataComp's tasks"):
        find(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="none is not there, so it holds none of DataComp's tasks"):
        find(str(tmp_path / "none"))


def test_each_task_has_the_metric_that_counts(student: Student, folder: Path) -> None:
    report = evaluate_suite(student, str(folder))
    scores = {result["dataset"]: result["metrics"] for result in report.results}
    assert [*scores] == ["Caltech-101", "CIFAR-10", "Flickr", "iWildCam", "FMoW", "Dollar Street"]
    urls = {task.name: url for task, url in find(str(folder)).items()}
    plain = ev.evaluate(student, {name: EvalSet(urls[name]) for name in scores})
    for name, found in scores.items():
        assert plain[name].items() <= found.items()
    assert scores["Caltech-101"]["main_metric"] == plain["Caltech-101"]["mean_per_class_recall"]
    assert scores["CIFAR-10"]["main_metric"] == plain["CIFAR-10"]["acc1"]
    both = [plain["Flickr"][f"{way}_retrieval_recall@1"] for way in ("text", "image")]
    assert scores["Flickr"]["main_metric"] == scores["Flickr"]["mean_recall@1"] == sum(both) / 2

    def hits(name: str, k: int) -> torch.Tensor:
        eval_set = EvalSet(urls[name])
        assert eval_set.prompts is not None
        loaded = eval_set.load(student.preprocess_cfg)
        alike = ev.embed_images(student, loaded.images, 64) @ ev.embed_classes(student, eval_set.prompts, 64).T
        return (alike.topk(k).indices == torch.tensor(loaded.truth)[:, None]).any(1).double()

    for name, metric, num, k in (("FMoW", "acc_worst_region", 3, 1), ("Dollar Street", "acc_top5_wg", 4, 5)):
        worst = min(hits(name, k)[group::num].mean().item() for group in range(num))
        assert scores[name]["main_metric"] == scores[name][metric] == worst
    assert report.failed.keys() == {"MNIST"} and "0.tar: cannot be read" in report.failed["MNIST"]
    assert report.num_tasks == 6 and report.not_computed.keys() == {"WinoGAViL"}
    assert report.average == pytest.approx(sum(found["main_metric"] for found in scores.values()) / 6)
    assert len(report.absent) == 38 - 6 - 1 - 1 and "ImageNet 1k" in report.absent


def test_the_command_prints_a_table_or_json(folder: Path, tmp_path: Path) -> None:
    code, out, _ = here(app, "eval", "vit_tiny", "--suite", "datacomp", str(folder))
    lines = out.splitlines()
    assert code == 1  # one could not be read
    assert lines[0].split() == ["Caltech-101", "mean_per_class_recall", lines[0].split()[-1]]
    assert any(line.startswith("average") and " 6 of 38 " in line for line in lines)
    assert any(line.startswith("failed: MNIST: ") for line in lines)
    assert any(line.startswith("not computed: WinoGAViL: ") for line in lines)
    classes(tmp_path / "cifar10")
    code, out, _ = here(app, "eval", "vit_tiny", "--suite", "datacomp", str(tmp_path), "--json")
    told = json.loads(out)
    assert (code, told["num_tasks"], told["average"]) == (0, 1, told["results"][0]["metrics"]["acc1"])
    code, _, err = here(app, "eval", "vit_tiny", "--suite", "datacomp", "a", "b")
    assert code == 2 and "--suite takes one folder" in err


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("fmow", classes, "000.npy is missing, or its first number is no group"),
        ("cifar10", captions, "CIFAR-10 needs images with classes"),
        ("flickr30k", classes, "Flickr needs images with captions"),
    ],
)
def test_a_set_of_another_kind_is_told(student: Student, tmp_path: Path, name: str, make, told: str) -> None:
    make(tmp_path / name)
    report = evaluate_suite(student, str(tmp_path))
    assert report.average is None and [told in why for why in report.failed.values()] == [True]


def test_parts_are_what_is_loaded_whole(student: Student, tmp_path: Path) -> None:
    eval_set = EvalSet(classes(tmp_path / "set"))
    parts = list(eval_set.parts(student.preprocess_cfg, 5))
    whole = eval_set.load(student.preprocess_cfg)
    assert [len(part.images) for part in parts] == [5, 5, 2]
    assert [label for part in parts for label in part.truth] == whole.truth
    assert torch.equal(torch.stack([image for part in parts for image in part.images]), torch.stack(whole.images))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 12))
def test_groups_and_f1_are_those_of_the_slow_definition(data: st.DataObject, num: int) -> None:
    numbers = st.lists(st.integers(0, 3), min_size=num, max_size=num)
    labels, given_labels, groups = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    images = torch.eye(4)[given_labels]
    truth, of_group = torch.tensor(labels), torch.tensor(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev, "BLOCK_ROWS", 3)
        f1 = ev.macro_f1(images, truth, torch.eye(4))
        worst = ev.worst_group(images, truth, torch.eye(4), of_group, 1)
    pairs = list(zip(given_labels, labels, strict=True))
    scores = []
    for label in set(labels):
        right = pairs.count((label, label))
        scores.append(2 * right / (given_labels.count(label) + labels.count(label)))
    assert f1 == pytest.approx(sum(scores) / len(scores))
    shares = [[a == b for (a, b), of in zip(pairs, groups, strict=True) if of == group] for group in set(groups)]
    assert worst == pytest.approx(min(sum(share) / len(share) for share in shares))
