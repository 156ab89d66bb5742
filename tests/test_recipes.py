"""The published recipes at full architecture, weights drawn at random: shapes, memory and code paths."""

from pathlib import Path

import numpy as np
import pytest

from reinforce.check.info import info
from reinforce.check.verify import verify
from reinforce.config import RunOptions
from reinforce.errors import ConfigError
from reinforce.recipes import load_recipe
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["datacompdr_12m", "datacompdr_1b", "mobileclip2"])
def test_full_size_on_a_few_images(name: str, tmp_path: Path) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 2)
    # One view of many, to stay within minutes on two cores; everything else as published.
    recipe = load_recipe(name, ["weights=random", "batch_size=2", "cpu_threads=2", "view_sets.base.num_views=2"])
    report = driver.run(tar, str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    assert (report.done, report.valid) == (1, 2)
    store = Store(str(tmp_path / "s"))
    for teacher in recipe.teachers:
        assert store.read("00000", f"view/base/{teacher}").shape == (2, 2, 768)
        assert store.read("00000", f"text/coca/{teacher}").shape == (5, 2, 768)
    assert store.read("00000", "text/coca/caption").shape == (5, 2)
    assert np.isfinite(store.read("00000", "view/base/augment")).all()
    manifest = store.manifest()
    assert manifest and all(m["weights"] == "random" for kind in manifest.models.values() for m in kind.values())
    assert info(str(tmp_path / "s"))["weights"] == "random"
    doubt = verify(str(tmp_path / "s"), tar, 2, "cpu")
    assert doubt.sound and doubt.replay and doubt.replay["cosine_min"] >= 0.999


def test_openai_weights_need_quickgelu(tmp_path: Path) -> None:
    """Under open_clip's plain ViT-L-14 they would only warn, and be another teacher."""
    tar = tiny.tar(tmp_path / "00000.tar", 1)
    recipe = load_recipe("datacompdr_12m", ["weights=random", "teachers.openai.model=ViT-L-14"])
    with pytest.raises(ConfigError, match="ViT-L-14-quickgelu,openai"):
        driver.run(tar, str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teachers.openai.model=ViT-L-41", "open_clip has no model 'ViT-L-41'"),
        ("teachers.openai.pretrained=openia", "neither a file nor a tag; tags: openai"),
        ("teachers.openai.pretrained=/none/weights.pt", "neither a file nor a tag"),
    ],
)
def test_models_that_do_not_exist_get_a_sentence(tmp_path: Path, override: str, told: str) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 1)
    with pytest.raises(ConfigError, match=told):
        driver.run(
            tar, str(tmp_path / "s"), load_recipe("datacompdr_12m", [override]), RunOptions(workers="0", device="cpu")
        )
