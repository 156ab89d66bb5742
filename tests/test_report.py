"""A store as one page: what is in it, and, in a real browser, that it shows, filters, and runs nothing of a caption."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reinforce.__main__ import app
from reinforce.check import report as page
from reinforce.check import survey as surveys
from reinforce.check.survey import charts, survey
from reinforce.config import Recipe, RunOptions
from reinforce.data import shards
from reinforce.errors import ConfigError, StoreError
from reinforce.run import driver
from reinforce.store.store import Store
from tests import tiny
from tests.processes import here
from train import report as trainings_page
from train.__main__ import app as train_app
from train.config import TrainConfig
from train.trainer import fit

RUN = RunOptions(workers="0", device="cpu", max_invalid=0.9)
HOSTILE = (
    "</script><script>document.title='caught'</script><img src=x onerror=\"document.title='caught'\"> & \u2028 'a'"
)


SHOWN = " ".join(HOSTILE.split())  # captions are kept on one line


def jpeg(seed: int) -> bytes:
    picture = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).resize((160, 120), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two shards: in the second the same picture twice, a hostile caption, and three samples that are set aside."""
    folder = tmp_path_factory.mktemp("report")
    samples = [
        (f"{tar}-{i}", {"jpg": jpeg(10 * tar + i), "txt": f"picture {i} of tar {tar}".encode()})
        for tar in range(2)
        for i in range(6)
    ]
    samples[7][1]["jpg"] = samples[6][1]["jpg"]
    samples[8][1]["txt"] = HOSTILE.encode()
    bad = [("<b>bad</b>", {"jpg": b"<html>", "txt": b"x"}), ("cut", {"jpg": jpeg(50)[:400], "txt": b"x"})]
    bad.append(("no caption", {"jpg": jpeg(51)}))
    shards.write(str(folder / "00000.tar"), samples[:6])
    shards.write(str(folder / "00001.tar"), samples[6:] + bad)
    tars = str(folder / "{00000,00001}.tar")
    driver.run(tars, str(folder / "store"), recipe, RUN)
    return tars, str(folder / "store")


def facts(path: Path) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', path.read_text(), re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def test_what_is_in_it(made: tuple[str, str], recipe: Recipe, tmp_path: Path) -> None:
    tars, store = made
    told = page.report(store, tars, str(tmp_path / "new/r.html"), 8)
    assert (told.samples, told.looked_at) == (8, 12) and told.bytes == (tmp_path / "new/r.html").stat().st_size
    found = facts(tmp_path / "new/r.html")
    assert (found["info"]["valid"], found["info"]["samples"]) == (12, 15)
    assert found["looked_at"] == {"samples": 12, "shards": 2}
    assert {one["reason"] for one in found["quarantine"]} == set(found["info"]["quarantined"])
    assert [(one["key"], bool(one["image"]), bool(one["detail"])) for one in found["quarantine"]] == [
        ("<b>bad</b>", False, True),
        ("cut", False, True),
        ("no caption", False, True),
    ]
    opened = Store(store)
    for sample in found["samples"]:
        assert sample["image"].startswith("data:image/jpeg;base64,") and sample["why"]
        assert len(sample["views"]) == recipe.view_sets["base"].num_views
        for number, view in enumerate(sample["views"]):
            params = opened.read(sample["shard"], "view/base/augment", number)[sample["row"]]
            height, width = sample["size"]
            assert np.allclose(
                view["box"], [params[1] / width, params[0] / height, params[3] / width, params[2] / height], atol=1e-4
            )
            assert view["image"] and len(view["ops"]) == recipe.view_sets["base"].num_ops
        for teacher, of in sample["cosines"].items():
            pair = [
                opened.read(sample["shard"], path, 0)[sample["row"]].astype(float)
                for path in (f"view/base/{teacher}", f"text/coca/{teacher}")
            ]
            assert of["coca"] == pytest.approx(float(pair[0] @ pair[1]), abs=2e-3)
    pair = found["pairs"][0]
    assert pair["same_bytes"] and {found["samples"][i]["key"] for i in pair["samples"]} == {"1-0", "1-1"}


