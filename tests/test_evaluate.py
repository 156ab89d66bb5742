import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reinforce.config import CaptionFiles
from reinforce.data import images, shards
from reinforce.errors import ConfigError, MissingExtra, ShardError
from reinforce.models.open_clip import open_clip
from reinforce.models.pixels import Normaliser
from tests import tiny
from train import students
from train.evaluation import metrics as ev
from train.evaluation.sets import EvalSet, write_classification_set
from train.students import Student

CLASSES = ["cat", "dog", "red {fox}"]
TEMPLATES = ["a photo of a {c}.", "{} and {nothing} else"]


@pytest.fixture(scope="module")
def student() -> Student:
    return students.create("vit_tiny")


def unit(rows: list[list[float]]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


# Metrics, by eye.


def test_zeroshot_by_eye() -> None:
    classes = torch.eye(3)
    image_features = unit([[3, 2, 1], [1, 3, 2], [2, 3, 1], [1, 2, 3]])  # nearest: 0, 1, 1, 2
    metrics = ev.zeroshot(image_features, torch.tensor([0, 1, 0, 0]), classes)
    assert metrics == {
        "acc1": 0.5,
        "mean_per_class_recall": pytest.approx((1 / 3 + 1) / 2),
        "num": 4,
    }  # class 2 has no image


def test_acc5_is_there_where_it_says_something() -> None:
    image_features = unit([[6, 5, 4, 3, 2, 1, 0]])
    at = [ev.zeroshot(image_features, torch.tensor([label]), torch.eye(7)) for label in range(7)]
    assert [m["acc1"] for m in at] == [1, 0, 0, 0, 0, 0, 0]
    assert [m["acc5"] for m in at] == [1, 1, 1, 1, 1, 0, 0]
    assert "acc5" not in ev.zeroshot(torch.eye(5), torch.arange(5), torch.eye(5))
    assert "acc5" in ev.zeroshot(torch.eye(6), torch.arange(6), torch.eye(6))


def test_retrieval_by_eye_with_several_captions_an_image() -> None:
    image_features = torch.eye(2)
    text_features = unit([[3, 1], [1, 2], [1, 3], [0, 1]])
    # Image 0 has texts 0 and 1: its first is nearest, its second lies with image 1. Image 1 has texts 2 and 3.
    metrics = ev.retrieval(image_features, text_features, torch.tensor([0, 0, 1, 1]))
    assert metrics["text_retrieval_recall@1"] == 1.0
    assert metrics["image_retrieval_recall@1"] == 0.75
    assert metrics["image_retrieval_recall@5"] == metrics["text_retrieval_recall@10"] == 1.0
    assert (metrics["num_images"], metrics["num_texts"]) == (2, 4)


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")], ids=["equal", "zero", "nan"])
def test_a_student_that_says_the_same_of_everything_scores_nothing(value: float) -> None:
    features = torch.full((40, 8), value)
    zeroshot = ev.zeroshot(features, torch.arange(40), features)
    assert zeroshot == {"acc1": 0, "acc5": 0, "mean_per_class_recall": 0, "num": 40}
    recalls = ev.retrieval(features, features, torch.arange(40))
    assert not any(value for name, value in recalls.items() if not name.startswith("num"))


def test_names_are_those_of_clip_benchmark() -> None:
    """Version 1.6.2: clip_benchmark/metrics/zeroshot_classification.py and zeroshot_retrieval.py."""
    classes = ev.zeroshot(torch.eye(6), torch.arange(6), torch.eye(6))
    assert {"acc1", "acc5", "mean_per_class_recall"} | {"num"} == classes.keys()
    theirs = {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)}
    assert theirs | {"num_images", "num_texts"} == ev.retrieval(torch.eye(2), torch.eye(2), torch.arange(2)).keys()


def test_one_other_that_ties_is_a_miss_at_1_and_a_hit_at_5() -> None:
    image_features, class_features = torch.eye(6)[:1], torch.eye(6)
    class_features[3] = class_features[0]
    metrics = ev.zeroshot(image_features, torch.tensor([0]), class_features)
    assert (metrics["acc1"], metrics["acc5"]) == (0.0, 1.0)


# Metrics, against a slow definition. Whole numbers, so that similarities and their ties are exact.


