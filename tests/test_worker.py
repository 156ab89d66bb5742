"""The worker without Ray: every promise that does not need more than one process."""

import random
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from reinforce.config import Recipe, RunOptions
from reinforce.data import augment, images, shards, tars
from reinforce.data.shards import expand
from reinforce.data.status import Status
from reinforce.errors import ConfigError, DeviceLost, ManifestMismatch
from reinforce.models.teacher import Teacher
from reinforce.run.worker import Worker
from reinforce.store.columns import columns
from reinforce.store.store import Store
from tests import tiny

CPU = RunOptions(device="cpu")


def reinforce(recipe: Recipe, tar: str, store: Path, options: RunOptions = CPU):
    [shard] = expand(tar)
    return Worker(recipe, str(store), options).reinforce(shard)


def updated(recipe: Recipe, **changes) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)


FULL, LOST = torch.OutOfMemoryError("CUDA out of memory. Tried to.."), RuntimeError("CUDA error: illegal access\nmore")
OTHER = RuntimeError("shapes differ")


def allocation_error() -> RuntimeError:
    """What torch raises where the machine has no room for a tensor."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    ("loading", "raised", "expected", "told"),
    [
        (
            True,
            FULL,
            ConfigError,
            "models cannot be loaded: the GPU's memory is full .CUDA out of memory.; free it",
        ),
        (False, FULL, OSError, "the GPU's memory is full"),  # it may be free at the next try
        (True, LOST, DeviceLost, "the GPU has failed: CUDA error: illegal access; look at"),
        (False, LOST, DeviceLost, "the GPU has failed: CUDA error: illegal access; look at"),
        (True, OTHER, RuntimeError, "^shapes differ$"),  # a fault of ours
        (False, OTHER, RuntimeError, "^shapes differ$"),
        (
            True,
            MemoryError(),
            ConfigError,
            "machine's memory is full.* 0.00 GB .vit 0.00, .* So a worker needs 0.00 GB",
        ),
        (True, allocation_error(), ConfigError, "machine's memory is full; free it, use fewer workers"),
        (False, MemoryError(), OSError, "^this machine's memory is full; free it, use fewer workers"),
        (False, allocation_error(), OSError, "^this machine's memory is full"),
    ],
)
def test_what_a_device_raises_is_told_apart(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loading: bool,
    raised: Exception,
    expected: type[Exception],
    told: str,
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Teacher, "__init__" if loading else "units_of_images", fail)
    with pytest.raises(expected, match=told):
        reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 3), tmp_path / "s")
    assert not (tmp_path / "s").exists()


# 11 samples in batches of 4: more than one batch, and a smaller last one. 9: a last batch of one.
@pytest.mark.parametrize("num", [11, 9, 4, 1])
def test_every_row_holds_its_own_sample(recipe: Recipe, tmp_path: Path, num: int) -> None:
    """Each view's embedding is that of the view replayed from that very sample, not a neighbour's."""
    tar = tiny.tar(tmp_path / "00000.tar", num)
    report = reinforce(recipe, tar, tmp_path / "s")
    assert (report.read, report.valid, report.error) == (num, num, "")
    store = Store(str(tmp_path / "s"))
    assert store.missing("00000", columns(recipe)) == []
    samples = list(shards.read(*expand(tar)))
    teachers = {n: Teacher(c, recipe.batch_size, torch.device("cpu")) for n, c in recipe.teachers.items()}
    assert store.read("00000", "key").tolist() == [sample.key for sample in samples]
    for name, teacher in teachers.items():
        views, texts = store.read("00000", f"view/base/{name}"), store.read("00000", f"text/original/{name}")
        assert views.shape == (3, num, teacher.width) and views.dtype == ml_dtypes.bfloat16
        for row, sample in enumerate(samples):
            picture = images.decode(sample.image)
            size = (picture.height, picture.width)
            assert tuple(store.read("00000", "size")[row]) == size
            for index in range(3):
                params = store.read("00000", "view/base/augment", index)[row]
                again = teacher.encode_images(augment.replay(picture, params, size, teacher.image_px)[None])[0]
                assert cosine(again, views[index, row]) > 0.999
                view = augment.replay(picture, params, size, recipe.view_sets["base"].view_px)
                assert augment.pixel_hash(view) == store.read("00000", "view/base/pixels", index)[row]
            assert cosine(teacher.encode_texts([sample.captions[0]])[0], texts[0, row]) > 0.999
        for index in range(2):
            caption = store.read("00000", "text/coca/caption", index)
            again = np.concatenate([teacher.encode_texts([text]) for text in caption])
            stored = store.read("00000", f"text/coca/{name}", index)
            assert min(cosine(a, b) for a, b in zip(again, stored, strict=True)) > 0.999


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_captions_are_drawn_apart(recipe: Recipe, tmp_path: Path) -> None:
    reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 6), tmp_path / "s")
    captions = Store(str(tmp_path / "s")).read("00000", "text/coca/caption")
    assert (captions != "").all()
    assert len(set(captions.flatten())) > 6  # neither one caption for all, nor the same one twice


def test_same_input_same_bytes_and_resume_of_any_columns(recipe: Recipe, tmp_path: Path) -> None:
    """Take away any set of columns: the next run writes those, and the store is what it was."""
    tar = tiny.tar(tmp_path / "00000.tar", 6, 1)
    options = RunOptions(device="cpu", max_invalid=0.5)
    reinforce(recipe, tar, tmp_path / "s", options)
    whole = tiny.tree(tmp_path / "s")
    rng = random.Random(0)
    choices = [[name] for name in columns(recipe)] + [rng.sample(columns(recipe), 4) for _ in range(4)]
    worker = Worker(recipe, str(tmp_path / "s"), options)
    for lost in choices:
        for column in lost:
            (tmp_path / "s/00000" / str(column) / "zarr.json").unlink()
        report = worker.reinforce(*expand(tar))
        assert report.columns_written == len(lost)
        assert {k: v for k, v in tiny.tree(tmp_path / "s").items() if not k.startswith(".partial")} == whole


def test_counts_balance_and_bad_rows_are_empty(recipe: Recipe, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 5, 2)
    report = reinforce(recipe, tar, tmp_path / "s", RunOptions(device="cpu", max_invalid=0.5))
    assert (report.read, report.valid) == (7, 5)
    assert sum(report.quarantined.values()) == 2
    store = Store(str(tmp_path / "s"))
    good = store.read("00000", "status") == Status.GOOD
    assert good.tolist() == [True] * 5 + [False] * 2
    for teacher in recipe.teachers:
        for column in (f"view/base/{teacher}", f"text/coca/{teacher}"):
            array = store.read("00000", column).astype(np.float32)
            assert np.isnan(array[:, ~good]).all() and np.isfinite(array[:, good]).all()
    assert (store.read("00000", "text/coca/caption")[:, ~good] == "").all()


def test_too_many_bad_samples_refuse_the_shard(recipe: Recipe, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 4, 2)
    report = reinforce(recipe, tar, tmp_path / "s", RunOptions(device="cpu", max_invalid=0.3))
    assert "2 of 6 samples are invalid" in report.error and "--max-invalid" in report.error
    assert Store(str(tmp_path / "s")).shards() == []


def test_a_shard_with_no_valid_sample(recipe: Recipe, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 0, 3)
    assert "3 of 3" in reinforce(recipe, tar, tmp_path / "s").error
    report = reinforce(recipe, tar, tmp_path / "s", RunOptions(device="cpu", max_invalid=1))
    assert (report.read, report.valid, report.error) == (3, 0, "")
    assert np.isnan(Store(str(tmp_path / "s")).read("00000", "view/base/vit").astype(np.float32)).all()


def test_a_tar_without_a_sample_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    options = RunOptions(device="cpu", max_invalid=1)
    report = reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 0), tmp_path / "s", options)
    assert (report.read, report.final) == (0, True)
    assert "00000.tar holds no sample" in report.error and "it is empty" in report.error
    tars.write(str(tmp_path / "1.tar"), [("a", b"1"), ("b", b"2"), ("__index__", b""), ("d/.DS_Store", b"")])
    report = reinforce(recipe, str(tmp_path / "1.tar"), tmp_path / "s", options)
    assert report.noted == {"hidden": 2, "no_extension": 2}
    assert "2 no_extension, as a: has no extension" in report.error and "name it KEY.EXTENSION" in report.error
    assert Store(str(tmp_path / "s")).shards() == []


def test_a_broken_tar_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    path = Path(tiny.tar(tmp_path / "00000.tar", 8))
    path.write_bytes(path.read_bytes()[:5000])
    report = reinforce(recipe, str(path), tmp_path / "s")
    assert str(path) in report.error
    assert Store(str(tmp_path / "s")).shards() == []


def test_a_tar_that_changed_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 5), tmp_path / "s")
    (tmp_path / "s/00000/view/base/vit/zarr.json").unlink()
    before = tiny.tree(tmp_path / "s")
    report = reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 5, seed=1), tmp_path / "s")
    assert "is not the tar that group 00000 was made from" in report.error
    assert tiny.tree(tmp_path / "s") == before


def test_original_captions_repeat_where_there_are_fewer(recipe: Recipe, tmp_path: Path) -> None:
    samples = [
        ("a", {"jpg": tiny.picture(1), "json": b'{"caption": ["one", "two", "three"]}'}),
        ("b", {"jpg": tiny.picture(2), "txt": b"alone"}),
    ]
    shards.write(str(tmp_path / "00000.tar"), samples)
    reinforce(updated(recipe, num_original_captions=2), str(tmp_path / "00000.tar"), tmp_path / "s")
    captions = Store(str(tmp_path / "s")).read("00000", "text/original/caption")
    assert captions.tolist() == [["one", "alone"], ["two", "alone"]]


def test_an_empty_synthetic_caption_becomes_the_original(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reinforce.models import coca

    monkeypatch.setattr(coca, "caption_text", lambda *_: "")
    report = reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 3), tmp_path / "s")
    assert report.empty_captions == 6
    store = Store(str(tmp_path / "s"))
    assert (store.read("00000", "text/coca/caption") == store.read("00000", "text/original/caption")[0]).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "recipe.seed: the store has 0, this run asks for 1"),
        ({"num_original_captions": 2}, "recipe.num_original_captions"),
        ({"batch_size": 8}, "recipe.batch_size: the store has 4, this run asks for 8"),
        ({"weights": "random"}, "recipe.weights"),
    ],
)
def test_another_recipe_is_refused(recipe: Recipe, tmp_path: Path, changes: dict, told: str) -> None:
    reinforce(recipe, tiny.tar(tmp_path / "00000.tar", 2), tmp_path / "s")
    before = tiny.tree(tmp_path / "s")
    with pytest.raises(ManifestMismatch, match=told):
        Worker(updated(recipe, **changes), str(tmp_path / "s"), CPU)
    assert tiny.tree(tmp_path / "s") == before


def test_other_weights_in_the_same_file_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    own = tiny.models(tmp_path / "models")
    reinforce(own, tiny.tar(tmp_path / "00000.tar", 2), tmp_path / "s")
    weights = tmp_path / "models/vit/open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ManifestMismatch, match=r"models.teachers.vit.weights_sha256"):
        Worker(own, str(tmp_path / "s"), CPU)


def test_the_label_of_a_recipe_is_not_a_promise(recipe: Recipe, tmp_path: Path) -> None:
    Worker(recipe, str(tmp_path / "s"), CPU)
    Worker(updated(recipe, name="renamed"), str(tmp_path / "s"), CPU)


def test_two_shards_at_once_are_the_same_as_one_after_the_other(recipe: Recipe, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tars = [tiny.tar(tmp_path / f"{i:05d}.tar", 5 + i, seed=i) for i in range(4)]
    listed = expand("::".join(tars))
    one, two = Worker(recipe, str(tmp_path / "one"), CPU), Worker(recipe, str(tmp_path / "two"), CPU)
    for shard in listed:
        one.reinforce(shard)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(two.reinforce, [*listed, listed[0]]))  # one of them twice
    assert not [report.error for report in reports if report.error]
    for name in ("one", "two"):
        Store(str(tmp_path / name)).objects.sweep()
    assert tiny.tree(tmp_path / "one") == tiny.tree(tmp_path / "two")


def test_reports_are_small() -> None:
    from reinforce.run.reports import ShardReport

    assert replace(ShardReport("x"), read=3, quarantined={"broken_image": 1}).valid == 2
