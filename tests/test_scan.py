"""Every form of a scan is its definition: values and gradients, in float64, to 1e-9 of the largest; long decays too."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.students import plain_scans, scan

TOLERANCE = 1e-9


def inputs(batch: int, length: int, heads: int, strength: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C, D with 5 channels a head and 3 states; at strength 1, Mamba's own range of decays."""
    torch.manual_seed(length)
    x = torch.randn(batch, length, heads, 5, dtype=dtype)
    dt = torch.rand(batch, length, heads, dtype=dtype) * 0.1
    a = -torch.rand(heads, dtype=dtype) * 16 * strength
    b, c = torch.randn(2, batch, length, 3, dtype=dtype)
    d = torch.randn(heads, dtype=dtype)
    return [t.requires_grad_() for t in (x, dt, a, b, c, d)]


def values_and_gradients(form: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    y = form(*args)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), args, materialize_grads=True)]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference in any of them, of its largest value; nan and infinity are the largest of all."""
    ratios = [(a - b).abs().max() / b.abs().max().clamp_min(1e-6) for a, b in zip(got, expected, strict=True)]
    return float(torch.stack(ratios).nan_to_num(nan=torch.inf).max())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 21), st.integers(1, 3), st.sampled_from([0.0, 1.0, 1e3]), st.sampled_from([1, 4])
)
def test_forms_of_ssd_agree(batch: int, length: int, heads: int, strength: float, chunk: int) -> None:
    args = inputs(batch, length, heads, strength)
    expected = values_and_gradients(plain_scans.ssd_sequential, args)
    assert distance(values_and_gradients(plain_scans.ssd_product, args), expected) < TOLERANCE
    chunks = values_and_gradients(lambda *args: plain_scans.ssd_chunks(*args, chunk=chunk), args)
    assert distance(chunks, expected) < TOLERANCE
    with torch.no_grad():  # there numbers are written over others
        assert distance([plain_scans.ssd_chunks(*args, chunk=chunk)], expected[:1]) < TOLERANCE


@pytest.mark.parametrize("strength", [1.0, 1e3])
def test_no_factor_is_a_denormal_number(strength: float) -> None:
    """A CPU takes a hundred times as long with those."""
    _, dt, a, *_ = (t.detach() for t in inputs(1, 256, 2, strength, torch.float32))
    log_decays = (dt * a).mT
    until = log_decays.cumsum(-1)
    assert until.min() < -100
    factors = [plain_scans._decays(until, until - log_decays, dt.mT.log()), plain_scans._decays_across(log_decays)]
    with torch.no_grad():
        factors.append(plain_scans._decays(until, until - log_decays, dt.mT.log()))
    for factor in factors:
        assert not ((factor > 0) & (factor < torch.finfo(torch.float32).tiny)).any()


def test_steps_of_zero_neither_add_nor_decay() -> None:
    args = inputs(2, 13, 2, 1.0)
    with torch.no_grad():
        args[1][:, 3:9] = 0
    expected = plain_scans.ssd_sequential(*args)
    assert distance([plain_scans.ssd_chunks(*args, chunk=4)], [expected]) < TOLERANCE


def test_a_batch_of_none_has_no_answers() -> None:
    args = [t[:0] if t.ndim > 1 else t for t in inputs(1, 9, 2, 1.0)]
    assert plain_scans.ssd_chunks(*args, chunk=4).shape == args[0].shape


def test_ssd_sees_as_far_back_as_ahead() -> None:
    args = inputs(2, 9, 2, 1.0)
    backwards = [t.flip(1) if t.ndim > 1 else t for t in args]
    causal = args[:5]
    assert not torch.allclose(plain_scans.ssd_causal(*backwards[:5]).flip(1), plain_scans.ssd_causal(*causal))
    assert torch.allclose(plain_scans.ssd_sequential(*backwards).flip(1), plain_scans.ssd_sequential(*args))


def test_one_decay_is_written_out() -> None:
    """Two tokens, one head, one channel, one state, by hand."""
    x, dt, a, b, c, d = (
        torch.tensor(v, dtype=torch.float64) for v in ([2.0, 3.0], [0.5, 0.25], [-2.0], [1.0, 4.0], [5, 6], [7.0])
    )
    y = plain_scans.ssd_product(x.view(1, 2, 1, 1), dt.view(1, 2, 1), a, b.view(1, 2, 1), c.view(1, 2, 1), d).flatten()
    first = 5 * 1 * 0.5 * 2 + torch.e ** (-2 * 0.5) * 5 * 4 * 0.25 * 3 + 7 * 2
    second = 6 * 4 * 0.25 * 3 + torch.e ** (-2 * 0.25) * 6 * 1 * 0.5 * 2 + 7 * 3
    assert y.tolist() == pytest.approx([first, second], rel=1e-12)


@pytest.mark.parametrize(("strength", "tolerance"), [(1.0, 1e-4), (1e3, 1e-2)])
def test_float32_stays_finite_and_near_float64(strength: float, tolerance: float) -> None:
    """A sum of log-decays of 1e5 leaves few digits to its differences."""
    args = inputs(1, 256, 2, strength)
    expected = values_and_gradients(plain_scans.ssd_product, args)
    narrow = [t.detach().float().requires_grad_() for t in args]
    got = [t.double() for t in values_and_gradients(plain_scans.ssd_product, narrow)]
    assert distance(got, expected) < tolerance


def test_ssd_takes_chunks_where_the_sequence_is_long() -> None:
    device = torch.device("cpu")
    assert [scan.ssd_path(device, length) for length in (1, plain_scans.CHUNK, plain_scans.CHUNK + 1)] == [
        "product"
    ] * 2 + ["chunks"]
    assert scan.ssd_path(torch.device("cuda"), 256) == "product"
    args = inputs(1, plain_scans.CHUNK + 7, 2, 1.0)
    assert distance([scan.ssd(*args).detach()], [plain_scans.ssd_product(*args).detach()]) < TOLERANCE
    assert scan.describe(device) == (
        "selective scan: sequential, without gradients doubling; ssd up to 64 tokens: product, beyond: chunks"
    )


def test_without_kernels_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "kernel", lambda where: None)
    device = torch.device("cuda")
    assert (scan.selective_scan_path(device), scan.ssd_path(device, 1024)) == ("sequential", "chunks")
    assert "mamba-ssm" in scan.describe(device)


def test_two_causal_kernels_make_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of mamba-ssm's signature: what is its own is compared on a GPU, by benchmarks/kernels.py."""

    def chunk_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
        assert b.shape == c.shape == (*x.shape[:2], 1, 3) and chunk_size == scan.KERNEL_CHUNK
        return plain_scans.ssd_causal(x, dt, a, b.squeeze(2), c.squeeze(2))

    monkeypatch.setattr(scan, "kernel", lambda where: chunk_scan)
    assert scan.ssd_path(torch.device("cuda"), 257) == "kernel"
    args = inputs(2, 9, 2, 1.0)
    expected = values_and_gradients(plain_scans.ssd_product, args)
    assert distance(values_and_gradients(scan.ssd_kernel, args), expected) < TOLERANCE


