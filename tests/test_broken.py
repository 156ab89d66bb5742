"""A folder of broken and odd tars in a whole run: no crash, each named with its true reason, counts balance."""

import json
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reinforce.__main__ import app
from reinforce.check.info import info, quarantine, refused
from reinforce.config import Recipe, RunOptions
from reinforce.data import tars
from reinforce.data.status import Status
from reinforce.errors import ConfigError, NotCommitted, StoreError
from reinforce.run import driver
from reinforce.store.store import Store
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
    assert set(failed) == {name for name, case in expected.items() if case.error or not case.samples}
    for name, reason in failed.items():
        assert (expected[name].error or "holds no sample") in reason and name in reason
    assert all(failure.final for failure in report.failed)  # to read them again would find the same

    whole = {name: case for name, case in expected.items() if case.samples and not case.error}
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
        "mute": (
            [("1.jpg", picture), ("1.json", b'{"title": "x"}')],
            "under title: name the right ones with --set caption_keys=KEY",
            {"missing_caption": 1},
        ),
        "classes": ([("1.jpg", picture), ("1.cls", b"3")], "num_original_captions=0", {"missing_caption": 1}),
    }
    for name, (members, told, counts) in cases.items():
        tars.write(str(tmp_path / f"{name}.tar"), members)
        [failure] = driver.run(
            str(tmp_path / f"{name}.tar"), str(tmp_path / name), recipe, RunOptions(workers="0", device="cpu")
        ).failed
        assert failure.quarantined == counts and told in failure.reason and failure.final, failure
        assert failure.first.keys() == {*counts, *failure.noted}
        with pytest.raises(StoreError, match=f"(?s)no store at .*{told}"):  # where it is, can be asked later on, too
            info(str(tmp_path / name))
        assert refused(str(tmp_path / name))[name]["quarantined"] == counts
        config = TrainConfig(shards=str(tmp_path / f"{name}.tar"), distill=0)
        with pytest.raises(ConfigError, match=f"none can be used: .*{told}"):
            source_of(config)


def test_a_refused_shard_is_told_until_it_is_in_the_store(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve pictures of which names make one sample; then the same, renamed."""
    store, tar = str(tmp_path / "s"), str(tmp_path / "0.tar")
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    pictures = [tiny.picture(i) for i in range(12)]
    command = ["run", f"{tmp_path}/*.tar", "--store", store, "--recipe", f"{tmp_path}/recipe.json"]
    command += ["--workers", "0", "--device", "cpu"]
    tars.write(
        tar, [(f"Track 2.{i}.{of}", part) for i in range(12) for of, part in (("jpg", pictures[i]), ("txt", b"x"))]
    )
    tiny.tar(tmp_path / "1.tar", 4)
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 1 and "They stay so until this is mended" in ran.stdout and "Run again" not in ran.stdout
    assert "12 dots_in_name, as Track 2.0.jpg: is a picture in a name of several dots" in ran.stdout
    told = json.loads(CliRunner().invoke(app, ["info", store, "--quarantine", "--json"]).stdout)
    assert told["refused_shards"] == ["0"] and told["shards"] == 1
    assert told["refused"]["0"]["quarantined"] == {"missing_image": 1}
    assert told["refused"]["0"]["noted"] == {"dots_in_name": 12}
    assert CliRunner().invoke(app, ["verify", store]).exit_code == 0  # the note is no fault of the store
    with pytest.raises(NotCommitted, match=r"lacks 0, which was refused; leave it out: 1 of 1 samples are invalid"):
        source_of(TrainConfig(shards=f"{tmp_path}/*.tar", store=store))
    tars.write(tar, [(f"{i}.{of}", part) for i in range(12) for of, part in (("jpg", pictures[i]), ("txt", b"x"))])
    assert CliRunner().invoke(app, command).exit_code == 0
    assert refused(store) == {} and not list((tmp_path / "s").glob("__refused__"))


def test_what_is_in_a_tar_and_not_used_is_counted(recipe: Recipe, tmp_path: Path) -> None:
    good = [("a.jpg", tiny.picture(0)), ("a.txt", b"one\ntwo"), ("b.jpg", tiny.picture(1)), ("b.json", b'["x", "y"]')]
    others = [("a.npy", b""), ("c.png.bak", b""), ("README", b""), ("d/._a.jpg", b"")]
    odd = [broken.special("e", tarfile.SYMTYPE), broken.special("f.jpg", tarfile.FIFOTYPE)]
    (tmp_path / "0.tar").write_bytes(broken.tar(*good, *others, *((member, b"") for member in odd)))
    options = RunOptions(workers="0", device="cpu", max_invalid=1)
    asked = recipe.but(num_original_captions=2)
    report = driver.run(str(tmp_path / "0.tar"), str(tmp_path / "s"), asked, options)
    assert report.noted == {
        "fewer_captions": 1,
        "hidden": 1,
        "no_extension": 1,
        "several_lines": 1,
        "special_file": 1,
        "symbolic_link": 1,
    }
    assert report.quarantined == {"duplicate_key": 1, "missing_image": 2}
    assert report.first["several_lines"].startswith("a.txt: ") and "caption_lines=true" in report.first["several_lines"]
    [report] = [driver.run(str(tmp_path / "0.tar"), str(tmp_path / "t"), asked.but(caption_lines=True), options)]
    assert "several_lines" not in report.noted and "fewer_captions" not in report.noted
    source = source_of(TrainConfig(shards=str(tmp_path / "0.tar"), distill=0, caption_lines=True))  # a training, too
    assert [source.open("0", epoch).captions["original"][:2] for epoch in range(2)] == [["one", "x"], ["two", "y"]]
    captions = Store(str(tmp_path / "t")).read("0", "text/original/caption")[:, :3]
    assert captions.T.tolist()[:2] == [["one", "two"], ["x", "y"]]
