"""DataCompDR's tars in and out. No published one can be had here: the smallest faithful ones are written as its papers
and readers describe them."""

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T
from typer.testing import CliRunner

from reinforce.__main__ import app
from reinforce.data import augment, images, shards
from reinforce.errors import ConfigError
from reinforce.exchange import datacompdr
from reinforce.exchange.datacompdr import NoRecord
from reinforce.exchange.imported import import_datacompdr
from reinforce.recipes import load_recipe
from reinforce.store.store import Store
from tests.conftest import Reinforced
from train.config import TrainConfig
from train.trainer import fit

# The magnitudes that published samples have, one view for each operation.
MAGNITUDES = {
    0: 0.0, 1: -0.09000000357627869, 2: 0.09000000357627869, 3: 30.45317268371582, 4: -30.45317268371582, 5: -9.0,
    6: 0.26999998092651367, 7: -0.26999998092651367, 8: 0.26999998092651367, 9: -0.26999998092651367, 10: 7.0,
    11: 178.5, 12: 0.0, 13: 0.0,
}  # fmt: skip
VIEWS = [[[2 * i, 2 * i, 200 + i, 160 + i], [[i, MAGNITUDES[i]], [13 - i, MAGNITUDES[13 - i]]]] for i in range(14)]
VIEWS[0] = [[0, 0, 240, 300], [None, [3, 30.45317268371582]]]
CAPTIONS = ["a cat", "a cat on a mat", "", "zwei Katzen", "🐈"]


