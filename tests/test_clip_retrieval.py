"""clip-retrieval's folder becomes a store: written here as its writer does, in parts that are not those of the tars."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from reinforce.__main__ import app
from reinforce.check.verify import verify
from reinforce.config import Recipe, ViewSet
from reinforce.data import augment, images, shards
from reinforce.errors import ConfigError
from reinforce.exchange.captions import import_captions
from reinforce.exchange.clip_retrieval import VIEWS, _model, import_clip_retrieval
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here
from train import students
from train.config import TrainConfig
from train.trainer import fit

WIDTH = 16


def picture(seed: int, height: int, width: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> str:
    """As img2dataset writes them: 000000000.jpg, .txt and .json, and beside each tar a parquet and its counts."""
    folder = tmp_path / "images"
    for tar, num in enumerate([7, 5]):
        samples = []
        for i in range(num):
            key, caption = f"{tar:05d}{i:04d}", f"picture {tar} of {i}"
            said = {"caption": caption, "url": "https://x", "key": key, "status": "success", "uid": f"u{key}"}
            sides = [(90, 160), (160, 90), (121, 122), (64, 64)][i % 4]
            parts = {"jpg": picture(10 * tar + i, *sides), "txt": caption.encode(), "json": json.dumps(said).encode()}
            samples.append((key, parts))
        shards.write(str(folder / f"{tar:05d}.tar"), samples)
        rows = [{"key": key, "status": "success", "error_message": None} for key, _ in samples]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{tar:05d}.parquet")
        (folder / f"{tar:05d}_stats.json").write_text("{}")
    return f"{folder}/*.tar"


def rows_of(tars: str) -> list[tuple[str, str]]:
    return [(sample.key, sample.captions[0]) for shard in shards.expand(tars) for sample in shards.read(shard)]


def units(seed: int, num: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(num, WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def embedded(folder: Path, rows: list[tuple[str, str]], parts: int = 3) -> Path:
    """As its writer does it: a number of each part, of as many digits as they all need."""
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for part, of_part in enumerate(np.array_split(np.arange(len(rows)), parts)):
        table = {"image_path": [rows[i][0] for i in of_part], "caption": [rows[i][1] for i in of_part]}
        table["url"] = ["https://x"] * len(of_part)
        parquet.write_table(pyarrow.Table.from_pydict(table), folder / f"metadata/metadata_{part}.parquet")
        for seed, kind in enumerate(("img_emb", "text_emb")):
            np.save(folder / f"{kind}/{kind}_{part}.npy", units(seed, len(rows))[of_part])
    return folder


def test_a_folder_becomes_a_store(tars: str, recipe: Recipe, tmp_path: Path) -> None:
    rows = rows_of(tars)[::-1]
    folder, store = embedded(tmp_path / "out", rows), str(tmp_path / "store")
    command = ["import", "clip-retrieval", str(folder), "--images", tars, "--store", store, "--json"]
    model = recipe.teachers["vit"].model  # one that can be loaded: its weights are not known to be those all the same
    code, out, err = here(app, *command, "--clip-model", model)
    told = json.loads(out)
    assert code == 0 and (told["done"], told["samples"], told["valid"]) == (2, 12, 12), err
    found = Store(store)
    manifest = found.promised()
    teacher = manifest.parsed_recipe().teachers["clip"]
    assert (teacher.model, teacher.pretrained) == (model, None)
    assert manifest.models["teachers"]["clip"] == {"weights": "imported", "width": WIDTH, "logit_scale": 100.0}
    expected = {key: (image, text) for (key, _), image, text in zip(rows, units(0, 12), units(1, 12), strict=True)}
    for shard in found.shards():
        keys = found.read(shard, "key").tolist()
        for column, which in (("view/base/clip", 0), ("text/original/clip", 1)):
            array = found.read(shard, column).astype(np.float32)
            assert array.shape == (1, len(keys), WIDTH)
            assert np.abs(array[0] - np.stack([expected[key][which] for key in keys])).max() < 2**-8
        assert found.read(shard, "text/original/caption").tolist() == [[dict(rows)[key] for key in keys]]
    report = verify(store, tars, 12)
    assert report.sound and report.replay and report.replay["pixel_equal"] == report.replay["views"] == 12
    assert report.unchecked == ["cosines of teacher clip: what it said was imported, and its weights are not known"]
    (tmp_path / "more.jsonl").write_text('{"key": "000000000", "caption": "x"}')
    with pytest.raises(ConfigError, match="teacher 'clip' said elsewhere, .*: it cannot embed these captions"):
        import_captions(tmp_path / "more.jsonl", store, "vlm")
    again = here(app, *command, "--clip-model", model)
    assert json.loads(again[1])["already_there"] == 2

    config = TrainConfig(
        student=tiny.student(tmp_path / "student"), shards=tars, store=store, distill=0.5, global_batch_size=8, steps=2,
        precision="fp32", workers=0, report_to=[],
    )  # fmt: skip
    assert fit(config, tmp_path / "run")["steps"] == 2
    checked = {"agreement": {"onnx/image": {"min_cosine": 1.0}}}
    card = students.create(str(tmp_path / "run/student")).documents("X", checked)["README.md"]
    assert f"- teacher `clip`: {model}  (weights imported)" in card


@pytest.mark.parametrize("sides", [(90, 160), (160, 90), (301, 300), (448, 333), (224, 224), (37, 500)])
def test_the_view_is_what_its_models_saw(sides: tuple[int, int]) -> None:
    """Resized to the shorter side and cut, as open_clip's and OpenAI's transforms do: but for the order of the two."""
    image = images.decode(picture(1, *sides))
    seen = np.array(T.center_crop(T.resize(image, 224, InterpolationMode.BICUBIC), [224, 224])).astype(int)
    view = augment.replay(image, augment.draw(VIEWS, 0, "base", "key", 0, sides), sides, 224)
    assert np.abs(view - seen).mean() < 2  # of 255, noise of 30 pixels a cell
    other = augment.replay(image, np.float32([0, 0, min(sides), min(sides)]), sides, 224)
    if max(sides) > 1.2 * min(sides):
        assert np.abs(other - seen).mean() > 20


def test_it_is_a_view_set_that_anyone_can_ask_for() -> None:
    assert ViewSet.model_validate({"num_views": 1, "scale": [1, 1], "ratio": [1, 1], "num_ops": 0}) == VIEWS


def test_what_belongs_to_nothing_is_left_out(tars: str, tmp_path: Path) -> None:
    rows = rows_of(tars)
    rows[1] = (rows[1][0], "another caption")
    rows[2] = (f"/somewhere/{rows[2][0]}.jpg", f"  {rows[2][1]}\n")  # of a folder of files, not of tars
    rows += [rows[3], ("stranger", "x")]  # the one comes twice
    del rows[0]
    folder = embedded(tmp_path / "out", rows, parts=1)
    report = import_clip_retrieval(folder, tars, str(tmp_path / "store"), "ViT-B/32", max_invalid=0.5)
    assert (report.valid, report.quarantined) == (9, {"no_record": 3})
    status = Store(str(tmp_path / "store")).read("00000", "status").tolist()
    assert [status[i] == 0 for i in range(5)] == [False, False, True, False, True]
    report = import_clip_retrieval(folder, tars, str(tmp_path / "other"), "ViT-B/32")
    assert "clip-retrieval has nothing of this key and caption" in report.failed[0].reason


@pytest.mark.parametrize(
    ("told", "model"),
    [
        ("ViT-B/32", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-L/14@336px", ("ViT-L-14-336-quickgelu", "openai")),
        ("open_clip:ViT-H-14/laion2b_s32b_b79k", ("ViT-H-14", "laion2b_s32b_b79k")),
        ("hf_clip:patrickjohncyh/fashion-clip", ("hf_clip:patrickjohncyh/fashion-clip", None)),
    ],
)
def test_models_are_called_as_open_clip_calls_them(told: str, model: tuple[str, str | None]) -> None:
    assert _model(told) == model


def test_a_name_that_no_column_can_have_is_told(tars: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a/b' cannot name a column"):
        import_clip_retrieval(tmp_path, tars, str(tmp_path / "store"), "ViT-B/32", teacher="a/b")


def test_embeddings_that_are_no_directions_are_left_out(tars: str, tmp_path: Path) -> None:
    folder = embedded(tmp_path / "out", rows_of(tars), parts=1)
    broken = units(0, 12)
    broken[0], broken[1, 3] = 0, np.nan
    broken[2] *= 3
    np.save(folder / "img_emb/img_emb_0.npy", broken)
    store = str(tmp_path / "store")
    report = import_clip_retrieval(folder, tars, store, "ViT-B/32", max_invalid=0.5)
    assert report.quarantined == {"no_record": 2}
    assert np.linalg.norm(Store(store).read("00000", "view/base/clip").astype(float)[0, 2]) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda out: (out / "text_emb/text_emb_1.npy").unlink(), "text_emb_1.npy is not there; .*--enable_text True"),
        (lambda out: (out / "img_emb/img_emb_1.npy").unlink(), "img_emb_1.npy is not there; .*--enable_image True"),
        (lambda out: np.save(out / "img_emb/img_emb_1.npy", units(0, 3)), "metadata_1.parquet has 4 rows, img_emb"),
        (lambda out: np.save(out / "img_emb/img_emb_1.npy", np.zeros((4, 8), np.float16)), "do not belong together"),
        (lambda out: np.save(out / "img_emb/img_emb_1.npy", np.array([{}])), "img_emb_1.npy cannot be read"),
        (lambda out: np.save(out / "img_emb/img_emb_1.npy", np.zeros(4)), "which are no embeddings"),
        (lambda out: (out / "metadata/metadata_1.parquet").write_bytes(b"x"), "metadata_1.parquet cannot be read"),
        (
            lambda out: parquet.write_table(pyarrow.table({"image_path": ["a"]}), out / "metadata/metadata_1.parquet"),
            "metadata_1.parquet cannot be read: No match for .*caption",
        ),
        (lambda out: [path.unlink() for path in out.glob("metadata/*")], "give the folder that clip-retrieval wrote"),
    ],
)
def test_a_folder_that_is_not_whole_is_told_before_any_work(tars: str, tmp_path: Path, damage, told: str) -> None:
    folder = embedded(tmp_path / "out", rows_of(tars))
    damage(folder)
    with pytest.raises(ConfigError, match=told):
        import_clip_retrieval(folder, tars, str(tmp_path / "store"), "ViT-B/32")
    assert not (tmp_path / "store").exists()


def test_the_folder_of_img2dataset_is_read_as_it_lies(tars: str, recipe: Recipe, tmp_path: Path) -> None:
    """Tables and counts beside the tars are not in the way; a caption that is in .txt and in .json is one."""
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = ["run", tars, "--store", str(tmp_path / "s"), "--recipe", str(tmp_path / "recipe.json"), "--json"]
    code, out, err = here(app, *command, "--workers", "0", "--device", "cpu", "--set", "num_original_captions=2")
    assert code == 0, err
    assert (json.loads(out)["samples"], json.loads(out)["valid"]) == (12, 12)
    captions = Store(str(tmp_path / "s")).read("00000", "text/original/caption")
    assert captions[:, 0].tolist() == ["picture 0 of 0"] * 2
    code, _, err = here(app, "run", tars.removesuffix("/*.tar"), "--store", str(tmp_path / "t"), "--recipe", "sample")
    assert code == 2 and "is a folder; a shard is a tar: write" in err