def rows(num: int) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    return st.lists(row, min_size=num, max_size=num).map(lambda rows: torch.tensor(rows, dtype=torch.float32))


def slow_hits(queries: Tensor, items: Tensor, is_own: Any, k: int) -> list[bool]:
    """Sort what each query sees, own items after others of the same similarity; is one of its own among the first k?"""
    hits = []
    for q, query in enumerate(queries.tolist()):
        seen = [(sum(a * b for a, b in zip(query, item, strict=True)), i) for i, item in enumerate(items.tolist())]
        order = sorted(seen, key=lambda pair: (-pair[0], is_own(q, pair[1])))
        hits.append(any(is_own(q, i) for _, i in order[:k]))
    return hits


def mean(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 7), st.integers(0, 7))
def test_metrics_are_those_of_the_slow_definition(data: st.DataObject, num_images: int, num_more: int) -> None:
    more = data.draw(st.lists(st.integers(0, num_images - 1), min_size=num_more, max_size=num_more))
    owner = data.draw(st.permutations([*range(num_images), *more]))
    labels = data.draw(st.lists(st.integers(0, len(owner) - 1), min_size=num_images, max_size=num_images))
    image_features, others = data.draw(rows(num_images)), data.draw(rows(len(owner)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev, "BLOCK_ROWS", 3)
        recalls = ev.retrieval(image_features, others, torch.tensor(owner))
        zeroshot = ev.zeroshot(image_features, torch.tensor(labels), others)
    for k in (1, 5, 10):
        assert recalls[f"text_retrieval_recall@{k}"] == pytest.approx(
            mean(slow_hits(image_features, others, lambda image, text: owner[text] == image, k))
        )
        assert recalls[f"image_retrieval_recall@{k}"] == pytest.approx(
            mean(slow_hits(others, image_features, lambda text, image: owner[text] == image, k))
        )
    hits = slow_hits(image_features, others, lambda image, label: labels[image] == label, 1)
    by_class = [mean([hit for hit, label in zip(hits, labels, strict=True) if label == c]) for c in {*labels}]
    assert zeroshot["acc1"] == pytest.approx(mean(hits))
    assert zeroshot["mean_per_class_recall"] == pytest.approx(mean(by_class))
    acc5 = slow_hits(image_features, others, lambda image, label: labels[image] == label, 5)
    assert zeroshot.get("acc5") == (pytest.approx(mean(acc5)) if len(others) > 5 else None)


# Embeddings.


def test_images_are_what_the_students_transform_makes_of_them(student: Student, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "0.tar", 3)
    pictures = [images.decode(sample.image) for sample in shards.read(shards.Shard("0", tar))]
    for changes in ({}, {"resize_mode": "squash"}, {"resize_mode": "longest"}, {"mean": (0.5,) * 3, "std": (0.2,) * 3}):
        cfg = student.preprocess_cfg | changes
        transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), is_train=False)
        seen: list[Tensor] = []
        spy = replace(student, model=Spy(cfg, seen))
        ev.embed_images(spy, EvalSet(tar).load(cfg).images, batch_size=2)
        assert torch.equal(torch.cat(seen), torch.stack([transform(picture) for picture in pictures]))
        assert [len(batch) for batch in seen] == [2, 1]


def test_the_normaliser_is_the_plain_arithmetic_bit_for_bit(student: Student) -> None:
    """Images may come with channels first or last; mean and std move with the module and are not saved."""
    cfg = student.preprocess_cfg | {"mean": (0.48, 0.45, 0.4), "std": (0.26, 0.25, 0.27)}
    normaliser = Normaliser(cfg)
    last = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    first = last.permute(0, 3, 1, 2)
    expected = (first.float() / 255 - mean) / std
    for pixels in (first, first.contiguous()):
        found = normaliser(pixels)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert found.is_contiguous() and not normaliser(first).is_contiguous()  # the layout stays, and convolutions see it
    assert not normaliser.state_dict() and normaliser.to("meta").mean.is_meta


class Spy(nn.Module):
    def __init__(self, preprocess_cfg: dict, seen: list[Tensor]) -> None:
        super().__init__()
        self.visual = nn.Linear(1, 1)
        self.visual.preprocess_cfg = preprocess_cfg
        self.encode_image = lambda batch: seen.append(batch) or batch.flatten(1)