def picture(seed: int, height: int = 240, width: int = 300) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def units(seed: int, num: int) -> np.ndarray:
    """(num, 8) float32, two teachers of 4, rounded as the bf16 release has them."""
    x = np.random.default_rng(seed).normal(size=(num, 2, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return torch.from_numpy(x.reshape(num, 8)).bfloat16().float().numpy()


def files(seed: int, layout: str = "first", kind: str = "npz", as_string: bool = False) -> dict[str, bytes]:
    arrays = {"image_emb": units(seed, len(VIEWS))}
    if layout == "first":
        arrays["text_emb"] = units(seed + 1, 6)
    else:
        arrays |= {"text_emb": units(seed + 1, 1), "syn_text_emb": units(seed + 2, 5)}
    syn: dict[str, list[str]] = {"syn_text": CAPTIONS}
    if layout == "several":
        arrays["syn_text_blip_emb"], syn["syn_text_blip"] = units(seed + 3, 2), ["a red hat", "hat"]
    file = io.BytesIO()
    if kind == "npz":
        np.savez(file, **arrays)  # type: ignore[arg-type]
        embeddings = {"npz": file.getvalue()}
    else:
        torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, file)
        embeddings = {"pth.gz": gzip.compress(file.getvalue())}
    views = json.dumps(VIEWS) if as_string else VIEWS
    return {
        "paug.json": json.dumps({"param_aug": views}).encode(), "syn.json": json.dumps(syn).encode(), **embeddings
    }  # fmt: skip


def tar(path: Path, records: int = 3, images: bool = True, **how: Any) -> str:
    samples = []
    for i in range(records):
        own = {"jpg": picture(i), "txt": b"a real caption"} if images else {}
        samples.append((f"{i:032x}", own | files(10 * i, **how)))
    shards.write(str(path), samples)
    return str(path)


@pytest.mark.parametrize("how", [{}, {"as_string": True}, {"layout": "later"}, {"layout": "several"}, {"kind": "pth"}])
def test_both_layouts_are_read_and_come_back_bit_for_bit(how: dict[str, Any]) -> None:
    given = files(1, **how)
    record = datacompdr.parse(given)
    assert record.params.shape == (14, 8) and record.captions["coca"] == CAPTIONS
    assert {name: array.shape for name, array in record.texts.items()} == {
        "original": (1, 8), "coca": (5, 8), **({"blip": (2, 8)} if how.get("layout") == "several" else {})
    }  # fmt: skip
    np.testing.assert_array_equal(record.image.astype(np.float32), units(1, 14))
    for embeddings in ("fp32", "bf16"):
        written = datacompdr.render(record, embeddings)  # type: ignore[arg-type]
        views = json.loads(written["paug.json"])["param_aug"]
        assert views[1:] == VIEWS[1:] and views[0][1] == [[0, 0.0], [3, 30.45317268371582]]
        again = datacompdr.parse(written)
        assert again.params.tobytes() == record.params.tobytes() and again.captions == record.captions
        assert again.image.tobytes() == record.image.tobytes()
        assert {k: v.tobytes() for k, v in again.texts.items()} == {k: v.tobytes() for k, v in record.texts.items()}
    if how in ({}, {"layout": "later"}):
        theirs = np.load(io.BytesIO(datacompdr.render(record)["npz"]))
        ours = np.load(io.BytesIO(files(1)["npz"]))
        assert how or all(np.array_equal(theirs[name], ours[name]) for name in ours.files)


def test_views_are_those_that_torchvision_makes_of_the_stored_magnitudes() -> None:
    whole = Image.open(io.BytesIO(picture(5)))
    params = datacompdr.parse(files(1)).params
    for (box, operations), row in zip(VIEWS, params, strict=True):
        view = T.resized_crop(whole, *box, [224, 224], InterpolationMode.BICUBIC)
        for operation in operations:
            if operation:
                view = applied(view, *operation)
        np.testing.assert_array_equal(np.array(view), augment.replay(whole, row, (240, 300), 224))


def applied(view: Any, op_id: int, magnitude: float) -> Any:
    """As torchvision's RandAugment applies it."""
    nearest: Any = {"interpolation": InterpolationMode.NEAREST}
    shear = float(np.degrees(np.arctan(magnitude)))
    return {
        0: lambda: view,
        1: lambda: T.affine(view, 0.0, [0, 0], 1.0, [shear, 0.0], center=[0, 0], **nearest),
        2: lambda: T.affine(view, 0.0, [0, 0], 1.0, [0.0, shear], center=[0, 0], **nearest),
        3: lambda: T.affine(view, 0.0, [int(magnitude), 0], 1.0, [0.0, 0.0], **nearest),
        4: lambda: T.affine(view, 0.0, [0, int(magnitude)], 1.0, [0.0, 0.0], **nearest),
        5: lambda: T.rotate(view, magnitude, **nearest),
        6: lambda: T.adjust_brightness(view, 1 + magnitude),
        7: lambda: T.adjust_saturation(view, 1 + magnitude),
        8: lambda: T.adjust_contrast(view, 1 + magnitude),
        9: lambda: T.adjust_sharpness(view, 1 + magnitude),
        10: lambda: T.posterize(view, int(magnitude)),
        11: lambda: T.solarize(view, magnitude),
        12: lambda: T.autocontrast(view),
        13: lambda: T.equalize(view),
    }[op_id]()


def spoilt(extension: str, data: bytes | None) -> dict[str, bytes]:
    parts = files(1) | ({extension: data} if data is not None else {})
    return parts if data is not None else {name: part for name, part in parts.items() if name != extension}


@pytest.mark.parametrize(
    ("extension", "data", "told"),
    [
        ("paug.json", None, "has no paug.json, only npz, syn.json"),
        ("paug.json", b"{", "paug.json is no JSON"),
        ("paug.json", b"[]", "holds no object"),
        ("paug.json", b'{"param_aug": []}', "no views"),
        ("paug.json", b'{"param_aug": [[[1, 2, 3], []]]}', "is no view"),
        ("paug.json", b'{"param_aug": [[[1, 2, 3, 4], [[14, 0], [0, 0]]]]}', "no operation 14"),
        ("paug.json", b'{"param_aug": [[[1, 2, 3, 4], [[0, 0], [0, 0]]]]}', "1 views in paug.json and 14 in image_emb"),
        ("syn.json", b'{"other": ["a"]}', "no lists of captions called syn_text"),
        ("syn.json", b'{"syn_text": "a cat"}', "no lists of captions"),
        ("npz", None, "neither npz nor pth.gz"),
        ("npz", b"PK\x03\x04", "cannot be read"),
        ("npz", b"", "cannot be read"),
    ],
)
def test_what_is_no_record_is_said(extension: str, data: bytes | None, told: str) -> None:
    with pytest.raises(NoRecord, match=told):
        datacompdr.parse(spoilt(extension, data))


def test_a_pickle_that_is_more_than_tensors_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    file = io.BytesIO()
    torch.save({"image_emb": Evil()}, file)
    parts = spoilt("npz", None) | {"pth.gz": gzip.compress(file.getvalue())}
    with pytest.raises(NoRecord, match="cannot be read"):
        datacompdr.parse(parts)
    assert not (tmp_path / "owned").exists()


def imported(records: str, images: str, store: Path, **more: Any) -> Any:
    widths = {"openai": 4, "datacomp_xl": 4}
    return import_datacompdr(records, images, str(store), load_recipe("datacompdr_12m"), widths, **more)


def test_a_tar_becomes_a_store(tmp_path: Path) -> None:
    tar(tmp_path / "00000000.tar")
    report = imported(str(tmp_path / "*.tar"), str(tmp_path / "*.tar"), tmp_path / "store")
    assert (report.done, report.samples, report.valid, report.failed) == (1, 3, 3, [])
    store = Store(str(tmp_path / "store"))
    assert not store.missing("00000000", store.promised().columns())
    assert store.promised().models["teachers"]["openai"]["width"] == 4
    np.testing.assert_array_equal(store.read("00000000", "view/base/datacomp_xl")[:, 1], units(10, 14)[:, 4:])
    np.testing.assert_array_equal(store.read("00000000", "text/coca/openai")[:, 2], units(21, 6)[1:, :4])
    assert store.read("00000000", "text/original/caption").tolist() == [["a real caption"] * 3]
    view = augment.replay(images.decode(picture(1)), store.read("00000000", "view/base/augment")[4, 1], (240, 300), 224)
    assert augment.pixel_hash(view) == int(store.read("00000000", "view/base/pixels")[4, 1])
    again = imported(str(tmp_path / "*.tar"), str(tmp_path / "*.tar"), tmp_path / "store")
    assert (again.already_there, again.done) == (1, 0)


def test_images_in_tars_of_their_own_by_key_or_uid(tmp_path: Path) -> None:
    for folder in ("records", "images"):
        (tmp_path / folder).mkdir()
    tar(tmp_path / "records/0.tar", records=4, images=False)
    one, two = (json.dumps({"uid": f"{i:032x}"}).encode() for i in (1, 2))
    own = [
        ("000", {"jpg": picture(1), "txt": b"one", "json": one}),
        (f"{0:032x}", {"jpg": picture(0), "txt": b"zero"}),
        ("002", {"jpg": picture(2, 120, 150), "txt": b"a small copy", "json": two}),
        ("003", {"jpg": picture(3), "txt": b"unknown"}),
    ]  # fmt: skip
    shards.write(str(tmp_path / "images/0.tar"), own)
    where = str(tmp_path / "records/0.tar"), str(tmp_path / "images/0.tar"), tmp_path / "store"
    refused = imported(*where)
    assert "1 are no_record, as 003: no record of this key or uid; 1 are other_size" in refused.failed[0].reason
    assert refused.failed[0].quarantined == {"no_record": 1, "other_size": 1}
    report = imported(*where, max_invalid=0.5)
    assert (report.valid, report.quarantined) == (2, {"no_record": 1, "other_size": 1})
    store = Store(str(tmp_path / "store"))
    assert store.read("0", "key").tolist() == ["000", f"{0:032x}", "002", "003"]
    np.testing.assert_array_equal(store.read("0", "view/base/openai")[:, 0], units(10, 14)[:, :4])
    assert np.isnan(store.read("0", "view/base/openai")[:, 2:].astype(float)).all()


def test_images_that_were_enlarged_are_refused(tmp_path: Path) -> None:
    """Their crops fit, and show something else."""
    records = [(f"{i:032x}", {"jpg": picture(i, 480, 600), "txt": b"x"} | files(i)) for i in range(20)]
    shards.write(str(tmp_path / "0.tar"), records)
    report = imported(str(tmp_path / "0.tar"), str(tmp_path / "0.tar"), tmp_path / "store")
    assert "reach over 50% of the images" in report.failed[0].reason


def test_a_wrong_request_is_told(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar")
    shards.write(str(tmp_path / "b.tar"), [("x", {"jpg": picture(0), "txt": b"x"})])
    a, b, recipe = str(tmp_path / "a.tar"), str(tmp_path / "b.tar"), load_recipe("datacompdr_12m")
    with pytest.raises(ConfigError, match="no tar of records is called b.tar"):
        import_datacompdr(a, b, str(tmp_path / "s"), recipe, {})
    with pytest.raises(ConfigError, match=r"no records of DataCompDR; the last one looked at is x: has no paug.json"):
        import_datacompdr(b, b, str(tmp_path / "s"), recipe, {})
    with pytest.raises(ConfigError, match="8 numbers wide, and the teachers' parts are openai=3, datacomp_xl=4"):
        import_datacompdr(a, a, str(tmp_path / "s"), recipe, {"openai": 3, "datacomp_xl": 4})
    with pytest.raises(ConfigError, match="8 numbers wide, .* openai=768, datacomp_xl=768; name the recipe .*--recipe"):
        import_datacompdr(a, a, str(tmp_path / "s"), recipe, {})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("embeddings", ["fp32", "bf16"])
def test_a_store_goes_out_and_comes_back_and_teaches_the_same(
    reinforced: Reinforced, tmp_path: Path, embeddings: str
) -> None:
    out, back = tmp_path / "dr", tmp_path / "back"
    tars = reinforced.shards
    asked = ["export", "datacompdr", reinforced.store, "--shards", tars, "--out", str(out)]
    told = CliRunner().invoke(app, [*asked, "--embeddings", embeddings, "--json"])
    assert told.exit_code == 0, told.output
    first = Store(reinforced.store)
    names = first.shards()
    assert json.loads(told.stdout)["written"] == len(names)
    (tmp_path / "recipe.json").write_text(first.promised().parsed_recipe().model_dump_json())
    asked = ["import", "datacompdr", f"{out}/*.tar", "--store", str(back), "--json"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 2 and "name the recipe with the teachers that made them, --recipe" in told.stderr
    told = CliRunner().invoke(app, [*asked, "--recipe", str(tmp_path / "recipe.json")])
    assert told.exit_code == 0, told.output
    assert list(json.loads(told.stdout)["assumed_teachers"]) == ["vit", "conv"]
    second = Store(str(back))
    for name in names:
        good = first.read(name, "status") == 0
        for column in second.promised().columns():
            if str(column) in ("place", "status", "view/base/pixels"):  # of other tars, and at 224 px
                continue
            one, two = first.read(name, column), second.read(name, column)
            assert np.compress(good, one, axis=column.row_axis).tolist() == two.tolist(), column
    learnt = []
    for store, shards_of in ((reinforced.store, tars), (str(back), f"{out}/*.tar")):
        config = TrainConfig(
            student=reinforced.student, shards=shards_of, store=store, distill=0.7, global_batch_size=8, steps=4,
            precision="fp32", workers=0, report_to=[], streams=1, dist_logit_scale={"vit": 50.0, "conv": 50.0},
        )  # fmt: skip
        report = fit(config, tmp_path / f"learnt_{Path(store).name}")
        learnt.append((report["samples"], report["metrics"]["loss"], report["metrics"]["grad_norm"]))
    assert learnt[0] == learnt[1]


def test_a_tar_that_is_another_is_not_exported(reinforced: Reinforced, tmp_path: Path) -> None:
    [first, *_] = Store(reinforced.store).shards()
    swapped = tmp_path / f"{first}.tar"
    genuine = next(s for s in shards.expand(reinforced.shards) if s.name == first)
    parts = list(shards.read_parts(genuine, ("jpg", "png", "txt")))
    shards.write(str(swapped), [(key, parts[-1 - i][1]) for i, (key, _) in enumerate(parts)])
    told = CliRunner().invoke(
        app,
        ["export", "datacompdr", reinforced.store, "--shards", str(swapped), "--out", str(tmp_path / "o"), "--json"],
    )
    assert told.exit_code == 1 and "is not the tar that was reinforced" in json.loads(told.stdout)["failed"][0]
    assert list((tmp_path / "o").iterdir()) == []


def test_the_names_of_shards(tmp_path: Path) -> None:
    shutil.copy(tar(tmp_path / "00000000.tar"), tmp_path / "00000001.tar")
    report = imported(str(tmp_path / "{00000000..00000001}.tar"), str(tmp_path / "*.tar"), tmp_path / "s")
    assert report.done == 2 and Store(str(tmp_path / "s")).shards() == ["00000000", "00000001"]
