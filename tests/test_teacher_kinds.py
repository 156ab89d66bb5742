"""Teachers that are no CLIP: a SigLIP, which has a bias, and an image encoder of timm, which reads no texts."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from reinforce.check import dial, info, plan, repack, survey
from reinforce.check.verify import verify
from reinforce.config import ClassSet, Recipe, RunOptions, Teacher, parse
from reinforce.data import augment, images, shards
from reinforce.errors import ConfigError, MissingExtra
from reinforce.models.teacher import Teacher as Loaded
from reinforce.models.timm import timm
from reinforce.models.tokenizer import get_tokenizer
from reinforce.run import driver
from reinforce.store.reader import StoreReader
from reinforce.store.store import Store
from tests import tiny
from train.config import TrainConfig
from train.data.mixture import source_of
from train.trainer import fit

CPU = torch.device("cpu")
RUN = RunOptions(workers="0", device="cpu")
PX = 48


@pytest.fixture(scope="module")
def kinds(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Recipe]:
    """Tars, and a store of a CLIP that sees images larger than it was trained at, a SigLIP and an image encoder."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(5)
    save_file(timm.create_model("test_vit", img_size=160).state_dict(), folder / "weights.safetensors")
    teachers = {
        "vit": recipe.teachers["vit"].but(image_px=PX),
        "siglip": Teacher(model=tiny.siglip(folder / "siglip")),
        "dino": Teacher(model="timm:test_vit", pretrained=str(folder / "weights.safetensors"), image_px=PX),
    }
    asked = recipe.but(teachers=teachers, class_sets={"kinds": ClassSet(classnames=("hat", "shoe"))})
    tars = tiny.tar(folder / "in/00000.tar", 9)
    assert driver.run(tars, str(folder / "s"), asked, RUN).valid == 9
    return tars, str(folder / "s"), asked


def test_an_image_encoder_has_no_texts_and_a_siglip_keeps_its_bias(kinds: tuple[str, str, Recipe]) -> None:
    _, store, _ = kinds
    said = StoreReader(store).manifest.models["teachers"]
    assert (said["siglip"]["logit_scale"], said["siglip"]["logit_bias"]) == (pytest.approx(10.0), -10.0)
    assert "logit_bias" not in said["vit"] and said["vit"]["image_px"] == PX
    assert not {"logit_scale", "tokenizer", "vocabulary"} & said["dino"].keys() and said["dino"]["width"] == 64
    columns = StoreReader(store)["00000"].columns
    assert "view/base/dino" in columns and "text/coca/siglip" in columns and "text/coca/dino" not in columns
    told = info.info(store)
    assert told["view_sets"]["base"]["teachers"] == ["vit", "siglip", "dino"]
    assert told["text_sets"]["coca"]["teachers"] == told["class_sets"]["kinds"]["teachers"] == ["vit", "siglip"]
    assert told["missing_columns"] == []