def test_the_same_store_gives_the_same_page(made: tuple[str, str], tmp_path: Path) -> None:
    tars, store = made
    pages = [tmp_path / f"{i}.html" for i in range(3)]
    for path, seed in zip(pages, (0, 0, 1), strict=True):
        page.report(store, tars, str(path), 3, seed)
    assert pages[0].read_bytes() == pages[1].read_bytes() != pages[2].read_bytes()


def test_without_tars_there_are_no_pictures(made: tuple[str, str], tmp_path: Path) -> None:
    page.report(made[1], None, str(tmp_path / "r.html"))
    found = facts(tmp_path / "r.html")
    assert len(found["samples"]) == 12 and not any(sample["image"] for sample in found["samples"])


def test_markup_stays_text_and_the_page_asks_for_nothing(made: tuple[str, str], tmp_path: Path) -> None:
    page.report(made[1], made[0], str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert (
        "</script><script>document" not in text
        and "onerror=" not in text.replace("onerror=\\", "")
        and "\u2028" not in text
    )
    assert SHOWN in [
        caption for sample in facts(tmp_path / "r.html")["samples"] for caption in sample["captions"]["original"]
    ]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_what_cannot_be_shown_is_a_sentence(made: tuple[str, str], recipe: Recipe, tmp_path: Path) -> None:
    _, store = made
    other = tiny.tar(tmp_path / "99999.tar", 3)
    with pytest.raises(ConfigError, match="has none of these shards; give the tars that it was made from"):
        page.report(store, other, str(tmp_path / "r.html"))
    shards.write(str(tmp_path / "00000.tar"), [(f"0-{i}", {"jpg": jpeg(99)[:-50], "txt": b"x"}) for i in range(6)])
    with pytest.raises(ConfigError, match="is not the image that was reinforced"):
        page.report(store, str(tmp_path / "00000.tar"), str(tmp_path / "r.html"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        page.report(store, None, str(tmp_path / "file/r.html"))
    with pytest.raises(StoreError, match="no store at"):
        page.report(str(tmp_path / "nothing"), None, str(tmp_path / "r.html"))
    shutil.copytree(store, tmp_path / "half")
    for path in (tmp_path / "half").glob("*/view/base/conv/zarr.json"):
        path.unlink()
    assert here(app, "report", str(tmp_path / "half"), "-o", str(tmp_path / "r.html"))[0] == 2
    assert not (tmp_path / "r.html").exists()


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_shards_are_looked_at_from_all_over() -> None:
    names = [f"{i:03d}" for i in range(37)]
    spread = surveys._spread(names)
    assert sorted(spread) == names and surveys._spread(["a"]) == ["a"]
    for num in (4, 8, 16):
        places = sorted(names.index(name) for name in spread[:num])
        assert max(np.diff([0, *places, 37])) <= 37 / num * 3


def test_near_duplicates_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(60, 16)).astype(np.float32)
    for i, j in ((3, 40), (5, 6), (20, 59)):
        means[j] = 3 * means[i] + 0.1 * rng.normal(size=16)
    digests = np.arange(60)
    digests[40] = digests[3]
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    cosines = units @ units.T
    expected = {(i, j) for i in range(60) for j in range(i + 1, 60) if cosines[i, j] >= surveys.ALIKE}
    for block in (7, 1024):
        monkeypatch.setattr(surveys, "_BLOCK", block)
        found = surveys._near(means, digests)
        assert {(i, j) for i, j, *_ in found} == expected and len(expected) == 3
        assert [(i, j) for i, j, _, same in found if same] == [(3, 40)] == [found[0][:2]]
        assert found[1][2] >= found[2][2]


def test_disagreement_is_between_ranks() -> None:
    first = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert surveys._disagreement([first, 10 * first], 5).tolist() == [0] * 5
    assert surveys._disagreement([first, -first], 5).tolist() == [1, 0.5, 0, 0.5, 1]
    assert surveys._disagreement([first], 5).tolist() == [0] * 5


def test_histograms_count_all(made: tuple[str, str]) -> None:
    found = survey(Store(made[1]), ["00000", "00001"])
    drawn = {chart["title"]: chart for chart in charts(found)}
    assert list(drawn) == ["Similarity of view 0 and caption 0", "Length of captions", "Shorter side of images"]
    for chart in drawn.values():
        assert all(len(counts) == len(chart["edges"]) - 1 for counts in chart["series"].values())
    assert [sum(counts) for counts in drawn["Similarity of view 0 and caption 0"]["series"].values()] == [12] * 4
    assert {name: sum(of) for name, of in drawn["Length of captions"]["series"].items()} == {"original": 12, "coca": 24}
    assert sum(drawn["Shorter side of images"]["series"]["images"]) == 12


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver_path:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = chromium
    opened = webdriver.Chrome(options=options, service=service.Service(driver_path))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def shown(made: tuple[str, str], browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("page") / "r.html"
    page.report(made[1], made[0], str(path), 12)
    browser.get(path.as_uri())
    return browser


def texts(shown: Any, selector: str) -> list[str]:
    found: list[str] = shown.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )
    return found


@pytest.fixture(scope="module")
def trainings(made: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three: of two weights of the teachers, and one that was stopped."""
    folder = tmp_path_factory.mktemp("trainings")
    student, paths = tiny.student(folder / "student"), [folder / name for name in ("alone", "taught", "stopped")]
    for path, distill in zip(paths, (0.0, 1.0, 1.0), strict=True):
        config = TrainConfig.model_validate(
            {"student": student, "shards": made[0], "store": made[1], "global_batch_size": 6, "streams": 2, "steps": 4}
            | {"precision": "fp32", "workers": 0, "report_to": [], "distill": distill, "log_every_n_steps": 1}
        )
        fit(config, path)
    (paths[2] / "report.json").unlink()
    lines = (paths[2] / "metrics.jsonl").read_text().splitlines(True)
    (paths[2] / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    return paths


def test_trainings_side_by_side(trainings: list[Path], tmp_path: Path) -> None:
    told = trainings_page.report(map(str, trainings), str(tmp_path / "t.html"))
    assert told.trainings == 3 and told.bytes == (tmp_path / "t.html").stat().st_size
    found = facts(tmp_path / "t.html")
    assert [one["name"] for one in found["trainings"]] == ["alone", "taught", "stopped"]
    assert found["differ"] == ["config.distill"]
    assert [len(one["curves"]["loss"]) for one in found["trainings"]] == [4, 4, 2]
    assert [bool(one["report"]) for one in found["trainings"]] == [True, True, False]
    assert found["trainings"][0]["curves"]["loss"][-1] == [4, found["trainings"][0]["report"]["metrics"]["loss"]]


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    points = [[float(step), 1.0] for step in range(1001)]
    thin = trainings_page._thinned(points)
    assert len(thin) <= trainings_page.MOST + 1 and thin[0] == points[0] and thin[-1] == points[-1]
    assert trainings_page._thinned(points[:5]) == points[:5] and trainings_page._thinned([]) == []


def test_a_folder_that_holds_no_training_is_said(trainings: list[Path], tmp_path: Path) -> None:
    code, _, err = here(train_app, "report", str(trainings[0]), str(tmp_path), "-o", str(tmp_path / "t.html"))
    assert code == 2 and "holds no training: config.json cannot be read" in err and not (tmp_path / "t.html").exists()


def test_trainings_in_a_browser(trainings: list[Path], browser: Any, tmp_path: Path) -> None:
    code, out, _ = here(train_app, "report", *map(str, trainings), "-o", str(tmp_path / "t.html"), "--json")
    assert code == 0 and json.loads(out)["trainings"] == 3
    browser.get((tmp_path / "t.html").as_uri())
    assert browser.get_log("browser") == []
    assert texts(browser, "#runs label") == ["alone", "taught", "stopped"]
    assert "goes on" in "".join(texts(browser, "#results td")) and "loss" in texts(browser, "#curves h3")
    drawn = "return document.querySelectorAll('#curves figure:first-child polyline:not(.off)').length"
    assert browser.execute_script(drawn) == 3
    browser.execute_script("document.querySelector('#runs input').click()")
    assert browser.execute_script(drawn) == 2
    assert texts(browser, "#settings > div > table tbody th") == ["config.distill"]


def test_it_shows_all_and_says_no_error(shown: Any, made: tuple[str, str]) -> None:
    assert shown.get_log("browser") == []
    assert texts(shown, "h1") == [made[1]] and len(texts(shown, "#grid article")) == 12
    assert texts(shown, "#count") == ["12 of 12 samples"]
    loaded = "return [...document.images].map((one) => { one.loading = 'eager'; return one.alt.length > 0; })"
    assert all(shown.execute_script(loaded)) and len(texts(shown, "#quarantine article")) == 3
    assert len(texts(shown, "figure svg")) == 3 and "Nothing" not in "".join(texts(shown, "#quarantine p"))


def test_a_hostile_caption_stays_text(shown: Any, made: tuple[str, str]) -> None:
    assert "caught" not in shown.title
    assert any(SHOWN in text for text in texts(shown, "#grid dd"))
    assert "<b>bad</b>" in texts(shown, "#quarantine h3") and not texts(shown, "#quarantine b")
    blocked = "const s = document.createElement('script'); s.textContent = 'document.title = \"caught\"'; "
    blocked += "document.body.append(s)"
    shown.execute_script(blocked)  # nor does the page run what somebody puts into it
    assert "caught" not in shown.title and any(
        "Content Security Policy" in one["message"] for one in shown.get_log("browser")
    )


def test_filters_and_orders(shown: Any) -> None:
    def choose(name: str, value: str) -> list[str]:
        shown.execute_script(
            "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
            "one.dispatchEvent(new Event('input', { bubbles: true }))",
            *(name, value),
        )
        return texts(shown, "#grid article > h3")

    everything = choose("search", "")
    assert choose("search", "PICTURE 1-") == [key for key in everything if key.startswith("1-") and key != "1-2"]
    assert choose("search", "nothing has this") == [] and texts(shown, "#count") == ["0 of 12 samples"]
    assert choose("search", "") == everything
    assert set(choose("show", "near-duplicate")) >= {"1-0", "1-1"} and len(choose("show", "")) == 12
    by_disagreement = choose("order", "teachers disagree")
    said = [float(re.findall(r"[\d.]+", text)[0]) for text in texts(shown, "#grid article > p.faint:last-child")]
    assert sorted(by_disagreement) == sorted(everything) and said == sorted(said, reverse=True)
    assert choose("order", "as chosen") == everything


def test_it_is_used_by_keyboard(shown: Any) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains

    def press(key: str) -> Any:
        keys(shown).send_keys(key).perform()
        return shown.switch_to.active_element

    shown.execute_script("document.activeElement.blur()")
    cards = [f"Sample {key}" for key in texts(shown, "#grid article > h3")]
    assert press("j").get_attribute("aria-label") == cards[0] and press("j").get_attribute("aria-label") == cards[1]
    assert press("k").get_attribute("aria-label") == cards[0]
    view = press("\ue004")  # Tab
    assert view.tag_name == "button"
    assert "View 0" in texts(shown, "#grid article:first-child .ops")[0]
    assert shown.execute_script("return document.querySelectorAll('rect.on').length") == 1
    shown.execute_script("document.activeElement.blur()")
    assert press("/").get_attribute("id") == "search"
    assert press("j").get_attribute("value") == "j"  # typed, and not a command
    shown.execute_script("document.getElementById('search').value = ''; document.activeElement.blur()")


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(shown: Any, width: int, scheme: str) -> None:
    """No scrolling sideways, and text against its ground at 4.5 to 1 at least, as WCAG 2 asks."""
    shown.set_window_size(width, 900)
    shown.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    assert shown.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    colours = shown.execute_script(
        "const of = (selector, what) => getComputedStyle(document.querySelector(selector))[what];"
        "return [['body', 'body'], ['#lead', 'body'], ['article dt', 'article'], ['nav a', 'body']]"
        ".map(([ink, ground]) => [of(ink, 'color'), of(ground, 'backgroundColor')])"
    )
    for ink, ground in colours:
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    dark = contrast(colours[0][1], "rgb(255, 255, 255)") > 10
    assert dark == (scheme == "dark")


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
