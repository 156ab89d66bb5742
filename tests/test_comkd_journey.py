"""The journey of ComKD-CLIP: its domains, its table, and, slowly, all of it."""

import json
from pathlib import Path

import pytest

from pipelines.experiments import comkd, domains
from reinforce.data.shards import expand, read_parts
from reinforce.errors import ConfigError
from tests import tiny
from train.comkd.adapt import load_adaptation
from train.comkd.base_to_novel import num_base
from train.config import load_training
from train.evaluation.sets import EvalSet


def keys(folder: Path, split: str) -> set[str]:
    return {key for shard in expand(f"{folder}/{split}/*.tar") for key, _ in read_parts(shard, ("jpg",))}


def test_the_emoji_are_a_domain(tmp_path: Path) -> None:
    domain = domains.of_emoji(tmp_path)
    assert domain.classes == sorted(domain.classes) and "Emoticons" in domain.classes
    assert 0 < num_base(len(domain.classes)) < len(domain.classes)
    train, test = keys(domain.labelled, "train"), keys(domain.labelled, "test")
    assert len(train) > 900 and not train & test
    assert keys(tmp_path, "captioned") == train
    of_class = [label for _, label in EvalSet(str(domain.labelled)).samples()]
    assert set(of_class) == set(range(len(domain.classes)))
    assert max(map(of_class.count, set(of_class))) <= domains.MAX_TEST_SAMPLES
    for shifted in domain.shifted.values():
        assert keys(shifted, "test") == test and EvalSet(str(shifted)).classnames == domain.classes
    written = tiny.tree(tmp_path)
    assert domains.of_emoji(tmp_path) == domain and tiny.tree(tmp_path) == written


def test_data_that_are_not_there_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say where the data are: --data PREFIX"):
        domains.of_labelled(str(tmp_path / "nothing"), tmp_path / "out")


def test_the_recipe_is_one_of_both_stages() -> None:
    assert load_adaptation("comkd").classes == "all"
    trained = load_training("comkd", ["comkd.align=0"])
    assert trained.comkd and not trained.comkd.align and trained.comkd.class_set == comkd.CLASS_SET


def test_the_table_has_mean_and_spread_of_the_seeds() -> None:
    def scores(base: float) -> dict[str, dict[str, float]]:
        return {"test": {"base": base, "novel": 0.5, "hm": 0.5, "acc1": 0.25}, "grey": {"acc1": 0.125}}

    rows = {"zero-shot student": [0.2]} | {name: [0.3, 0.4] for name in comkd.variants(7)}
    found = {
        "teacher": {name: {"frozen": s, "adapted": s} for name, s in scores(0.1).items()},
        "rows": {
            row: {name: [scores(base)[name] for base in bases] for name in ("test", "grey")}
            for row, bases in rows.items()
        },
    }
    lines = comkd.markdown(found).splitlines()
    assert lines[0] == "| | base | novel | HM | test, top-1 | grey, top-1 |"
    assert lines[2] == "| teacher, frozen | 10.0 | 50.0 | 50.0 | 25.0 | 12.5 |"
    assert lines[-2] == "| full | 35.0 ± 7.1 | 50.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 |"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_a_clip_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--out", str(tmp_path / "j"), "--seeds", "1", "--steps", "2", "--json"]
    comkd.main([*asked, "--eval", f"again={tmp_path / 'j/data/labelled'}"])
    table = json.loads(capsys.readouterr().out)
    assert set(table["rows"]) == {"zero-shot student", *comkd.variants(7)}
    for row in table["rows"].values():
        assert row["again"] == row["test"] and {"base", "novel", "hm"} <= set(row["test"][0])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "j").rglob("*.safetensors")}
    comkd.main([*asked, "--eval", f"again={tmp_path / 'j/data/labelled'}"])
    assert json.loads(capsys.readouterr().out) == table
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(ConfigError, match="belongs to a training with other settings"):
        comkd.main([*asked, "--steps", "3"])