def test_what_an_image_encoder_says_of_a_view_is_what_timm_says(kinds: tuple[str, str, Recipe]) -> None:
    tars, store, asked = kinds
    view = StoreReader(store)["00000"].view("base", 2, 1)
    sample = list(shards.read(shards.expand(tars)[0]))[2]
    pixels = augment.replay(images.decode(sample.image), view.params, view.size, PX)
    model = timm.create_model("test_vit", img_size=PX, num_classes=0, pretrained=True,
        pretrained_cfg_overlay={"file": asked.teachers["dino"].pretrained}).eval()  # fmt: skip
    cfg = model.pretrained_cfg
    plain = (torch.from_numpy(pixels) / 255 - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    with torch.no_grad():
        unit = F.normalize(model(plain.permute(2, 0, 1)[None]), dim=-1)[0]
    assert float(unit @ torch.from_numpy(view.embeddings["dino"])) > 0.9999


def test_what_looks_at_a_store_knows_of_them(kinds: tuple[str, str, Recipe], tmp_path: Path) -> None:
    tars, store, asked = kinds
    replays = verify(store, tars, 4, "cpu").replay
    assert replays and replays["pixel_equal"] == replays["views"] == 4 and replays["cosine_min"] > 0.999
    assert dial.dial(store).keys() == {"vit", "siglip"}
    looked_at = survey.survey(Store(store), ["00000"])
    assert looked_at.cosines.keys() == {"vit", "siglip"} and len(looked_at) == 9
    repack.repack(store, str(tmp_path / "int8"), "int8")
    small, large = (StoreReader(url)["00000"].array("view/base/dino", 0) for url in (str(tmp_path / "int8"), store))
    assert np.allclose(small.astype(np.float32), large.astype(np.float32), atol=0.01)
    stages = plan.plan(tars, str(tmp_path / "new"), asked, RUN).stages
    assert any(stage.startswith("dino, 3 views") for stage in stages)
    assert not any("dino" in stage and "texts" in stage for stage in stages)


def training(kinds: tuple[str, str, Recipe], **changes: object) -> TrainConfig:
    tars, store, _ = kinds
    asked: dict[str, object] = {
        "shards": tars, "store": store, "global_batch_size": 8, "streams": 1, "steps": 2, "precision": "fp32",
        "workers": 0, "report_to": [], "device": "cpu",
    }  # fmt: skip
    return parse(TrainConfig, asked | changes, "the test")


def test_students_learn_from_them(kinds: tuple[str, str, Recipe], tmp_path: Path) -> None:
    config = training(kinds, student=tiny.student(tmp_path / "student"), distill=0.5)
    assert source_of(config).teachers.keys() == {"vit", "siglip"}  # what is not learned from is not read
    config = config.but(feature_mse=1.0, feature_balance=True)
    facts = source_of(config).teachers
    assert facts.keys() == {"vit", "siglip", "dino"} and facts["siglip"].logit_bias == -10.0
    report = fit(config, tmp_path / "run")
    assert report["metrics"]["feature_mse"] > 0 and np.isfinite(report["metrics"]["loss"])


def test_without_a_teacher_that_reads_texts_features_can_be_learned(
    kinds: tuple[str, str, Recipe], tmp_path: Path
) -> None:
    config = training(kinds, student=tiny.student(tmp_path / "student"), teachers=["dino"])
    with pytest.raises(ConfigError, match="no teacher reads texts.*distill=0 and feature_mse=1"):
        source_of(config)
    assert fit(config.but(distill=0.0, feature_mse=1.0), tmp_path / "run")["metrics"]["feature_mse"] > 0


def test_a_store_grows_by_an_image_encoder(kinds: tuple[str, str, Recipe], tmp_path: Path) -> None:
    tars, _, asked = kinds
    few = asked.but(teachers={"siglip": asked.teachers["siglip"]}, captioners={}, class_sets={})
    driver.run(tars, str(tmp_path / "s"), few, RUN)
    grown = few.but(teachers=few.teachers | {"dino": asked.teachers["dino"]})
    driver.run(tars, str(tmp_path / "s"), grown, RUN.but(extend=True))
    assert info.info(str(tmp_path / "s"))["missing_columns"] == []
    whole = StoreReader(kinds[1])["00000"].array("view/base/dino", 2)
    assert StoreReader(str(tmp_path / "s"))["00000"].array("view/base/dino", 2).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"model": "timm:vit_small_patch14_dinov9"}, "timm has no model 'vit_small_patch14_dinov9'; it has vit_small"),
        ({"model": "timm:test_vit", "pretrained": "lost.pt"}, "'lost.pt' is neither a file nor a tag; tags: r160_in1k"),
        ({"model": "timm:test_vit", "pretrained": __file__}, "cannot be loaded"),
    ],
)
def test_what_timm_has_not_is_said(teacher: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loaded(Teacher(**teacher), 2, CPU)


def test_prompts_are_for_teachers_that_read_texts() -> None:
    with pytest.raises(ConfigError, match="timm:test_vit reads no texts"):
        parse(Teacher, {"model": "timm:test_vit", "prompts": "prompts.safetensors"}, "the recipe")


def test_a_siglip_with_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    """As the published ones have: not open_clip's own, which has other attributes. Needs the extra `siglip`."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "dog": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    name = tiny.siglip(tmp_path / "model", hf_tokenizer_name="words")
    made.save_pretrained(tmp_path / "model")  # where open_clip looks for it, whatever its name
    teacher = Loaded(Teacher(model=name), 2, CPU)
    assert teacher.tokens(["a dog!"])[0].tolist()[:4] == [2, 3, 1, 0]
    assert (teacher.describe()["vocab_size"], teacher.describe()["tokenizer"]) == (4, "HFTokenizer")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is there")
def test_what_a_siglips_tokenizer_needs_is_said() -> None:
    with pytest.raises(MissingExtra, match=r"needs transformers.*pip install 'clip-reinforce\[siglip\]'"):
        get_tokenizer("ViT-B-16-SigLIP")


def test_random_weights_are_drawn_from_the_seed() -> None:
    config = Teacher(model="timm:test_resnet", image_px=PX)
    digests = [Loaded(config, 2, CPU, random_seed=seed).frozen.digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
