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
from torch import Tensor, nn

from reinforce.models import vit
from tests.processes import ROOT

here = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="make test-kernels runs these",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def test_without_triton_blocks_do_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "reinforce.models.kernels", raising=False)
    assert vit._kernels.__wrapped__() is None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    from reinforce.models import kernels

    monkeypatch.setattr(kernels, "processors", lambda device: 3)  # fewer than tiles, so that each makes some
    return kernels


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.abs().max())


@here
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num", "width"), [(1, 32), (5, 48), (3, 1024)])
def test_the_norm(kernels: Any, num: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.LayerNorm(width)
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    x, offset = (3 * torch.randn(num, width) + 2).to(dtype), torch.randn(width)
    with torch.no_grad():
        expected = vit.norm(x.double(), offset.double(), layer.double())
        got = kernels.norm(x, offset, layer.weight.to(dtype), layer.bias.to(dtype), layer.eps)
    assert got.dtype == dtype and off(got, expected) < TOLERANCE[dtype]


@here
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num", "depth", "width"), [(3, 8, 16), (300, 72, 520), (128, 64, 256)])
def test_the_product_with_silu(kernels: Any, num: int, depth: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(depth, width), torch.randn(num, depth)
    with torch.no_grad():
        narrow = [t.to(dtype) for t in (x, layer.weight, layer.bias)]
        expected = nn.functional.silu(nn.functional.linear(*(t.double() for t in narrow)))
        got = kernels.linear_silu(*narrow)
    assert got.dtype == dtype and off(got, expected) < TOLERANCE[dtype]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reinforce.models import kernels as k

def compiled(function, signature, constants, **options):
    signature = {name: signature.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(function, signature, constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    print(function.__name__, len(binary.asm["cubin"]) > 1000, ptx.count("wgmma.mma"), binary.metadata.shared)

pointers = {name: "*bf16" for name in ("x", "weight", "bias", "out")}
compiled(k._norm, pointers | {"offset": "*fp32", "width": "i32", "eps": "fp32"}, {"WIDE": 1024}, num_warps=4)
tiles = {"x": (k.ROWS, k.DEPTH), "weight": (k.COLUMNS, k.DEPTH), "out": (k.ROWS, k.COLUMNS // 2)}
tiles = {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in tiles.items()}
numbers = {"bias": "*bf16", "num": "i32", "width": "i32", "depth": "i32"}
sizes = {"PROGRAMS": 132, "GROUP": k.GROUP, "ROWS": k.ROWS, "COLUMNS": k.COLUMNS, "DEPTH": k.DEPTH}
compiled(k._linear_silu, tiles | numbers, sizes, num_warps=k.WARPS, num_stages=k.STAGES)
"""


@here
def test_they_compile_for_a_card() -> None:
    """For an H100, on any machine: Triton brings its own assembler. The product uses the card's matrix units, and fits
    in its shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (norm, whole, _, _), (product, too, products, shared) = (line.split() for line in done.stdout.splitlines())
    assert (norm, whole, product, too) == ("_norm", "True", "_linear_silu", "True")
    assert int(products) > 0 and int(shared) <= 227 * 1024
