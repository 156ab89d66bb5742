"""Batches hold what tar and store say of their samples, the same for any workers, ranks and restarts."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.data import augment, images, shards
from reinforce.errors import ConfigError, ManifestMismatch, NotCommitted, ReplayError, StoreError
from reinforce.store.store import Store
from tests import tiny
from tests.conftest import Reinforced
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.mixture import source_of

PX = 24


def letters(texts: list[str]) -> torch.Tensor:
    """A tokenizer that can be read back: the first 20 characters."""
    return torch.tensor([[ord(letter) for letter in text[:20].ljust(20)] for text in texts])


def config(made: Reinforced, **changes: object) -> TrainConfig:
    return TrainConfig(shards=made.shards, store=made.store).but(**changes)


def loader(config: TrainConfig, workers: int = 0, batch_size: int = 8, **options: int) -> Loader:
    return Loader(source_of(config), PX, letters, batch_size, options.pop("streams", 4), 0, workers=workers, **options)


def same(left: list[Batch], right: list[Batch]) -> bool:
    def flat(batch: Batch) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        batch.map(lambda tensor: found.append(tensor) or tensor)
        return found

    return len(left) == len(right) and all(
        a.keys == b.keys and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_a_batch_is_what_tar_and_store_say(reinforced: Reinforced, epoch: int) -> None:
    made, store = loader(config(reinforced)), Store(reinforced.store)
    samples, rows = {}, {}
    for shard in shards.expand(reinforced.shards):
        for row, sample in enumerate(shards.read(shard)):
            samples[sample.key], rows[sample.key] = sample, (shard.name, row)
    view, caption = epoch % 3, epoch % 2
    seen: list[str] = []
    for batch in made.batches(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch):
        assert list(batch.tokens) == ["original", "coca"] and list(batch.image_targets) == ["vit", "conv"]
        for i, key in enumerate(batch.keys):
            shard, row = rows[key]
            params = store.read(shard, "view/base/augment", view)[row]
            picture = images.decode(samples[key].image)
            pixels = augment.replay(picture, params, (picture.height, picture.width), PX)
            assert np.array_equal(batch.images[i].numpy(), pixels)
            assert torch.equal(batch.tokens["original"][i], letters([samples[key].captions[0]])[0])
            assert torch.equal(
                batch.tokens["coca"][i], letters([store.read(shard, "text/coca/caption", caption)[row]])[0]
            )
            for teacher in ("vit", "conv"):
                stored = store.read(shard, f"view/base/{teacher}", view)[row].astype(np.float32)
                assert np.array_equal(batch.image_targets[teacher][i].float().numpy(), stored)
                stored = store.read(shard, f"text/coca/{teacher}", caption)[row].astype(np.float32)
                assert np.array_equal(batch.text_targets["coca"][teacher][i].float().numpy(), stored)
        seen += batch.keys
    assert len(set(seen)) == len(seen) == 32 and not any("bad" in key for key in seen)


@pytest.mark.parametrize("store", [True, False])
def test_workers_do_not_change_batches(reinforced: Reinforced, store: bool) -> None:
    asked = config(reinforced) if store else config(reinforced, store=None, distill=0.0)
    none, one, two = (list(loader(asked, workers).batches(2, 11)) for workers in (0, 1, 2))
    assert len(none) == 9 and same(none, one) and same(none, two)


def test_a_restart_and_other_ranks_give_the_same_batches(reinforced: Reinforced) -> None:
    alone = list(loader(config(reinforced)).batches(0, 9))
    assert same(alone[5:], list(loader(config(reinforced)).batches(5, 9)))
    ranks = [list(loader(config(reinforced), rank=rank, world_size=2).batches(0, 9)) for rank in range(2)]
    assert [a.keys + b.keys for a, b in zip(*ranks, strict=True)] == [batch.keys for batch in alone]


def test_pieces_are_the_batch_in_order(reinforced: Reinforced) -> None:
    whole = list(loader(config(reinforced)).batches(0, 3))
    pieces = list(loader(config(reinforced), accum_freq=4).batches(0, 3))
    assert [len(piece.keys) for piece in pieces] == [2] * 12
    assert same([Batch.cat(pieces[i : i + 4]) for i in (0, 4, 8)], whole)


def test_a_map_goes_through_every_tensor(reinforced: Reinforced) -> None:
    [batch] = islice(loader(config(reinforced)).batches(0, 1), 1)
    names: list[str] = []
    there = batch.map(lambda tensor: names.append(f"{tensor.dtype} {tuple(tensor.shape)}") or tensor.to("meta"))
    assert sorted(names) == sorted(
        ["torch.uint8 (8, 24, 24, 3)"]
        + 2 * ["torch.int64 (8, 20)"]
        + 3 * ["torch.bfloat16 (8, 16)", "torch.bfloat16 (8, 24)"]  # of images, and of two text sets
    )
    assert there.keys == batch.keys and there.tokens.keys() == batch.tokens.keys()
    assert there.text_targets["coca"]["conv"].is_meta and not batch.text_targets["coca"]["conv"].is_meta


def read_in_the_first_epoch(asked: TrainConfig) -> list[tuple[str, str, int | None]]:
    """Shard, column and index of every read of a store."""
    source, read = source_of(asked), []
    genuine = source._store.read

    def counted(shard: str, column: str, index: int | None = None, data: str | None = None) -> np.ndarray:
        read.append((shard, column, index))
        return genuine(shard, column, index, data)

    source._store.read = counted
    made = Loader(source, PX, letters, 8, 4, 0)
    list(made.batches(0, made.steps_per_epoch))
    return read


def test_one_slab_of_a_column_is_read_a_shard_and_epoch(reinforced: Reinforced) -> None:
    read = read_in_the_first_epoch(config(reinforced))
    first = [item for item in read if item[1] == "view/base/vit" and item[2] == 0]
    assert sorted(first) == [(f"{i:05d}", "view/base/vit", 0) for i in range(3)]
    assert all(index is not None for _, column, index in read if "/" in column)


def test_what_teachers_know_is_not_read_where_nobody_asks(reinforced: Reinforced) -> None:
    read = read_in_the_first_epoch(config(reinforced, distill=0.0))
    assert {column for _, column, _ in read} == {
        "key",
        "digest",
        "place",
        "size",
        "view/base/augment",
        "text/original/caption",
        "text/coca/caption",
    }


def test_views_and_captions_in_drawn_order(reinforced: Reinforced) -> None:
    drawn = source_of(config(reinforced, view_order="random"))
    views = {epoch: drawn.open("00000", epoch).params.tobytes() for epoch in range(12)}
    assert len(set(views.values())) == 3
    assert views[0] == source_of(config(reinforced, view_order="random")).open("00000", 0).params.tobytes()


def test_only_so_many_views_and_captions(reinforced: Reinforced) -> None:
    def opened(**changes: Any) -> list[tuple[bytes, list[str]]]:
        source = source_of(config(reinforced, **changes))
        return [(o.params.tobytes(), o.captions["coca"]) for o in (source.open("00000", epoch) for epoch in range(6))]

    views, captions = zip(*opened(), strict=True)
    assert opened(num_views=2) == list(zip([views[e % 2] for e in range(6)], captions, strict=True))
    assert opened(num_captions=1) == list(zip(views, [captions[0]] * 6, strict=True))
    assert opened(num_views=3, num_captions=2) == opened()  # of the originals there is one


def test_more_views_or_captions_than_there_are(reinforced: Reinforced) -> None:
    """Of several stores, one with fewer gives what it has, if another has so many."""
    part = {"shards": reinforced.shards, "store": reinforced.store}
    for where in ({}, {"shards": "", "store": None, "data": [part, part]}):
        for setting, told in [
            ("num_views", "num_views=9: the store has 3 views of an image in view set base"),
            ("num_captions", "num_captions=9: the store has 2 captions"),
        ]:
            with pytest.raises(ConfigError, match=told):
                source_of(config(reinforced, **where, **{setting: 9}))
    with pytest.raises(ConfigError, match="the store has 1 captions"):
        source_of(config(reinforced, text_sets=["original"], num_captions=2))
    source_of(config(reinforced, store=None, distill=0.0, num_views=9))  # drawn anew, as many as there are epochs


def test_mixed_captions_keep_their_embeddings(reinforced: Reinforced) -> None:
    each = source_of(config(reinforced)).open("00000", 0)
    mixed = source_of(config(reinforced, captions="mix")).open("00000", 0)
    assert list(mixed.captions) == ["mix"]
    taken = set()
    for row, text in enumerate(mixed.captions["mix"]):
        text_set = next(name for name in each.captions if each.captions[name][row] == text)
        taken.add(text_set)
        assert np.array_equal(mixed.text_targets["mix"]["vit"][row], each.text_targets[text_set]["vit"][row])
    assert taken == {"original", "coca"}


def test_plain_views_are_new_in_every_epoch_and_bad_samples_are_left_out(reinforced: Reinforced) -> None:
    source = source_of(config(reinforced, store=None, distill=0.0))
    assert source.num_skipped == 2 and sum(map(len, source.good_rows.values())) == 32
    assert not np.array_equal(source.open("00001", 0).params, source.open("00001", 1).params, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"store": None}, "no teachers to learn from"),
        ({"shards": ""}, "no shards"),
        ({"teachers": ["vti"]}, "no teacher 'vti' to learn from; it has vit, conv"),
        ({"text_sets": ["blip"]}, "no text set 'blip'"),
        ({"view_set": "more"}, "no view set 'more'"),
        ({"dist_logit_scale": {"x": 1.0}}, "no teacher 'x'"),
    ],
)
def test_wrong_requests_get_a_sentence(reinforced: Reinforced, changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        source_of(config(reinforced, **changes))


def test_no_store_and_shards_that_are_not_in_it(reinforced: Reinforced, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        source_of(config(reinforced, store=str(tmp_path / "s")))
    with pytest.raises(NotCommitted, match="run `clip-reinforce run` over that shard again"):
        source_of(config(reinforced, shards=tiny.tar(tmp_path / "00009.tar", 3)))


def test_a_tar_that_is_not_the_stores(reinforced: Reinforced, tmp_path: Path) -> None:
    other = config(reinforced, shards=tiny.tar(tmp_path / "00000.tar", 13, seed=7))
    with pytest.raises(ManifestMismatch, match="row 0 is '00000-0-000' in the store and '00000-7-000' in the tar"):
        list(islice(loader(other, streams=1).batches(0, 1), 1))
    shorter = config(reinforced, shards=tiny.tar(tmp_path / "00002.tar", 8, seed=2))
    with pytest.raises(ManifestMismatch, match="10 samples in the store, 8 in the tar"):
        list(loader(shorter, streams=1).batches(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_whose_images_have_changed(reinforced: Reinforced, tmp_path: Path, workers: int) -> None:
    """The same keys, other images of the same size, or none at all: an error with its own type, out of a worker too."""
    path = tmp_path / "00002.tar"
    [tar] = [shard for shard in shards.expand(reinforced.shards) if shard.name == "00002"]
    samples = list(shards.read_parts(tar, ("jpg", "txt")))
    for jpg in (samples[0][1]["jpg"], b"<html>"):
        shards.write(str(path), [(key, {"jpg": jpg, "txt": b"x"}) for key, _ in samples])
        with pytest.raises(ReplayError, match=r"00002-2-\d+: this is another image than the one that was reinforced"):
            list(loader(config(reinforced, shards=str(path)), workers, streams=1).batches(0, 1))


def test_a_tar_is_not_gone_through_unless_it_was_packed_anew(
    reinforced: Reinforced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store knows where the images lie in the tar that was reinforced, and in any copy of it."""
    expected = list(loader(config(reinforced)).batches(0, 4))
    for shard in shards.expand(reinforced.shards):
        samples = list(shards.read_parts(shard, ("jpg", "txt")))
        shards.write(str(tmp_path / f"{shard.name}.tar"), [(key, dict(sorted(p.items())[::-1])) for key, p in samples])
    anew = config(reinforced, shards=f"{tmp_path}/*.tar")
    assert same(list(loader(anew).batches(0, 4)), expected)
    monkeypatch.setattr(shards, "locate", None)
    assert same(list(loader(config(reinforced)).batches(0, 4)), expected)
    with pytest.raises(TypeError):
        list(loader(anew).batches(0, 4))


def test_remote_tars_are_copied_once(reinforced: Reinforced, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for tar in reinforced.shards.split("::"):
        memory.put_file(tar, f"/tars/{Path(tar).name}")
    remote = config(reinforced, shards="memory://tars/{00000..00002}.tar", cache_dir=str(tmp_path / "cache"))
    assert same(list(loader(remote).batches(0, 4)), list(loader(config(reinforced)).batches(0, 4)))
    copies = sorted((tmp_path / "cache").iterdir())
    assert len(copies) == 3
    largest = max(Path(tar).stat().st_size for tar in reinforced.shards.split("::"))
    few = remote.but(cache_dir=str(tmp_path / "few"), cache_bytes=largest)  # copies go while others are in use
    two_epochs = list(loader(few, streams=1).batches(0, 8))
    assert same(two_epochs, list(loader(config(reinforced), streams=1).batches(0, 8)))
    shutil.rmtree(memory.store, ignore_errors=True)
    memory.rm("/tars", recursive=True)
    assert same(list(loader(remote).batches(0, 4)), list(loader(config(reinforced)).batches(0, 4)))
