"""A folder of broken and odd tars in a whole run: no crash, each named with its true reason, counts balance."""

from pathlib import Path

from reinforce.check.info import info, quarantine
from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import Status
from reinforce.run import driver
from tests import broken


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