def test_classes_are_embedded_as_open_clip_does(student: Student) -> None:
    with ev._evaluating(student.model):
        expected = open_clip.build_zero_shot_classifier(
            student.model, student.tokenizer, CLASSES[:2], ["a {}", "my {}!"]
        )
        found = ev.embed_classes(student, [[f"a {name}", f"my {name}!"] for name in CLASSES[:2]], batch_size=3)
    assert torch.allclose(found, expected.T, atol=1e-6)


def test_every_module_has_its_own_mode_again_even_after_an_error(student: Student, tmp_path: Path) -> None:
    student.model.train()
    student.model.visual.ln_pre.eval()  # as someone who freezes a part leaves it
    modes = [module.training for module in student.model.modules()]
    sets = {"held out": EvalSet(tiny.tar(tmp_path / "0.tar", 2))}
    seen: list[bool] = []
    hook = student.model.visual.register_forward_hook(lambda module, *_: seen.append(module.training))
    ev.evaluate(student, sets)
    hook.remove()
    with pytest.raises(AttributeError):
        ev.evaluate(replace(student, tokenizer=None, model=student.model), {"none": None})  # type: ignore[dict-item]
    assert seen == [False]
    assert [module.training for module in student.model.modules()] == modes


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_any_batch_size_gives_the_same_metrics(batch_size: int, student: Student, tmp_path: Path) -> None:
    sets = {"classes": EvalSet(classification_set(tmp_path)), "captions": EvalSet(tiny.tar(tmp_path / "0.tar", 7))}
    assert ev.evaluate(student, sets, batch_size) == ev.evaluate(student, sets)


def test_a_student_that_sees_nothing_scores_nothing(tmp_path: Path) -> None:
    student = students.create("vit_tiny")
    with torch.no_grad():
        student.model.visual.proj.zero_()
    metrics = ev.evaluate(student, {"classes": EvalSet(classification_set(tmp_path))})["classes"]
    assert metrics == {"acc1": 0, "mean_per_class_recall": 0, "num": 6, "num_skipped": 0}


def test_half_precision_is_near(student: Student, tmp_path: Path) -> None:
    loaded = EvalSet(tiny.tar(tmp_path / "0.tar", 4)).load(student.preprocess_cfg)
    full, half = (ev.embed_images(student, loaded.images, 4, precision) for precision in ("fp32", "amp_bf16"))
    assert full.dtype == half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.02
    assert torch.allclose(half.norm(dim=1), torch.ones(4))


# Sets.


def classification_set(folder: Path, num: int = 6) -> str:
    samples = ((f"{i:03d}", {"jpg": tiny.picture(i)}, i % 3) for i in range(num))
    write_classification_set(str(folder / "set"), CLASSES, TEMPLATES, samples, samples_per_shard=4)
    return str(folder / "set")


def test_a_set_comes_back_as_it_was_written(student: Student, tmp_path: Path) -> None:
    eval_set = EvalSet(classification_set(tmp_path))
    assert eval_set.prompts is not None
    assert eval_set.prompts[2] == ["a photo of a red {fox}.", "red {fox} and {nothing} else"]
    loaded = eval_set.load(student.preprocess_cfg)
    assert (loaded.truth, loaded.num_skipped) == ([0, 1, 2, 0, 1, 2], 0)
    assert {(image.dtype, tuple(image.shape)) for image in loaded.images} == {(torch.uint8, (3, 64, 64))}
    assert eval_set.load(student.preprocess_cfg) is loaded
    assert eval_set.load(student.preprocess_cfg | {"size": 32}).images[0].shape == (3, 32, 32)


def test_webdataset_reads_what_was_written_as_clip_benchmark_does(tmp_path: Path) -> None:
    folder = Path(classification_set(tmp_path))
    assert (folder / "test/nshards.txt").read_text().strip() == "2"
    urls = [str(folder / f"test/{i}.tar") for i in range(2)]
    handler = webdataset.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg", "jpeg"])
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode(handler).to_tuple(["webp", "jpg"], "cls")
    assert [label for _, label in dataset] == [0, 1, 2, 0, 1, 2]


def test_a_set_may_lie_behind_a_url(student: Student) -> None:
    write_classification_set("memory://bucket/set", CLASSES, TEMPLATES, [("a", {"jpg": tiny.picture(0)}, 2)])
    assert EvalSet("memory://bucket/set/").load(student.preprocess_cfg).truth == [2]


