"""Prompts: where the tokens stand, that the frozen model is what it was, and whose they are."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinforce.config import Recipe, Teacher
from reinforce.errors import ConfigError
from reinforce.models import prompts
from reinforce.models.frozen import FrozenModel
from reinforce.models.open_clip import open_clip
from reinforce.models.prompts import Prompts
from reinforce.models.teacher import load_teacher
from reinforce.models.tokenizer import get_tokenizer
from tests import tiny

CPU = torch.device("cpu")
TEXTS = ["a cat", "", "letters " * 20]


def clip(folder: Path, **model_cfg):
    """A CLIP of two layers a tower with random weights, and its tokenizer."""
    tiny.models(folder)
    path = folder / "vit/open_clip_config.json"
    config = json.loads(path.read_text())
    for tower in ("vision_cfg", "text_cfg"):
        config["model_cfg"][tower]["layers"] = 2
    config["model_cfg"] |= model_cfg
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder / 'vit'}", load_weights=False, pretrained_text=False).eval()
    return model, get_tokenizer(f"local-dir:{folder / 'vit'}")


@pytest.fixture(params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def made(request: pytest.FixtureRequest, tmp_path: Path):
    return clip(tmp_path / "m", custom_text=request.param)


@torch.no_grad()
def test_without_prompts_the_model_is_what_it_was(made) -> None:
    model, tokenizer = made
    images, tokens = torch.randn(3, 3, 32, 32), tokenizer(TEXTS)
    weights = copy.deepcopy(model.state_dict())
    before = model.encode_image(images), model.encode_text(tokens)
    added = Prompts.fresh(model, 3, 9, seed=1, tokenizer=tokenizer)
    added.attach(model)
    with added.set_aside():
        assert torch.equal(model.encode_image(images), before[0])
        assert torch.equal(model.encode_text(tokens), before[1])
    assert not torch.allclose(model.encode_image(images), before[0], atol=1e-4)
    assert not torch.allclose(model.encode_text(added.make_room(tokens)), before[1], atol=1e-4)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [tuple(t.shape) for _, t in sorted(added.tokens.items())] == [(2, 3, 32)] * 2  # depth 9 of 2 layers


@torch.no_grad()
def test_text_prompts_begin_as_words_before_the_text(made) -> None:
    """With the words' own embeddings, and one layer deep, they are these words."""
    model, tokenizer = made
    num = len(prompts.CONTEXT.replace(" ", ""))  # this vocabulary has letters only
    said = model.encode_text(tokenizer([f"{prompts.CONTEXT} cat"]))
    added = Prompts.fresh(model, num, 1, seed=0, tokenizer=tokenizer)
    added.attach(model)
    torch.testing.assert_close(model.encode_text(added.make_room(tokenizer(["cat"]))), said)


@torch.no_grad()
def test_image_prompts_against_a_slow_definition(made) -> None:
    model, _ = made
    images = torch.randn(2, 3, 32, 32)
    added = Prompts.fresh(model, 2, 2, seed=3)
    assert "text" not in added.tokens
    visual = copy.deepcopy(model.visual)
    first, second = added.tokens["image"]
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(2, 1, -1), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, first.expand(2, -1, -1)], 1))
    x = visual.transformer.resblocks[0](x)
    x = visual.transformer.resblocks[1](torch.cat([x[:, :-2], second.expand(2, -1, -1)], 1))
    expected = visual.ln_post(x[:, 0]) @ visual.proj
    added.attach(model)
    torch.testing.assert_close(model.encode_image(images), expected)
    torch.testing.assert_close(copy.deepcopy(model).encode_image(images), expected)  # as an export does


def test_room_is_made_and_the_end_is_kept() -> None:
    added = Prompts({"text": torch.zeros(1, 2, 8)})
    assert added.make_room(torch.tensor([[1, 5, 6, 9, 0, 0]])).tolist() == [[1, 1, 1, 5, 6, 9]]
    assert added.make_room(torch.tensor([[1, 5, 6, 7, 8, 9]])).tolist() == [[1, 1, 1, 5, 6, 9]]
    assert Prompts({"image": torch.zeros(1, 2, 8)}).make_room(torch.tensor([[1, 9]])).tolist() == [[1, 9]]


def test_gradients_reach_every_layer(made) -> None:
    model, tokenizer = made
    model.requires_grad_(False)
    added = Prompts.fresh(model, 2, 2, seed=0, tokenizer=tokenizer)
    added.attach(model)
    out = model(torch.randn(2, 3, 32, 32), added.make_room(tokenizer(TEXTS[:2])))
    (out[0] @ out[1].T).square().sum().backward()
    for tokens in added.tokens.values():
        assert (tokens.grad.flatten(1).abs().sum(1) > 0).all()


def test_an_adapted_teacher_has_a_digest_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    plain = FrozenModel(recipe.teachers["vit"], CPU)
    added = Prompts.fresh(plain.model, 2, 1, seed=0, tokenizer=plain.tokenizer)
    prompts.save(added, tmp_path / "p.safetensors", "vit", plain.digest, {"epochs": 3})
    adapted = load_teacher(Teacher(model=recipe.teachers["vit"].model, prompts=str(tmp_path / "p.safetensors")), CPU)
    assert adapted.digest != plain.digest
    assert adapted.describe().keys() == plain.describe().keys()
    assert json.loads(prompts.about(tmp_path / "p.safetensors")["about"]) == {"epochs": 3}
    with torch.no_grad():
        added.tokens["text"][0, 0, 0] += 1
    assert added.digest() != prompts.load(tmp_path / "p.safetensors", "vit", plain.digest).digest()


def test_prompts_of_another_model_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    prompts.save(Prompts({"image": torch.zeros(1, 2, 32)}), path, "the-right-one", "0" * 64, {})
    with pytest.raises(ConfigError, match="trained with the-right-one.*has other weights"):
        load_teacher(Teacher(model=recipe.teachers["vit"].model, prompts=str(path)), CPU)
    with pytest.raises(ConfigError, match="do not fit an image tower of 1 layers and width 32"):
        Prompts({"image": torch.zeros(1, 2, 16)}).attach(FrozenModel(recipe.teachers["vit"], CPU).model)
    save_file(load_file(path), path)
    with pytest.raises(ConfigError, match="holds no prompts"):
        prompts.load(path, "x", "0" * 64)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read.*clip-train adapt"):
        prompts.load(path, "x", "0" * 64)


def test_other_towers_are_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"open_clip's ViT; this one is a ModifiedResNet"):
        Prompts.fresh(FrozenModel(recipe.teachers["conv"], CPU).model, 2, 1, seed=0)
