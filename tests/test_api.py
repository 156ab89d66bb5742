"""The Python API: docs/python.md as it stands, and what its calls promise one by one."""

import os
import pickle
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import reinforce
import train
from reinforce.config import Recipe
from reinforce.data import shards
from reinforce.store.store import Store
from tests import tiny
from tests.conftest import Reinforced
from tests.processes import ROOT
from tests.test_loader import letters
from train.config import TrainConfig
from train.data.dataset import ReinforcedBatch
from train.data.loader import Loader
from train.data.mixture import source_of

MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]


def program(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["reinforce", "train"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    heavy = {"torch", "ray", "zarr", "open_clip", "torchvision", "timm"}
    done = program(f"import sys, {package}; dir({package}); print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_every_name_of_the_api_is_there() -> None:
    for package in (reinforce, train):
        for name in package.__all__:
            assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'train' has no attribute 'fti'"):
        train.fti  # noqa: B018


def test_a_student_is_loaded_as_the_page_says() -> None:
    done = program("import train; print(train.trained.load('vit_tiny').name)")
    assert done.stdout.strip() == "vit_tiny", done.stderr


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    """On the first 16 pictures of each bundled shard, with the bundled models."""
    (tmp_path / "samples/train").mkdir(parents=True)
    (tmp_path / "samples/models").symlink_to(ROOT / "samples/models")
    for shard in shards.expand(str(ROOT / "samples/train/*.tar")):
        few = islice(shards.read_parts(shard, ("jpg", "txt", "json")), 16)
        shards.write(str(tmp_path / f"samples/train/{shard.name}.tar"), few)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    done = program("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 shards written, 64 good samples, failed: []" in done.stdout
    assert "(64, 64, 3)\n(256, 256, 3)\n" in done.stdout
    assert "4 steps; the student is in runs/python/student" in done.stdout
    lines = re.findall(r"Train Epoch: (\d+) .*?Contrastive_loss: ([\d.]+) .*?Distill_loss: ([\d.]+)", done.stderr)
    losses = [np.mean([[float(c), float(d)] for e, c, d in lines if e == str(epoch)], 0) for epoch in range(12)]
    chance = np.log(16)  # of a batch: what a model loses that knows nothing
    assert (losses[0] > chance).all() and (np.mean(losses[-3:], 0) < chance - 0.05).all(), losses


# -- write and open_store ----------------------------------------------------------------------------------------------


def test_write_is_the_run_of_the_command(recipe: reinforce.Recipe, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 5, 1)
    report = reinforce.write(tar, tmp_path / "s", recipe, workers=0, device="cpu", max_invalid=0.5)
    assert (report.done, report.valid, report.failed) == (1, 5, [])
    (tmp_path / "mine.json").write_text(recipe.model_dump_json())
    again = reinforce.write(tar, tmp_path / "s", tmp_path / "mine.json", workers=0)
    assert (again.done, again.already_there) == (0, 1)
    with pytest.raises(reinforce.ManifestMismatch, match="recipe.seed"):
        reinforce.write(tar, tmp_path / "s", recipe.but(seed=1), workers=0)
    with pytest.raises(reinforce.ConfigError, match="attempts"):
        reinforce.write(tar, tmp_path / "s", recipe, attempts=0)
    with pytest.raises(reinforce.ConfigError, match="did you mean sample"):
        reinforce.write(tar, tmp_path / "s", "sampel")


def test_an_opened_store_says_what_the_store_holds(reinforced: Reinforced) -> None:
    opened, raw = reinforce.open_store(reinforced.store), Store(reinforced.store)
    assert list(opened) == opened.shards == ["00000", "00001", "00002"] and len(opened) == 3 and "00001" in opened
    assert list(opened.recipe.teachers) == ["vit", "conv"]
    shard = opened["00001"]
    assert len(shard) == 11 and shard.quarantine() == {9: "unknown_image_format", 10: "unknown_image_format"}
    assert shard.keys[0] == "00001-1-000" and shard.size.shape == (11, 2)
    assert not raw.missing("00001", shard.columns) and "view/base/conv" in shard.columns
    for row, index in [(0, 0), (3, 2), (4, 2), (3, 1)]:
        view = shard.view("base", row, index)
        assert np.array_equal(view.params, raw.read("00001", "view/base/augment", index)[row])
        for teacher in ("vit", "conv"):
            stored = raw.read("00001", f"view/base/{teacher}", index)[row]
            assert np.array_equal(view.embeddings[teacher].astype(stored.dtype), stored)
            assert torch.from_numpy(view.embeddings[teacher]).norm().item() == pytest.approx(1, abs=0.01)
        assert shard.captions("coca", row) == [raw.read("00001", "text/coca/caption", i)[row] for i in range(2)]
    assert shard.captions("original", 3) == ["picture 3 of 00001-1"]
    assert shard.array("text/coca/vit", 1).shape == (11, 16) and shard.array("text/coca/vit").shape == (2, 11, 16)


def test_pixels_are_those_that_were_hashed_and_of_no_other_tar(reinforced: Reinforced, tmp_path: Path) -> None:
    tars = reinforced.shards.split("::")
    view = reinforce.open_store(reinforced.store)["00002"].view("base", 4, 2)
    assert view.pixels(tars[2]).shape == (40, 40, 3) and view.pixels(tars[2], px=64).shape == (64, 64, 3)
    with pytest.raises(reinforce.ManifestMismatch, match="'00002-2-004' in the store and '00000-0-004' in the tar"):
        view.pixels(tars[0])
    shorter = tiny.tar(tmp_path / "00002.tar", 3, seed=2)
    with pytest.raises(reinforce.ManifestMismatch, match="'nothing' in the tar"):
        view.pixels(shorter)
    samples = list(shards.read_parts(shards.Shard("00002", tars[2]), ("jpg", "txt")))
    picture = bytearray(samples[4][1]["jpg"])
    quantisation = picture.index(b"\xff\xdb") + 5
    picture[quantisation] += 9  # the same size, other pixels
    samples[4][1]["jpg"] = bytes(picture)
    shards.write(shorter, samples)
    for px in (None, 64):
        with pytest.raises(reinforce.ReplayError, match="00002-2-004: its view has other pixels"):
            view.pixels(shorter, px)
    with pytest.raises(reinforce.ShardError, match="no.tar"):
        view.pixels(str(tmp_path / "no.tar"))


def test_wrong_names_get_a_sentence_with_what_there_is(reinforced: Reinforced, tmp_path: Path) -> None:
    store = reinforce.open_store(reinforced.store)
    shard = store["00001"]
    for ask, told in [
        (lambda: store["7"], "no shard '7'; it has 00000, 00001, 00002"),
        (lambda: shard.view("bass", 0, 0), "no view set 'bass'; it has base"),
        (lambda: shard.view("base", 11, 0), "no row 11; it has 11, from 0"),
        (lambda: shard.view("base", -1, 0), "no row -1"),
        (lambda: shard.view("base", 0, 3), r"no index 3 in an array of shape \(3, 11, 8\)"),
        (lambda: shard.view("base", 9, 0), r"row 9 \(00001-1-bad0\) is in quarantine: unknown_image_format"),
        (lambda: shard.captions("blip", 0), "no text set 'blip'; it has original, coca"),
        (lambda: shard.captions("coca", 10), "is in quarantine"),
        (lambda: shard.array("view/base/vti"), "no column 'view/base/vti'; it has key, digest"),
        (lambda: shard.array("key", 0), "no index 0"),
    ]:
        with pytest.raises((reinforce.ConfigError, reinforce.NotCommitted), match=told):
            ask()
    with pytest.raises(reinforce.StoreError, match="no store at"):
        reinforce.open_store(tmp_path / "none")


# -- fit ---------------------------------------------------------------------------------------------------------------


def test_fit_checks_settings_as_the_command_does(reinforced: Reinforced, tmp_path: Path) -> None:
    asked = {
        "shards": reinforced.shards,
        "store": reinforced.store,
        "student": reinforced.student,
        "out": tmp_path / "o",
    }
    with pytest.raises(reinforce.ConfigError, match="unknown key; did you mean steps"):
        train.fit(**asked, stepz=3)
    with pytest.raises(reinforce.ConfigError, match="multiple of streams"):
        train.fit(**asked, global_batch_size=9)
    assert not (tmp_path / "o").exists()
    settings = {"global_batch_size": 8, "steps": 2, "precision": "fp32", "workers": 0, "report_to": []}
    report = train.fit(**asked, **settings, device="cpu")
    assert report["steps"] == 2 and (tmp_path / "o/student/open_clip_model.safetensors").is_file()
    assert train.fit(**asked, **settings, device="cpu") == report


# -- the dataset -------------------------------------------------------------------------------------------------------


def dataset(made: Reinforced, **changes: object) -> train.ReinforcedDataset:
    asked = {"batch_size": 8, "image_px": 24, "mean": MEAN, "std": STD, "tokenizer": letters, "streams": 4}
    return train.ReinforcedDataset(changes.pop("shards", made.shards), made.store, **asked | changes)


def epoch_of(made: train.ReinforcedDataset, epoch: int, workers: int = 0) -> list[ReinforcedBatch]:
    made.set_epoch(epoch)
    return list(DataLoader(made, batch_size=None, num_workers=workers))


def same(left: list[ReinforcedBatch], right: list[ReinforcedBatch]) -> bool:
    def flat(batch: ReinforcedBatch) -> list[torch.Tensor]:
        return [batch.images, batch.texts, *batch.image_features.values(), *batch.text_features.values()]

    return len(left) == len(right) and all(
        a.keys == b.keys and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_are_those_of_our_own_loader(reinforced: Reinforced, epoch: int) -> None:
    made = dataset(reinforced)
    config = TrainConfig(shards=reinforced.shards, store=reinforced.store, captions="mix")
    loader = Loader(source_of(config), 24, letters, 8, 4, 0)
    ours = list(loader.batches(epoch * 4, epoch * 4 + 4))
    batches = epoch_of(made, epoch)
    assert len(made) == len(batches) == len(ours) == 4
    for batch, other in zip(batches, ours, strict=True):
        assert batch.keys == other.keys and torch.equal(batch.texts, other.tokens["mix"])
        pixels = (other.images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        assert batch.images.shape == (8, 3, 24, 24) and torch.allclose(batch.images, pixels.permute(0, 3, 1, 2))
        for teacher in ("vit", "conv"):
            assert torch.equal(batch.image_features[teacher], other.image_targets[teacher].float())
            assert torch.equal(batch.text_features[teacher], other.text_targets["mix"][teacher].float())


def test_workers_that_live_on_see_the_epoch_and_do_not_change_batches(reinforced: Reinforced) -> None:
    alone, shared = dataset(reinforced), dataset(reinforced)
    loader = DataLoader(shared, batch_size=None, num_workers=3, persistent_workers=True)
    for epoch in (0, 1):
        shared.set_epoch(epoch)
        assert same(list(loader), epoch_of(alone, epoch))
    assert not same(epoch_of(alone, 0), epoch_of(alone, 1))
    copy = pickle.loads(pickle.dumps(alone))  # as workers that are spawned get it
    assert same(epoch_of(copy, 1), epoch_of(alone, 1))


def test_ranks_share_an_epoch(reinforced: Reinforced) -> None:
    whole = epoch_of(dataset(reinforced), 2)
    ranks = [epoch_of(dataset(reinforced, batch_size=4, rank=rank, world_size=2), 2, workers=1) for rank in range(2)]
    assert [a.keys + b.keys for a, b in zip(*ranks, strict=True)] == [batch.keys for batch in whole]
    assert len({key for batch in whole for key in batch.keys}) == 32
    assert dataset(reinforced, batch_size=1, rank=1, world_size=2, streams=2).batch_size == 1


def test_teachers_and_text_sets_can_be_chosen(reinforced: Reinforced) -> None:
    batch = epoch_of(dataset(reinforced, teachers=["conv"], text_sets=["original"]), 0)[0]
    assert list(batch.image_features) == list(batch.text_features) == ["conv"]
    said = dict(enumerate(f"picture {int(key[-3:])} of {key[:7]}" for key in batch.keys))
    assert torch.equal(batch.texts, letters(list(said.values())))
    for wrong, told in [({"teachers": ["vti"]}, "no teacher 'vti'"), ({"batch_size": 9}, "multiple of streams")]:
        with pytest.raises(reinforce.ConfigError, match=told):
            dataset(reinforced, **wrong)
    assert dataset(reinforced, image_px=(24, 24)).image_px == 24
    for setting, value, told in [
        ("image_px", (24, 32), "views are square"),
        ("image_px", 0, "at least one pixel"),
        ("std", (0, 0.5, 0.5), "no std of 0"),
        ("mean", (0.5,), "three numbers each"),
        ("batch_size", 0, "batch_size 0: give 2 or more"),
        ("batch_size", 5000, "fewer than one batch of 5000"),
    ]:
        with pytest.raises(reinforce.ConfigError, match=told) as refused:
            dataset(reinforced, **{setting: value})
        assert "--set" not in str(refused.value)
    with pytest.raises(reinforce.ConfigError, match="streams 4 has to be a multiple of the 3 ranks"):
        dataset(reinforced, rank=0, world_size=3)
    with pytest.raises(reinforce.ConfigError, match="no teacher 'vti'; it has vit, conv"):
        train.OpenClipData(dataset(reinforced), "vti")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_of_somebody_else_is_an_error_out_of_a_worker_too(
    reinforced: Reinforced, tmp_path: Path, workers: int
) -> None:
    other = dataset(reinforced, shards=tiny.tar(tmp_path / "00000.tar", 13, seed=7))
    with pytest.raises(reinforce.ManifestMismatch, match="'00000-0-000' in the store and '00000-7-000' in the tar"):
        epoch_of(other, 0, workers)


def test_what_open_clips_loop_is_told_belongs_to_the_batch(reinforced: Reinforced) -> None:
    made = dataset(reinforced)
    data = train.OpenClipData(made, "vit", workers=1)
    data.set_epoch(1)
    assert (data.num_batches, data.num_samples) == (4, 32)
    for (images, texts), batch in zip(data, epoch_of(dataset(reinforced), 1), strict=True):
        told = data.dist_model(images, texts)
        assert torch.equal(images, batch.images) and torch.equal(texts, batch.texts)
        assert torch.equal(told["image_features"], batch.image_features["vit"])
        assert torch.equal(told["text_features"], batch.text_features["vit"])
        assert told["logit_scale"].item() == pytest.approx(made.logit_scales["vit"])


def test_write_leaves_the_threads_of_torch_as_they_are(recipe: Recipe, tmp_path: Path) -> None:
    tar, before = tiny.tar(tmp_path / "00000.tar", 2), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reinforce.write(tar, tmp_path / "s", recipe, workers=0, device="cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_shard_keeps_the_views_that_it_was_asked_for(reinforced: Reinforced) -> None:
    store = reinforce.open_store(reinforced.store)
    assert store["00000"] is store["00000"]