def retrieval_set(folder: Path, samples: list[tuple[str, dict[str, bytes]]]) -> str:
    shards.write(str(folder / "test/0.tar"), samples)
    (folder / "test/nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return str(folder)


def test_a_line_is_a_caption_in_clip_benchmarks_layout(student: Student, tmp_path: Path) -> None:
    samples = [
        ("a", {"jpg": tiny.picture(0), "txt": b"one\r\ntwo words \n\n"}),
        ("b", {"png": tiny.picture(1), "txt": b"three"}),
    ]
    url = retrieval_set(tmp_path, samples)
    assert EvalSet(url).load(student.preprocess_cfg).truth == [("one", "two words"), ("three",)]
    metrics = ev.evaluate(student, {"r": EvalSet(url)})["r"]
    assert (metrics["num_images"], metrics["num_texts"], metrics["num_skipped"]) == (2, 3, 0)


def test_tars_of_a_training_set_give_all_their_captions(student: Student, tmp_path: Path) -> None:
    many = json.dumps({"captions": ["two", "three"]}).encode()
    for name in "ab":
        parts = {"jpg": tiny.picture(0), "txt": f"one\n{name}".encode(), "json": many}
        shards.write(str(tmp_path / f"{name}.tar"), [("key", parts)])
    url = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    loaded = EvalSet(url).load(student.preprocess_cfg)
    assert loaded.truth == [("one a", "two", "three"), ("one b", "two", "three")]
    loaded = EvalSet(url, files=CaptionFiles(lines=True, keys=("none",))).load(student.preprocess_cfg)
    assert loaded.truth == [("one", "a"), ("one", "b")]


def test_a_label_may_be_in_json(student: Student, tmp_path: Path) -> None:
    url = classification_set(tmp_path)
    labels = (b"1", b'{"label": 2}', b'{"cls": 0, "width": 3}')
    samples = [(f"{i}", {"jpg": tiny.picture(i), "json": label}) for i, label in enumerate(labels)]
    shards.write(f"{url}/test/0.tar", samples)
    (Path(url) / "test/nshards.txt").write_text("1\n")
    (Path(url) / "test/1.tar").unlink(missing_ok=True)
    assert EvalSet(url).load(student.preprocess_cfg).truth == [1, 2, 0]
    for wrong in (b'"1"', b'{"label": true}', b"{", b'{"width": 3}'):
        shards.write(f"{url}/test/0.tar", [("a", {"jpg": b"", "json": wrong})])
        with pytest.raises(ConfigError, match=r"a.cls is missing or not a number"):
            EvalSet(url).load(student.preprocess_cfg)


def test_what_cannot_be_used_is_skipped_counted_and_said(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, cut = tiny.picture(0), tiny.picture(1)[:300]
    samples = [
        ("a", {"jpg": good, "txt": b"good"}),
        ("b", {"jpg": cut, "txt": b"cut off"}),
        ("c", {"txt": b"no image"}),
        ("d", {"jpg": good, "txt": b" \n"}),
        ("e", {"jpg": good}),
        ("f", {"jpg": good, "txt": b"\xff\xfe"}),
    ]
    with caplog.at_level(logging.WARNING):
        loaded = EvalSet(retrieval_set(tmp_path, samples)).load(student.preprocess_cfg)
    assert (loaded.truth, len(loaded.images), loaded.num_skipped) == ([("good",)], 1, 5)
    assert (
        "5 of 6 samples skipped: empty_caption 2, truncated_image 1, missing_image 1, caption_not_utf8 1" in caplog.text
    )
    assert "b: image: JPEG cannot be decoded" in caplog.text and "d: has no .txt with a caption" in caplog.text
    url = tiny.tar(tmp_path / "plain.tar", 3, num_bad=2)
    assert ev.evaluate(student, {"plain": EvalSet(url)})["plain"]["num_skipped"] == 2


def test_a_folder_without_templates_has_those_of_imagenet(tmp_path: Path) -> None:
    folder = Path(classification_set(tmp_path))
    (folder / "zeroshot_classification_templates.txt").unlink()
    prompts = EvalSet(str(folder)).prompts
    assert prompts is not None and {len(texts) for texts in prompts} == {80}
    assert prompts[0][0] == "a bad photo of a cat."


def test_classes_of_one_name_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(classification_set(tmp_path))
    (folder / "classnames.txt").write_text("missile\ncat\nmissile\n")
    EvalSet(str(folder))
    assert "2 classes are called 'missile'" in caplog.text


def _tar(samples: list[tuple[str, dict[str, bytes]]]) -> Any:
    return lambda folder: shards.write(f"{folder}/test/0.tar", samples)


def _text(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda folder: (folder / "classnames.txt").unlink(),
            "set/classnames.txt: not found; write one class per line",
        ),
        (_text("classnames.txt", "cat\n"), "set/classnames.txt: has to name at least two classes"),
        (_text("classnames.txt", "cat\n\ndog\nfox\n"), "no line empty"),
        (_text("classnames.txt", "cat\ndog\n"), "002.cls: label 2, and classnames.txt names 2 classes, counted from 0"),
        (_text("zeroshot_classification_templates.txt", "{c}\na photo\n"), "'a photo' has no place for the class"),
        (_text("zeroshot_classification_templates.txt", "\n"), "is empty; write one template per line"),
        (
            _text("dataset_type.txt", "multilabel"),
            "set/dataset_type.txt: says 'multilabel'; write classification or retrieval",
        ),
        (
            lambda folder: (folder / "test/nshards.txt").unlink(),
            "set/test/nshards.txt: not found; an evaluation set is",
        ),
        (_text("test/nshards.txt", "two"), "set/test/nshards.txt: says 'two'; it has to be the number of tars"),
        (_text("test/nshards.txt", "0"), "set/test/nshards.txt: says '0'"),
        (_text("test/nshards.txt", "3"), "set/test/nshards.txt: says 3, and 2.tar is not there"),
        (_text("test/nshards.txt", "1"), "set/test/nshards.txt: says 1, and 1.tar is there as well"),
        (_tar([("a", {"jpg": b""})]), "0.tar: a.cls is missing or not a number"),
        (_tar([("a", {"jpg": b"", "cls": b"cat"})]), "0.tar: a.cls is missing or not a number"),
        (_tar([("a", {"jpg": b"", "cls": b"-1"})]), "a.cls: label -1"),
    ],
)
def test_a_wrong_folder_gets_a_sentence(damage: Any, sentence: str, student: Student, tmp_path: Path) -> None:
    url = classification_set(tmp_path)
    damage(Path(url))
    with pytest.raises(ConfigError) as caught:
        EvalSet(url).load(student.preprocess_cfg)
    assert sentence in str(caught.value)