def test_a_kernel_is_found_in_a_package_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mamba-ssm is where its extension was not built: its `__init__` fails, its Triton modules do not."""
    for path, text in {
        "half_built/__init__.py": "import an_extension_that_was_not_built",
        "half_built/ops/__init__.py": "",
        "half_built/ops/part.py": "def of_the_package(): return 7",
        "half_built/ops/whole.py": "from half_built.ops.part import of_the_package as scan",
        "half_built/ops/compiled.py": "import an_extension_that_was_not_built",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = scan.kernel("half_built.ops.whole:scan")
    assert found is not None and found() == 7
    assert "half_built" not in sys.modules  # whoever imports it is told why it fails
    assert scan.kernel("half_built.ops.compiled:scan") is None
    assert scan.kernel("not_there_at_all.ops:scan") is None


def test_mamba_ssm_is_not_imported_without_cuda() -> None:
    scan.ssd(*inputs(1, plain_scans.CHUNK + 1, 1, 1.0))
    scan.describe(torch.device("cpu"))
    assert "mamba_ssm" not in sys.modules


@pytest.mark.parametrize("form", [plain_scans.selective_scan_sequential, plain_scans.selective_scan_doubling])
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.booleans(), st.booleans())
def test_selective_scan_is_its_recurrence(
    form: Callable[..., Tensor], batch: int, length: int, gated: bool, softplus: bool
) -> None:
    """Against the recurrence written for one channel and one state at a time."""
    torch.manual_seed(length)
    channels, states = 4, 3
    u, delta, z = torch.randn(3, batch, channels, length, dtype=torch.float64)
    a = -torch.rand(channels, states, dtype=torch.float64)
    b, c = torch.randn(2, batch, states, length, dtype=torch.float64)
    skip, bias = torch.randn(2, channels, dtype=torch.float64)
    args = [t.requires_grad_() for t in (u, delta, a, b, c, skip, bias, z)]

    def recurrence(u, delta, a, b, c, skip, bias, z):  # type: ignore[no-untyped-def]
        steps = delta + bias[:, None]
        steps = torch.log1p(steps.exp()) if softplus else steps
        y = skip[:, None] * u
        for n in range(states):
            h = torch.zeros_like(u[..., 0])
            for i in range(length):
                h = (steps[..., i] * a[:, n]).exp() * h + steps[..., i] * u[..., i] * b[:, n, None, i]
                y = y + torch.nn.functional.one_hot(torch.tensor(i), length) * (c[:, n, None, i] * h)[..., None]
        return y * (z * torch.sigmoid(z) if gated else 1 + 0 * z)

    def ours(u, delta, a, b, c, skip, bias, z):  # type: ignore[no-untyped-def]
        y = form(u, delta, a, b, c, skip, z if gated else None, bias, softplus)
        return y if gated else y + 0 * z

    assert distance(values_and_gradients(ours, args), values_and_gradients(recurrence, args)) < TOLERANCE


def test_selective_scan_doubles_where_no_gradient_is_asked_for() -> None:
    cpu = torch.device("cpu")
    assert scan.selective_scan_path(cpu) == "sequential"
    with torch.no_grad():
        assert scan.selective_scan_path(cpu) == "doubling"


@pytest.mark.parametrize("length", [1, 2, 3, 8, 61, 64])
@pytest.mark.parametrize("dim", [-1, 1])
def test_a_running_sum_by_doubling_is_one(length: int, dim: int) -> None:
    shape = (2, length, 3) if dim == 1 else (2, 3, length)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(plain_scans.running_sum_by_doubling(x, dim), x.cumsum(dim), rtol=1e-12, atol=1e-12)
