"""Our Triton kernels against what they compute, written plainly: in Triton's interpreter, and compiled for a card.

`make test-kernels` installs Triton, which torch for CPUs comes without, and asks it to interpret. The interpreter has
no bfloat16 products.
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reinforce.errors import MissingExtra
from tests.processes import ROOT
from train import students
from train.students import mamba, plain_scans, scan
from train.students.fold import fold

here = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="make test-kernels runs these",
)


def test_without_triton_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "train.students.kernels", raising=False)
    with pytest.raises(MissingExtra, match="need Triton, which comes with torch for CUDA"):
        scan.use_own_kernels()
    assert scan.own is None and scan.own_kernels(torch.device("cuda")) is None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(scan, "own", None)
    scan.use_own_kernels()
    return scan.own


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.abs().max())


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


@here
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 8, 48), (1, 5, 7, 80), (3, 1, 70, 64), (1, 20, 1, 16)])
def test_the_depthwise_convolution(
    kernels: Any, shape: tuple[int, int, int, int], silu: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape[:3], shape[3] + 37).to(dtype)[..., 5 : 5 + shape[3]]  # a part of a wider tensor
    weight, bias = torch.randn(shape[3], 1, 3, 3).to(dtype), torch.randn(shape[3]).to(dtype)
    wide = (t.double() for t in (x.permute(0, 3, 1, 2), weight, bias))
    expected = F.conv2d(*wide, padding=1, groups=shape[3]).permute(0, 2, 3, 1)
    got = kernels.depthwise(x, weight, bias, silu)
    assert got.dtype == dtype and off(got, F.silu(expected) if silu else expected) < TOLERANCE[dtype]
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # its channels do not lie side by side
    assert torch.equal(kernels.depthwise(turned, weight, bias, silu), got)


@here
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "states", "strength"),
    [(2, 64, 2, 32, 16, 1.0), (1, 100, 3, 64, 32, 1.0), (2, 9, 2, 5, 3, 1.0), (1, 130, 1, 32, 16, 100.0)],
)
def test_the_scan(
    kernels: Any,
    batch: int,
    length: int,
    heads: int,
    width: int,
    states: int,
    strength: float,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    together = torch.randn(batch, length, heads * width + 2 * states).to(dtype)
    x, b, c = together.split([heads * width, states, states], dim=-1)
    x = x.view(batch, length, heads, width)
    dt, a = torch.rand(batch, length, heads) * 0.1, -torch.rand(heads) * 16 * strength
    expected = plain_scans.ssd_sequential(*(t.double() for t in (x, dt, a, b, c)))
    got = scan.ssd_tiles(x, dt, a, b, c)
    assert got.dtype == dtype and off(got, expected) < (1 + strength / 10) * TOLERANCE[dtype]


@here
def test_an_encoder_gives_the_same_with_them(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tower = fold(students.create("mamba_tiny").model).visual.eval()
    images, called = torch.rand(2, 3, 64, 64), []

    def anywhere(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        called.append(dtype)
        return None if torch.is_grad_enabled() else kernels

    expected = tower(images).detach().double()
    monkeypatch.setattr(scan, "own_kernels", anywhere)
    monkeypatch.setattr(mamba, "own_kernels", anywhere)
    with torch.no_grad():
        got = tower(images)
    assert len(called) > 10 and 0 < off(got, expected) < 1e-5
    assert tower(images).requires_grad  # with gradients, the definitions


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from train.students import kernels

def compiled(function, kind, **constants):
    names = [name for name in function.arg_names if name not in constants]
    pointers = {"x", "weight", "bias", "out", "b", "c"}
    signature = {name: f"*{kind}" if name in pointers else "i32" for name in names}
    signature |= {name: "*fp32" for name in names if name in ("dt", "until", "before")}
    signature |= {name: "constexpr" for name in constants}
    binary = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    print(function.__name__, kind, len(binary.asm["cubin"]) > 1000, binary.asm["ptx"].count("wgmma") > 0)

for kind in ("bf16", "fp16", "fp32"):
    compiled(kernels._depthwise, kind, SILU=True, DOWN=4, ACROSS=16, WIDE=64)
    compiled(kernels._ssd, kind, WIDTH=64, STATES=32, TILE=64)
"""


@here
def test_they_compile_for_a_card() -> None:
    """For an H100, on any machine: Triton brings its own assembler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.split() for line in done.stdout.splitlines()]
    assert len(told) == 6 and all(whole == "True" for _, _, whole, _ in told), done.stdout
