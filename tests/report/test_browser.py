"""The page in a real browser: mouse, keyboard, themes, widths, screen readers; no request and no complaint."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from audits import EVERYTHING, Planted, make_tables, replaced, with_predictor, write_audit

from clarity.report.page import write_report

FITS = "return document.documentElement.scrollWidth <= innerWidth"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install selenium")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1400,900"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


def wait(driver: Any, script: str, seconds: float = 10) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.05).until(lambda d: d.execute_script("return " + script))


def complaints(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any, page: str) -> list[str]:
    """What the page asked for, itself and the pictures inside it left out."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [p["request"]["url"] for p in asked if p.get("documentURL", "").startswith("file://")]
    return [url for url in urls if not url.startswith(("data:", page))]


@pytest.fixture
def page(tmp_path: Path, tiny_model: Any) -> str:
    uri = write_audit(tmp_path / "audit", make_tables(planted=EVERYTHING), tiny_model)
    return Path(write_report([uri]).uri).as_uri()


def click(driver: Any, element: Any) -> None:
    """A real click of the mouse, on an element moved out from under the bar at the top."""
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def open_page(driver: Any, url: str) -> None:
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(url)
    wait(driver, "performance.getEntriesByName('clarity-interactive').length > 0")


def slips(driver: Any) -> list[str]:
    """Words of the script that a reader should never see; SQL may have them."""
    return re.findall(
        r"\b(?:null|undefined|NaN(?! or infinity)|\[object \w+\])\b",
        driver.execute_script(
            "return document.body.innerText.replace(document.getElementById('queries').innerText, '')"
        ),
    )


