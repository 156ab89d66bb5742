"""Teachers who answer together say what each says alone."""

import numpy as np
import pytest
import torch

from reinforce.config import Recipe
from reinforce.models.ensemble import Ensemble
from reinforce.models.teacher import Teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def together(recipe: Recipe) -> Ensemble:
    return Ensemble({name: Teacher(config, 4, CPU) for name, config in recipe.teachers.items()})


@pytest.mark.parametrize("num", [1, 3, 4])
@pytest.mark.parametrize("names", [["vit", "conv"], ["conv", "vit"], ["conv"]])
def test_images(together: Ensemble, names: list[str], num: int) -> None:
    sides = {teacher.image_px for teacher in together.teachers.values()}
    views = {side: np.random.default_rng(side).integers(0, 256, (num, side, side, 3), np.uint8) for side in sides}
    found = together.encode_images(names, views)()
    assert list(found) == names
    for name, array in found.items():
        alone = together.teachers[name].encode_images(views[together.teachers[name].image_px])
        assert array.dtype == alone.dtype and array.tobytes() == alone.tobytes() and array.base is None


@pytest.mark.parametrize("names", [["vit", "conv"], ["vit"], []])
def test_texts(together: Ensemble, names: list[str]) -> None:
    texts = ["a cat", "", 40 * "two dogs "]
    found = together.encode_tokens(names, together.tokens(names, texts), len(texts))()
    assert list(found) == names
    for name, array in found.items():
        assert array.tobytes() == together.teachers[name].encode_texts(texts).tobytes()


def test_an_answer_is_taken_when_others_have_been_asked_for(together: Ensemble) -> None:
    views = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), np.uint8)
    first, second = (together.encode_images(["vit"], {32: view}) for view in views)
    alone = [together.teachers["vit"].encode_images(view) for view in views]
    assert second()["vit"].tobytes() == alone[1].tobytes() and first()["vit"].tobytes() == alone[0].tobytes()


def test_texts_of_another_length_are_other_tokens(together: Ensemble, recipe: Recipe) -> None:
    vit, conv = together.teachers["vit"], together.teachers["conv"]
    assert vit.tokens(["a cat"]).shape == (4, 20) and conv.tokens(["a cat"]).shape == (4, 12)
    assert vit.vocabulary != conv.vocabulary
    assert vit.vocabulary == Teacher(recipe.teachers["vit"].but(precision="bf16"), 2, CPU).vocabulary
