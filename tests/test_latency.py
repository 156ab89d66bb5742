"""Rows for every tower, size and batch; what is counted is what is done; folded, in eval mode."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from reinforce.errors import ConfigError
from train import flops, latency, students
from train.students import mamba, scan


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WARM_UP", 1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_rows_for_every_tower_size_and_batch(two_threads: None, caplog: pytest.LogCaptureFixture) -> None:
    rows = latency.measure(["mamba_tiny", "vit_tiny"], sizes_px=[64, 96], batches=[1, 4], repeats=2)
    kinds = [(row.student, row.tower, row.size, row.batch) for row in rows]
    assert kinds == [
        *(("mamba_tiny", "image", size, batch) for size in (64, 96) for batch in (1, 4)),
        *(("mamba_tiny", "text", 24, batch) for batch in (1, 4)),
        *(("vit_tiny", tower, size, batch) for tower, size in (("image", 64), ("text", 24)) for batch in (1, 4)),
    ]
    assert "vit_tiny takes no images of 96 px" in caplog.text
    for row in rows:
        assert row.ms_quartiles and row.ms_min and row.ms_median
        assert 0 < row.ms_min <= row.ms_quartiles[0] <= row.ms_median <= row.ms_quartiles[1]
        assert f"torch {torch.__version__}" in row.machine and "2 threads" in row.machine
    text = latency.table(rows)
    assert text.count("mamba_tiny") == 6 and "0.90" in text and "eager, 2 repeats" in text
    json.dumps([asdict(row) for row in rows])


def test_without_a_size_a_student_is_measured_at_its_own(tmp_path: Path) -> None:
    """A row names what was asked for: trained students all lie in folders that are called `student`."""
    folder = tmp_path / "first" / "student"
    students.create("mamba_tiny").save(folder)
    rows = latency.measure([str(folder), "mobileclip_s0_tiny"], batches=[1], repeats=2, towers=["image"])
    assert [(row.student, row.size) for row in rows] == [(str(folder), 64), ("mobileclip_s0_tiny", 64)]


def test_params_are_those_of_the_folded_towers() -> None:
    model = students.create("mobileclip_s0_tiny").model
    image, text = latency.measure(["mobileclip_s0_tiny"], sizes_px=[64], batches=[1], repeats=2, precision="bf16")
    assert image.params < sum(p.numel() for p in model.visual.parameters())
    assert text.params < sum(p.numel() for p in model.text.parameters())
    assert image.precision == "bf16"


def test_what_is_measured_is_folded_and_runs_as_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def times(group: list[latency._Job], compiled: bool) -> list[list[float]]:
        for job in group:
            norms = [m for m in job.tower.modules() if isinstance(m, nn.BatchNorm1d)]
            seen.append((job.tower.training, len(norms), job.inputs.shape[0], job.inputs.dtype, compiled))
        return [[1.0, 2.0, 4.0] for _ in group]

    monkeypatch.setattr(latency, "_times", times)
    rows = latency.measure(["mobileclip_s0_tiny"], [64], [5], precision="bf16", compiled=True)
    assert seen == [(False, 0, 5, torch.bfloat16, True), (False, 0, 5, torch.int64, True)]
    assert (rows[0].ms_median, rows[0].ms_min, rows[0].ms_quartiles) == (2.0, 1.0, (1.5, 3.0))


def test_every_row_is_compiled_anew_for_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives up on code that it has compiled for many models, and then runs it uncompiled."""
    calls: list[object] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda tower, **how: calls.append(how) or tower)
    rows = latency.measure(["mamba_tiny"], [64], [1, 2], repeats=2, compiled=True, towers=["image"])
    assert [(row.tower, row.batch) for row in rows] == [("image", 1), ("image", 2)]
    assert calls == ["reset", {"dynamic": False}] * 2


@pytest.mark.parametrize(("nchw", "turned"), [(2.0, True), (0.5, False), (None, True)])
def test_the_faster_layout_of_memory_counts(nchw: float | None, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(group: list[latency._Job], compiled: bool) -> list[list[float] | None]:
        for job in group:
            if job.row.tower == "image":
                assert job.inputs.is_contiguous(memory_format=torch.channels_last) == job.row.channels_last
        return [[1.0, 1.0] if job.row.channels_last else [nchw, nchw] if nchw else None for job in group]

    monkeypatch.setattr(latency, "_times", times)
    [image] = latency.measure(["mobileclip_s0_tiny"], [64], [2], towers=["image"])
    assert (image.ms_median, image.channels_last) == (1.0 if turned else nchw, turned)
    [text] = latency.measure(["mobileclip_s0_tiny"], [64], [2], towers=["text"])
    assert (text.ms_median, text.channels_last) == (nchw, False)


def test_students_are_timed_in_turns() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "ab"]
    times = latency._wall_times(calls, 3)
    assert "".join(order) == "ab" + 3 * "ab"  # one call each warms up
    assert [len(its or []) for its in times] == [3, 3]


def test_counts_are_those_of_known_work() -> None:
    """A linear layer of 3 to 5 on 2 rows is 2 * 2 * 3 * 5; its activation writes 2 * 5."""
    gflops, pointwise = flops.count(nn.Sequential(nn.Linear(3, 5), nn.GELU()), torch.zeros(2, 3))
    assert (round(gflops * 1e9), round(pointwise * 1e9)) == (60, 10)


def test_the_recurrence_of_a_scan_is_counted() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decays = nn.Parameter(torch.zeros(3, 8))  # D, N
            self.states = nn.Parameter(torch.zeros(2, 8, 4))  # b, N, L

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return scan.selective_scan(u, u, self.decays, self.states, self.states)

    _, pointwise = flops.count(Scan(), torch.zeros(2, 3, 4))
    numbers = 2 * 3 * 4 * 8  # b D L N: delta A, its exponential, delta u B, and the recurrence after its first step
    others = 2 * 3 * 4 + 2 * 8 * 4  # delta u, and a copy of C
    assert round(pointwise * 1e9) == 3 * numbers + numbers * 3 // 4 + others


def test_memory_that_does_not_suffice_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one student; the others are timed."""
    forward = mamba.MambaEncoder.forward

    def full(self: object, images: torch.Tensor) -> torch.Tensor:
        if images.is_meta:  # it is counted there
            return forward(self, images)  # type: ignore[arg-type]
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(mamba.MambaEncoder, "forward", full)
    rows = latency.measure(["mamba_tiny", "vit_tiny"], [64], [1], repeats=2)
    assert rows[0].ms_median is None and rows[0].gflops > 0
    assert all(row.ms_median for row in rows[1:])
    assert "out of memory" in latency.table(rows)


def test_a_name_that_is_no_student_is_an_error() -> None:
    with pytest.raises(ConfigError, match="mamba_tiny"):
        latency.measure(["mamba_tinny"])


@pytest.mark.slow
def test_compiled_towers_are_measured() -> None:
    rows = latency.measure(["mamba_tiny"], [64], [1], repeats=2, compiled=True)
    assert all(row.compiled and row.ms_median for row in rows)
