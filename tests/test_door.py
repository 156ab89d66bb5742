"""The doors: what `make` refuses, and that own data is never mixed with the bundled samples."""

import subprocess

import pytest

from tests.processes import ROOT


def make(*words: str) -> tuple[int, str]:
    done = subprocess.run(["make", "-s", "-o", ".venv/ready", *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("reinforce SHARDS=mine.tar", "make reinforce: name STORE as well; SHARDS alone"),
        ("reinforce RECIPE=datacompdr_12m", "make reinforce: name SHARDS STORE as well; RECIPE alone"),
        ("train OUT=runs/mine RECIPE=sample", "make train: name SHARDS STORE as well; RECIPE OUT alone"),
        ("train SHARDS=mine.tar", "make train: name STORE as well; SHARDS alone"),
        ("verify STORE=stores/mine.zarr", "make verify: name SHARDS as well; STORE alone"),
        ("submit RAY_ADDRESS=http://nowhere:1 SHARDS=a.tar STORE=b", "make submit: name RECIPE as well"),
        ("submit SHARDS=a.tar STORE=b RECIPE=c", "name the cluster"),
    ],
)
def test_own_data_is_never_mixed_with_the_samples(words: str, told: str) -> None:
    code, text = make(*words.split())
    assert code == 2 and told in text


@pytest.mark.parametrize("recipe", [[], ["RECIPE="]])
def test_own_shards_need_a_recipe_and_the_recipes_are_listed(recipe: list[str]) -> None:
    code, text = make("reinforce", "SHARDS=mine.tar", "STORE=none.zarr", *recipe)
    assert code == 2 and "datacompdr_12m  DataCompDR-12M: 30 views" in text and not (ROOT / "none.zarr").exists()


def test_bare_doors_are_for_the_samples() -> None:
    """Printed, not run: `make -n`."""
    code, text = make("-n", "reinforce", "train", "verify", "info")
    text = " ".join(text.split())
    assert code == 0
    assert "run 'samples/train/{00000..00003}.tar' --store 'stores/samples.zarr' --recipe sample" in text
    assert "-m pipelines sample" in text and "info 'stores/samples.zarr'" in text


def test_help_explains_every_door() -> None:
    code, text = make("help")
    assert code == 0 and {"make reinforce", "make train", "make test"} <= {
        line[:14].strip() for line in text.splitlines()
    }
