"""A folder of broken and odd tars in a whole run: no crash, each named with its true reason, counts balance."""

from pathlib import Path

import pytest

from reinforce.check.info import info, quarantine
from reinforce.config import Recipe, RunOptions
from reinforce.data import tars
from reinforce.data.shards import Status
from reinforce.errors import ConfigError
from reinforce.run import driver
from tests import broken, tiny
from train.config import TrainConfig
from train.data.mixture import source_of


def test_a_folder_of_broken_tars(recipe: Recipe, tmp_path: Path) -> None:
    expected = broken.make(tmp_path / "tars")
    num_cases = sum(len(case.samples) + bool(case.error) for case in expected.values())
    assert num_cases >= 60
    options = RunOptions(workers="0", device="cpu", max_invalid=1)
    report = driver.run(str(tmp_path / "tars/*.tar"), str(tmp_path / "s"), recipe, options)

    failed = {f"{failure.shard}.tar": failure.reason for failure in report.failed}
    assert set(failed) == {name for name, case in expected.items() if case.error}
    for name, reason in failed.items():
        assert expected[name].error in reason and name in reason

    whole = {name: case for name, case in expected.items() if not case.error}
    samples = [status for case in whole.values() for _, status in case.samples]
    assert (report.done, report.samples) == (len(whole), len(samples))
    assert report.valid == sum(status == Status.GOOD for status in samples)
    assert report.valid + sum(report.quarantined.values()) == report.samples

    listed = [(f"{row['shard']}.tar", row["key"], row["reason"]) for row in quarantine(str(tmp_path / "s"))]
    assert sorted(listed) == sorted(
        (name, key, status.reason)
        for name, case in whole.items()
        for key, status in case.samples
        if status != Status.GOOD
    )
    assert info(str(tmp_path / "s"))["quarantined"] == report.quarantined


def test_a_refused_shard_says_what_is_wrong_with_its_samples(recipe: Recipe, tmp_path: Path) -> None:
    """With counts, the first of each kind, and what to do; in text and in numbers."""
    picture = tiny.picture(0)
    cases: dict[str, tuple[list[tuple[str, bytes]], str, dict[str, int]]] = {
        "dots": (
            [("a b.0 (clean).jpg", picture), ("a b.0 (clean).txt", b"x")],
            "rename the files",
            {"missing_image": 1},
        ),
        "second": ([(f"{i}.input.jpg", picture) for i in range(3)], "rename the files", {"missing_image": 3}),
        "apart": (
            [(f"{i}.{ext}", part) for ext, part in (("jpg", picture), ("txt", b"x")) for i in range(2)],
            "tar --sort=name",
            {"duplicate_key": 2, "missing_caption": 2},
        ),
        "mute": ([("1.jpg", picture), ("1.json", b'{"title": "x"}')], "no captions in .json", {"missing_caption": 1}),
    }
    for name, (members, told, counts) in cases.items():
        tars.write(str(tmp_path / f"{name}.tar"), members)
        [failure] = driver.run(
            str(tmp_path / f"{name}.tar"), str(tmp_path / name), recipe, RunOptions(workers="0", device="cpu")
        ).failed
        assert failure.quarantined == counts and told in failure.reason, failure
        config = TrainConfig(shards=str(tmp_path / f"{name}.tar"), distill=0)
        with pytest.raises(ConfigError, match=f"none can be used: .*{told}"):
            source_of(config)
