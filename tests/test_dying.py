"""Killed before or after any single operation on the store, a command is run again, and the store is as if it had never
been killed. The default tests try some of the operations, `make chaos` each of them, on a local disk and on S3."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from reinforce.check.repair import repair
from reinforce.check.upgrade import upgrade
from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from reinforce.store.objects import Objects
from reinforce.store.store import Store
from tests import tiny
from tests.test_format1 import ARCHIVE
from tests.test_s3 import bucket

__all__ = ["bucket"]
RUN = RunOptions(workers="0", device="cpu", max_invalid=1)


class Killed(BaseException):
    pass


class Dying:
    """Counts what writes to a store, and ends the process (as far as a test can) at the `fatal`-th moment. Operations
    have two, just before and just after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments, self.fatal = 0, -1
        for name in ("create", "remove"):
            monkeypatch.setattr(Objects, name, self._deadly(getattr(Objects, name)))

    def _deadly(self, operation: Callable[..., object]) -> Callable[..., object]:
        def deadly(objects: Objects, *arguments: object) -> object:
            self._moment()
            result = operation(objects, *arguments)
            self._moment()
            return result

        return deadly

    def _moment(self) -> None:
        self.moments += 1
        if self.moments == self.fatal:
            raise Killed

    def count(self, work: Callable[[], object]) -> int:
        self.moments, self.fatal = 0, -1
        work()
        return self.moments

    def dies(self, work: Callable[[], object], moment: int) -> None:
        self.moments, self.fatal = 0, moment
        with pytest.raises(Killed):
            work()
        self.fatal = -1


def larger(recipe: Recipe) -> Recipe:
    return recipe.but(teachers={"vit": recipe.teachers["vit"]}, captioners={})


def tree(url: str) -> dict[str, bytes]:
    objects = Objects(url)
    return {path: objects.get(path) for path in objects.tree("") if not path.startswith(".partial")}


def check_every_moment(
    dying: Dying, work: Callable[[str], object], begin: Callable[[str], object], place: str, share: float
) -> None:
    """`begin` makes the store that `work` then works on, each at an address."""
    begin(f"{place}/calm")
    num = dying.count(lambda: work(f"{place}/calm"))
    wanted = tree(f"{place}/calm")
    assert num > 1
    moments = random.Random(0).sample(range(1, num + 1), max(3, round(share * num)))
    for moment in moments:
        url = f"{place}/{moment}"
        begin(url)
        dying.dies(lambda url=url: work(url), moment)
        work(url)
        Objects(url).sweep()
        assert tree(url) == wanted, f"killed at moment {moment} of {num}"
        Objects(place).remove_folder(str(moment))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.chaos)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "stores")
    request.getfixturevalue("bucket")
    return "s3://bucket/stores"


@pytest.fixture(params=[0.1, pytest.param(1.0, marks=pytest.mark.chaos)])
def share(request: pytest.FixtureRequest) -> float:
    """Of the moments that are tried."""
    return float(request.param)


@pytest.mark.timeout(3600)
def test_a_run(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, share: float) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    dying = Dying(monkeypatch)
    check_every_moment(dying, lambda url: driver.run(tar, url, recipe, RUN), lambda url: None, place, share)


@pytest.mark.timeout(3600)
def test_an_extension(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, share: float
) -> None:
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    few, dying = larger(recipe), Dying(monkeypatch)

    def begin(url: str) -> None:
        driver.run(tar, url, few, RUN)

    check_every_moment(dying, lambda url: driver.run(tar, url, recipe, RUN.but(extend=True)), begin, place, share)


@pytest.mark.timeout(3600)
def test_a_repair(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, share: float) -> None:
    """Also of captions, with which their embeddings go."""
    tar = tiny.tar(tmp_path / "00000.tar", 3)
    dying = Dying(monkeypatch)

    def begin(url: str) -> None:
        driver.run(tar, url, recipe, RUN)
        objects = Objects(url)
        for column in ("text/coca/caption", "view/base/vit", "digest"):
            path = f"00000/{column}/zarr.json"
            damaged = objects.get(path).replace(b'"rows": 3', b'"rows": 4')
            objects.remove(path)
            objects.create(path, damaged)

    check_every_moment(dying, lambda url: repair(url, tar, RUN), begin, place, share)


@pytest.mark.timeout(3600)
def test_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, share: float) -> None:
    import tarfile

    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    dying = Dying(monkeypatch)
    work = lambda url: upgrade("store.zarr", url, "00000.tar::00001.tar")  # noqa: E731
    check_every_moment(dying, work, lambda url: None, place, share)
    assert Store(f"{place}/calm").promised().format_version == 2