def test_page_loads_without_complaint_or_request(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    assert slips(chromium) == []
    assert complaints(chromium) == [] and requests(chromium, page) == []
    assert chromium.execute_script(FITS)


def painted(driver: Any, selector: str) -> bool:
    """Whether every picture below shows something: not one colour, not nothing."""
    return wait(
        driver,
        f"""[...document.querySelectorAll('{selector} canvas.tile')].every((c) => {{
            const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            return p.some((v, i) => i % 4 < 3 && v !== p[i % 4]); }}) && document.querySelector('{selector} canvas')""",
    )


def test_page_opens_a_gallery_by_mouse(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    click(chromium, chromium.find_element("css selector", '#map td[data-s="2"][data-t="1"]'))
    assert chromium.find_element("id", "gallery-title").text == "cow → bee"
    heads = [e.text.lower() for e in chromium.find_elements("css selector", "#gallery h3.kind")]
    assert heads == ["closest", "median", "hardest"]
    assert chromium.current_url.endswith("#pair=2-1") and painted(chromium, "#gallery")
    assert complaints(chromium) == []


def test_page_opens_a_gallery_by_keyboard(chromium: Any, page: str) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(chromium, page)
    chromium.execute_script("document.querySelector('#map td[tabindex=\"0\"]').focus()")
    keys = chromium.switch_to.active_element
    keys.send_keys(Keys.HOME)
    for _ in range(4):
        chromium.switch_to.active_element.send_keys(Keys.ARROW_UP)
    for key in (Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT):
        chromium.switch_to.active_element.send_keys(key)
    assert "bee → dog" in chromium.find_element("id", "readout").text
    chromium.switch_to.active_element.send_keys(Keys.ENTER)
    assert chromium.find_element("id", "gallery-title").text == "bee → dog"
    assert "Failed" in chromium.find_element("id", "gallery").get_attribute("textContent")
    assert chromium.switch_to.active_element.get_attribute("id") == "gallery"
    chromium.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert chromium.switch_to.active_element.get_attribute("data-t") == "3"


def test_page_finds_an_image_or_says_how_to_add_it(chromium: Any, page: str) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(chromium, page)
    wanted = chromium.execute_script("return document.querySelectorAll('#contact button')[5].dataset.id")
    field = chromium.find_element("id", "image-id")
    field.clear()
    field.send_keys(wanted + Keys.ENTER)
    assert f"Image {wanted}" in chromium.find_element("id", "image").text
    assert len(chromium.find_elements("css selector", "#image .towards li")) == 3 and painted(chromium, "#image")
    field.clear()
    field.send_keys("somebody's" + Keys.ENTER)
    text = chromium.find_element("id", "image").text
    assert "not among the images" in text and """--image 'somebody'"'"'s'""" in text


def test_page_calls_no_label_wrong_that_the_model_does_not_know(chromium: Any, tmp_path: Path) -> None:
    tables = replaced(make_tables(30), "codes", "label", pa.nulls(30, pa.int32()))
    open_page(chromium, Path(write_report([write_audit(tmp_path / "a", tables)]).uri).as_uri())
    (facts,) = chromium.find_elements("css selector", "#image .one .facts")
    assert "label" in facts.text and not facts.find_elements("css selector", ".bad")


def test_page_says_whose_probabilities_it_shows(chromium: Any, tmp_path: Path, tiny_model: Any) -> None:
    """Of the ensemble, which leads the search, and of the user's model, where that is explained."""
    mine = with_predictor(make_tables())
    sure = np.where(np.eye(4)[mine.codes["prediction"].to_numpy()] == 1, 0.85, 0.05).astype(np.float32)
    mine.codes = mine.codes.append_column("prediction_probs", pa.array(sure.tolist(), mine.codes["probs"].type))
    for name, tables in (("ensemble", make_tables()), ("yours", mine)):
        made = write_report([write_audit(tmp_path / name, tables, tiny_model)])
        open_page(chromium, Path(made.uri).as_uri())
        click(chromium, chromium.find_element("css selector", '#map td[data-s="1"][data-t="0"]'))
        gallery, image = (chromium.find_element("id", part).text for part in ("gallery", "image"))
        yours = name == "yours"
        assert ("with p(ant) by the ensemble" in gallery) == yours and ("p(ant) by your model" in gallery) == yours
        assert bool(re.search(r"your model\s+(\w+), p\(\1\) 0\.85", image)) == yours
        assert ("Probabilities by the ensemble" in image) == yours and ("classified as" in image) != yours
        assert slips(chromium) == []


def test_page_changes_its_map_and_its_theme(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    before = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    click(chromium, chromium.find_element("id", "theme"))
    assert chromium.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    click(chromium, chromium.find_element("id", "theme"))
    for choice in chromium.find_elements("css selector", "#metrics label"):
        click(chromium, choice)
        title = choice.text
        assert title in chromium.find_element("css selector", "#map table").get_attribute("aria-label")
    assert complaints(chromium) == []


def test_page_follows_its_links(chromium: Any, page: str) -> None:
    open_page(chromium, page + "#pair=0-2")
    assert chromium.find_element("id", "gallery-title").text == "ant → cow"
    chromium.execute_script("document.querySelector('a[href^=\"#image=\"]').click()")
    wanted = chromium.execute_script("return decodeURIComponent(location.hash.slice(7))")
    wait(chromium, f"document.getElementById('image').textContent.includes('Image {wanted}')")


def test_page_shows_audits_side_by_side(chromium: Any, tmp_path: Path, tiny_model: Any) -> None:
    uris = [
        write_audit(tmp_path / name, make_tables(planted=planted), tiny_model, method=name)
        for name, planted in (("clarity", Planted()), ("schut", EVERYTHING))
    ]
    open_page(chromium, Path(write_report(uris).uri).as_uri())
    assert complaints(chromium) == [] and len(chromium.find_elements("css selector", "#map table")) == 2
    assert slips(chromium) == []
    click(chromium, chromium.find_element("css selector", '#map td[data-s="1"][data-t="3"][data-a="1"]'))
    tags = [e.text for e in chromium.find_elements("css selector", "#gallery article:first-of-type .audit-tag")]
    assert tags[:2] == ["clarity", "schut"]
    # As many figures under each heading of the first screen, whichever the audit.
    rows = chromium.find_elements("css selector", ".masthead tbody tr")
    assert len({len(row.find_elements("css selector", "td")) for row in rows}) == 1
    assert chromium.execute_script(FITS)


def test_page_marks_the_cells_of_few_pairs(chromium: Any, tmp_path: Path) -> None:
    for number, marked in ((12, 12), (40, 0)):  # three pairs a cell, and ten
        made = write_report([write_audit(tmp_path / f"{number}", make_tables(number))])
        open_page(chromium, Path(made.uri).as_uri())
        assert len(chromium.find_elements("css selector", "#map td.few")) == marked
        assert ("fewer than 5 pairs" in chromium.find_element("id", "legend").text) == bool(marked)
        assert slips(chromium) == []


@contextlib.contextmanager
def window(driver: Any, width: int) -> Iterator[None]:
    """A window of another width."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [360, 820, 2200])
def test_page_fits_every_width(chromium: Any, page: str, width: int) -> None:
    with window(chromium, width):
        open_page(chromium, page)
        assert chromium.execute_script(FITS)


def test_page_shows_the_pictures_of_a_pair_in_one_row_and_breaks_before_the_path(chromium: Any, page: str) -> None:
    rows = """return [...document.querySelectorAll('#gallery .frames:has(.strip)')].map((frames) =>
        [...frames.children].map((figure) => [figure.offsetTop, Boolean(figure.querySelector('.strip'))]))"""
    with window(chromium, 1280):
        open_page(chromium, page)
        click(chromium, chromium.find_element("css selector", 'td[data-s="2"][data-t="1"]'))
        found = chromium.execute_script(rows)
    assert found
    for figures in found:
        assert [strip for _, strip in figures] == [False] * 4 + [True] and len({top for top, _ in figures[:4]}) == 1


@pytest.mark.parametrize("width", [360, 1300])
def test_page_of_long_names_keeps_its_width(chromium: Any, tmp_path: Path, tiny_model: Any, width: int) -> None:
    names = ("x" * 300, "automobile_red", "automobile_blue", "a name of several words that goes on and on " * 4)
    audit = write_audit(tmp_path / "a", make_tables(class_names=names, planted=EVERYTHING), tiny_model)
    with window(chromium, width):
        open_page(chromium, Path(write_report([audit]).uri).as_uri())
        assert chromium.execute_script(FITS)
        heads = chromium.find_elements("css selector", "#map thead th[scope=col]")
        assert len({head.text for head in heads[:4]}) == 4
        assert {head.get_attribute("title") for head in heads} == set(names)
        click(chromium, chromium.find_element("css selector", 'td[data-s="0"][data-t="3"]'))
        buttons = chromium.find_elements("css selector", '.chip[href^="#pair"], #gallery .small-button')
        shown = [" ".join(button.text.lstrip("⇄ ").split()) for button in buttons]
        pairs = {" ".join(f"{a} → {b}".split()) for a in names for b in names if a != b}
        assert len(shown) > 3 and not {*shown} - pairs - {"To the map"}
        for button in buttons:  # nothing is cut
            assert chromium.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth + 2", button)


def test_page_names_everything_for_a_screen_reader(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    nameless = chromium.execute_script(
        """return [...document.querySelectorAll('canvas.tile, [role=img], button, input, #map td[role=gridcell]')]
        .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length || e.title))
        .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    levels = chromium.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((e) => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert chromium.execute_script(
        "return [...document.querySelectorAll('#map table th')].every((e) => e.hasAttribute('scope'))"
    )


def test_page_of_a_hundred_classes_is_quickly_there(chromium: Any, tmp_path: Path) -> None:
    tables = make_tables(150, tuple(f"class number {i}" for i in range(100)), (3, 16, 12))  # two pairs a cell
    made = write_report([write_audit(tmp_path / "a", tables)])
    open_page(chromium, Path(made.uri).as_uri())
    assert complaints(chromium) == []
    assert chromium.execute_script("return performance.getEntriesByName('clarity-interactive')[0].startTime") < 8000
    chromium.execute_script('document.querySelector(\'#map td[data-s="3"][data-t="70"]\').click()')
    assert chromium.find_element("id", "gallery-title").text == "class number 3 → class number 70"
    assert chromium.execute_script(FITS)
