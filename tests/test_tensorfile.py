"""A safetensors file, whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from reinforce.models import tensorfile


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    turned = torch.arange(6.0).reshape(2, 3).T
    tensorfile.save({"turned": turned, "learned": nn.Parameter(torch.ones(2)).bfloat16()}, path, {"of": "me"})
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"of", "sha256"}
        assert torch.equal(file.get_tensor("turned"), turned)
        assert file.get_tensor("learned").dtype == torch.bfloat16
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_under_a_prefix_goes_by_the_rest_of_its_name() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    tensors = {"head/a": a, "head/b/head/c": b, "header/a": b, "other/head/a": b, "head": b}
    assert tensorfile.under("head", tensors) == {"a": a, "b/head/c": b}
    assert tensorfile.under("none", tensors) == {}


def test_others_may_read_it_as_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "a.partial").touch(0o600)  # of a write that was cut off
    tensorfile.save({"x": torch.ones(1)}, tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    tensorfile.save({"x": torch.ones(1)}, path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
        tensorfile.save({"x": torch.zeros(9)}, path)
    assert path.read_bytes() == whole
    tensorfile.save({"x": torch.zeros(9)}, path)
    assert path.read_bytes() != whole and len(list(tmp_path.iterdir())) == 1