def test_a_set_without_a_usable_sample_is_refused(student: Student, tmp_path: Path) -> None:
    url = tiny.tar(tmp_path / "0.tar", 0, num_bad=2)
    with pytest.raises(ConfigError, match="no sample to evaluate on .unknown_image_format 2."):
        EvalSet(url).load(student.preprocess_cfg)
    with pytest.raises(ConfigError, match="its tars are empty"):
        EvalSet(tiny.tar(tmp_path / "1.tar", 0)).load(student.preprocess_cfg)


def test_a_tar_that_is_cut_off_is_an_error(student: Student, tmp_path: Path) -> None:
    url = classification_set(tmp_path)
    whole = Path(url, "test/0.tar").read_bytes()
    Path(url, "test/0.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match="0.tar: cannot be read"):
        EvalSet(url).load(student.preprocess_cfg)


def test_where_no_set_can_lie() -> None:
    with pytest.raises(ConfigError, match="give a folder, or tars"):
        EvalSet("nowhere://bucket/set")
    with pytest.raises(ConfigError, match="names no file"):
        EvalSet("/nowhere/*.tar")
    with pytest.raises(MissingExtra, match="adlfs"):
        EvalSet("az://bucket/set")


@pytest.mark.parametrize(
    ("samples", "templates", "sentence"),
    [
        ([], TEMPLATES, "no sample to write"),
        ([("a", {"jpg": b""}, 3)], TEMPLATES, "a.cls: label 3"),
        ([("a", {"jpg": b""}, 0)], ["a photo"], "no place for the class"),
    ],
)
def test_a_wrong_set_is_not_written(samples: list, templates: list, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        write_classification_set(str(tmp_path), CLASSES, templates, samples)
    assert not (tmp_path / "test/nshards.txt").exists()
