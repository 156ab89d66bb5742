"""What is changed for the whole process: that each change takes effect, and is refused where a library has moved on."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numcodecs.blosc
import numpy as np
import pytest
import torch

from reinforce import process
from reinforce.config import Recipe, RunOptions
from reinforce.errors import MissingExtra
from reinforce.models.open_clip import open_clip
from reinforce.run.worker import Worker
from reinforce.store.store import Store
from tests import tiny
from tests.processes import ROOT
from train.students import hybrid_text


def python(folder: Path, program: str) -> str:
    """What a program prints that is run in a folder of its own, with only this package beside what is installed."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_zarr_opens_a_column_from_any_folder(tmp_path: Path) -> None:
    array = np.linspace(-3, 3, 24).reshape(2, 3, 4).astype(ml_dtypes.bfloat16)
    Store(str(tmp_path / "s.zarr")).commit("00000017", "view/base/openai", array)
    (tmp_path / "empty").mkdir()
    told = python(
        tmp_path / "empty",
        "import zarr, reinforce.store.bfloat16\n"
        'views = zarr.open_array("../s.zarr/00000017/view/base/openai", mode="r")\n'
        "print(views.dtype, views[1].astype(float).tolist())",
    )
    assert told == f"bfloat16 {array[1].astype(float).tolist()}\n"


def test_settings_load_none_of_the_libraries_that_are_changed(tmp_path: Path) -> None:
    told = python(
        tmp_path,
        "import sys, reinforce.config, reinforce.process\n"
        "print([name for name in ('torch', 'zarr', 'numcodecs', 'PIL', 'open_clip', 'ray') if name in sys.modules])",
    )
    assert told == "[]\n"


def test_what_was_checked_is_what_is_pinned() -> None:
    """After a renewal of the pins: run all tests, then write the new versions into reinforce/process.py."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [f"{package}=={version}" for package, version in process.CHECKED.items()] == [
        pin for pin in pins if pin.split("==")[0] in process.CHECKED
    ]


def test_blosc_has_one_thread_or_the_store_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numcodecs.blosc, "use_threads", None)
    process.blosc_in_one_thread()
    assert numcodecs.blosc.use_threads is False
    monkeypatch.delattr(numcodecs.blosc, "use_threads")
    with pytest.raises(MissingExtra, match=r"numcodecs \S+ does not have blosc.use_threads"):
        process.blosc_in_one_thread()


def test_open_clip_builds_text_towers_as_it_is_told_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = []

    def build(embed_dim: int, text_cfg: object, quick_gelu: bool = False, cast_dtype: object = None) -> object:
        built.append(embed_dim)
        return own(embed_dim, text_cfg, quick_gelu, cast_dtype)

    monkeypatch.setattr(open_clip.model, "_build_text_tower", hybrid_text.build_plain)  # its own
    own = process.open_clip_text_tower(open_clip.model, build)
    open_clip.create_model(f"local-dir:{tiny.student(tmp_path / 'student')}", load_weights=False, pretrained_text=False)
    assert built == [12]
    for changed in ({}, {"_build_text_tower": lambda embed_dim, cfg: None}):
        module = ModuleType("model")
        vars(module).update(changed)
        with pytest.raises(MissingExtra, match=r"open_clip_torch \S+ does not have model._build_text_tower\(embed"):
            process.open_clip_text_tower(module, build)
        assert vars(module).get("_build_text_tower") is changed.get("_build_text_tower")


def test_a_worker_on_the_cpu_has_the_threads_of_its_recipe(recipe: Recipe, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        Worker(recipe.but(cpu_threads=before + 1), str(tmp_path / "s"), RunOptions(device="cpu"))
        assert torch.get_num_threads() == before + 1
    finally:
        process.torch_threads(before)


def test_only_errors_are_logged_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("some.library")
    with process.errors_only():
        log.warning("hidden")
        log.error("shown")
    log.warning("shown again")
    assert caplog.messages == ["shown", "shown again"]


@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_is_kept_for_the_next_batch_where_nobody_says_otherwise(environment: dict[str, str], kept: bool) -> None:
    code = (
        "import resource, torch\n"
        "from reinforce import process\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20):\n"
        "        torch.ones(4 << 20, dtype=torch.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "process.keep_memory()\n"
        "faults()\n"
        "print(faults())\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert (int(told.stdout) < 100) == kept  # 20 times 1,024 pages, where they are given back
