"""The bundled samples are what the README says: readable, held-out apart, small, with models that learnt something."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipelines.samples import emoji
from pipelines.samples.coca import train_coca
from pipelines.samples.measure import captions_of, retrieval, word_f1, write_captions
from pipelines.samples.models import CLIPS, MODELS, VOCABULARY, train_clip
from pipelines.samples.vocabulary import learn_vocabulary
from reinforce.errors import ConfigError
from reinforce.models import tensorfile
from reinforce.models.open_clip import open_clip
from train import students
from train.students import CONFIG, WEIGHTS

SAMPLES = Path(__file__).parent.parent / "samples"
TRAIN = sorted((SAMPLES / "train").glob("*.tar"))
HELDOUT = SAMPLES / "heldout/00000.tar"


@pytest.mark.parametrize("tar", [*TRAIN, HELDOUT], ids=lambda tar: f"{tar.parent.name}/{tar.stem}")
def test_every_sample_of_a_tar_is_whole(tar: Path) -> None:
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert len(samples) == (120 if tar == HELDOUT else 370)
    for sample in samples:
        about = json.loads(sample["json"])
        caption = sample["txt"].decode()
        picture = Image.open(io.BytesIO(sample["jpg"]))
        assert (picture.size, picture.mode) == ((128, 128), "RGB")
        assert about["caption"][0] in caption
        assert "." not in caption and "!" not in caption
        assert about["codepoints"] == sample["__key__"]
        assert "OFL" in about["license"] and about["block"] and about["group"]


def test_no_heldout_picture_is_in_the_training_tars() -> None:
    keys: dict[str, set[str]] = {"train": set(), "heldout": set()}
    pictures: dict[str, set[bytes]] = {"train": set(), "heldout": set()}
    for tar in [*TRAIN, HELDOUT]:
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            keys[tar.parent.name].add(sample["__key__"])
            pictures[tar.parent.name].add(hashlib.sha256(sample["jpg"]).digest())
    assert len(keys["train"]) == 1480 and len(keys["heldout"]) == 120
    assert not keys["train"] & keys["heldout"]
    assert not pictures["train"] & pictures["heldout"]


def test_all_of_it_is_under_25_megabytes() -> None:
    assert sum(file.stat().st_size for file in SAMPLES.rglob("*") if file.is_file()) < 25e6


@pytest.mark.parametrize("name", ["teacher_vit", "teacher_conv"])
def test_a_teacher_knows_which_caption_belongs_to_a_picture_it_never_saw(name: str) -> None:
    measured = retrieval(SAMPLES, name)
    assert measured["text_retrieval_recall@1"] > 20 / 120, "chance is 1 in 120"
    assert measured["image_retrieval_recall@1"] > 20 / 120
    assert measured["matching_above_other"] > 0.7, "chance is 0.5"


def test_the_teachers_differ_in_kind_size_and_preprocessing() -> None:
    vit, conv = (students.create(f"{SAMPLES}/models/{name}").model for name in ("teacher_vit", "teacher_conv"))
    assert type(vit.visual) is not type(conv.visual)
    for key in ("size", "mean", "std"):
        assert vit.visual.preprocess_cfg[key] != conv.visual.preprocess_cfg[key]
    assert vit.visual.output_dim != conv.visual.output_dim
    assert vit.context_length != conv.context_length


def test_the_captioner_writes_what_is_to_be_seen_on_pictures_it_never_saw() -> None:
    written = write_captions(SAMPLES)
    assert all(written)
    assert len(set(written)) > 60
    phrases = [captions[0] for _, captions in captions_of(HELDOUT)]
    right = np.mean([word_f1(phrase, caption) for phrase, caption in zip(phrases, written, strict=True)])
    swapped = np.mean([word_f1(phrase, caption) for phrase, caption in zip(phrases, written[1:], strict=False)])
    assert right > 0.18, "a caption of another picture comes to 0.06"
    assert right > 2 * swapped


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_brings_a_vocabulary_that_encodes_any_text(name: str) -> None:
    cfg = json.loads((SAMPLES / "models" / name / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert cfg["tokenizer_kwargs"] == {"bpe_path": VOCABULARY}, "relative to the folder"
    tokenizer = students.create(f"{SAMPLES}/models/{name}").tokenizer
    assert tokenizer.vocab_size == cfg["vocab_size"]
    assert [tokenizer.sot_token_id, tokenizer.eot_token_id] == [cfg["vocab_size"] - 2, cfg["vocab_size"] - 1]
    for text in ["naïve café", "漢字 and 🙂", "a grinning face", "\x00\x7f"]:
        tokens = tokenizer.encode(text)
        assert max(tokens, default=0) < tokenizer.sot_token_id
        assert tokenizer.decode(tokens).split() == tokenizer.decode(tokenizer.encode(tokenizer.decode(tokens))).split()
    assert tokenizer.decode(tokenizer.encode("naïve 漢字")).strip() == "naïve 漢字"


def test_a_vocabulary_is_learnt_from_the_most_frequent_pairs(tmp_path: Path) -> None:
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(learn_vocabulary(["face face face", "facet"], 516))
    tokenizer = open_clip.SimpleTokenizer(str(path))
    assert tokenizer.vocab_size == 516
    assert learn_vocabulary(["face face face", "facet"], 516) == path.read_bytes()
    path.write_bytes(learn_vocabulary(["face", "facet"], 10_000))
    tokenizer = open_clip.SimpleTokenizer(str(path))
    assert len(tokenizer.encode("face")) == len(tokenizer.encode("facet")) == 1
    assert tokenizer.decode(tokenizer.encode("faces")).strip() == "faces"


@pytest.mark.parametrize(
    ("name", "subgroup", "phrase"),
    [
        ("grinning face", "face-smiling", "a grinning face"),
        ("man: medium skin tone, beard", "person", "a man with medium skin tone and beard"),
        ("family: man, woman, boy", "family", "a family of man, woman and boy"),
        ("flag: St. Lucia", "country-flag", "the flag of St Lucia"),
        ("one o’clock", "time", "a clock showing one o'clock"),
        ("grinning cat with big eyes", "cat-face", "a grinning cat with big eyes"),
        ("folded hands", "hands", "folded hands"),
        ("umbrella", "sky & weather", "an umbrella"),
    ],
)
def test_a_caption_is_plain_english(name: str, subgroup: str, phrase: str) -> None:
    assert emoji.describe(emoji.Emoji((0x1F600,), name, "", subgroup), [])[0] == phrase


def test_a_choice_of_emoji_depends_on_the_seed_alone() -> None:
    flags = [emoji.Emoji((code,), "", "Flags", "") for code in range(100)]
    assert emoji.choose(flags, 1) == emoji.choose(flags[::-1], 1)
    assert emoji.choose(flags, 1) != emoji.choose(flags, 2)
    assert len(emoji.choose(flags, 1)) == emoji.MOST["Flags"]


def test_without_apt_the_message_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get"):
        emoji.fetch(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models, trained for an epoch on one tar."""
    out = tmp_path_factory.mktemp("samples")
    (out / "train").mkdir()
    shutil.copyfile(TRAIN[0], out / "train/00000.tar")
    vocabulary = (SAMPLES / "models/coca" / VOCABULARY).read_bytes()
    for name in CLIPS:
        train_clip(name, out, vocabulary, epochs=1)
    train_coca(out, vocabulary, epochs=1)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_trained_now_is_of_the_kind_of_the_bundled_one(name: str, trained: Path) -> None:
    bundled, made = SAMPLES / "models" / name, trained / "models" / name
    assert {path.name for path in made.iterdir()} == {path.name for path in bundled.iterdir()}
    assert (made / CONFIG).read_bytes() == (bundled / CONFIG).read_bytes()
    (old, _), (new, _) = tensorfile.load(bundled / WEIGHTS), tensorfile.load(made / WEIGHTS)
    assert {key: (t.shape, t.dtype) for key, t in new.items()} == {key: (t.shape, t.dtype) for key, t in old.items()}
    assert all(tensor.isfinite().all() for tensor in new.values())


def test_the_captioner_starts_from_the_tower_of_the_vit(trained: Path) -> None:
    (vit, _), (coca, _) = (tensorfile.load(trained / "models" / name / WEIGHTS) for name in ("teacher_vit", "coca"))
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    torch.testing.assert_close(vit[name], coca[name], atol=0.02, rtol=0)  # after a few steps it is near
