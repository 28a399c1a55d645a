"""The report: what it holds and leaves out, that nothing in it can break out, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from audits import Planted, make_tables, write_audit

from clarity import report, schema
from clarity.audit import queries

ROOT = Path(__file__).parent.parent
EVERYTHING = Planted(hard=(1, 3), asymmetry=(0, 2), wrong_labels=4, edge=5, rising=2, lost=1, unreadable=2, nonfinite=1)


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def write(tmp_path: Path, **options: Any) -> tuple[report.Report, str]:
    """The report of one synthetic audit: its figures and its HTML."""
    place = write_audit(
        tmp_path / "audit", make_tables(planted=options.pop("planted", EVERYTHING)), options.pop("model", None)
    )
    made = report.write_report([place], **options)
    return made, Path(made.uri).read_text()


def test_report_tells_the_findings_in_words_and_in_order(tmp_path: Path) -> None:
    made, html = write(tmp_path)
    told = [html.index(f">{finding.title}<") for finding in made.findings]
    assert told == sorted(told) and len(told) >= 8
    assert made.complete and made.size == len(html.encode())


def test_report_is_the_same_each_time(tmp_path: Path, tiny_model: Any) -> None:
    place = write_audit(tmp_path / "audit", make_tables(planted=EVERYTHING), tiny_model)
    pages = []
    for name in ("a.html", "b.html"):
        report.write_report([place], str(tmp_path / name))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_report_shows_original_path_and_counterfactual(tmp_path: Path, tiny_model: Any) -> None:
    _, html = write(tmp_path, model=tiny_model)
    data = data_of(html)
    (image_id, kind), *_ = data["examples"]["1-3"]
    assert kind == "closest" and data["images"][image_id]["x"] >= 0
    audit = data["audits"][0]
    row = dict(zip(data["figures"], audit["rows"][image_id]["3"]))
    assert row["cf"] >= 0 and audit["reconstructions"][image_id] >= 0
    assert len(row["path"]) == len(row["path_prob"]) == report.Bounds().path and row["path_step"] == []
    assert [entry[1] for entry in data["examples"]["1-3"]].count("failed") == 3


def test_report_path_is_the_straight_line_between_the_codes(tmp_path: Path, tiny_model: Any) -> None:
    from clarity.rows import logits_rows

    tables = make_tables()
    place = write_audit(tmp_path / "audit", tables, tiny_model)
    data = data_of(Path(report.write_report([place]).uri).read_text())
    image_id = data["examples"]["0-2"][0][0]
    row = dict(zip(data["figures"], data["audits"][0]["rows"][image_id]["2"]))
    codes = {r["image_id"]: r["z"] for r in tables.codes.select(["image_id", "z"]).to_pylist()}
    pairs = tables.counterfactuals.select(["image_id", "target", "z_cf"]).to_pylist()
    z_cf = next(p["z_cf"] for p in pairs if p["image_id"] == image_id and p["target"] == 2)
    along = np.arange(1, 6)[:, None] / 6
    points = np.array(codes[image_id]) + along * (np.array(z_cf) - np.array(codes[image_id]))
    probs = torch.softmax(logits_rows(tiny_model.ensemble, torch.tensor(points, dtype=torch.float32)), -1).mean(0)
    np.testing.assert_allclose(row["path_prob"], probs[:, 2].numpy(), atol=6e-4)


def test_report_path_is_the_recorded_one_where_the_search_was_traced(tmp_path: Path, tiny_model: Any) -> None:
    tables = make_tables()
    rng = np.random.default_rng(0)
    steps = np.arange(31)
    traces = pa.table(
        {
            "image_id": ["img-00000"] * 31,
            "source": [0] * 31,
            "target": [2] * 31,
            "step": steps,
            "target_prob": np.linspace(0.01, 0.99, 31),
            **{name: np.zeros(31) for name in ("predictive", "aleatoric", "epistemic")},
            "z": rng.normal(0, 1, (31, 5)).tolist(),
        }
    ).cast(schema.traces_schema(5))
    place = write_audit(tmp_path / "audit", tables, tiny_model, traces=traces, trace=1)
    data = data_of(Path(report.write_report([place]).uri).read_text())
    assert "img-00000" in data["lookup"]
    rows = data["audits"][0]["rows"]["img-00000"]
    traced, straight = (dict(zip(data["figures"], rows[target])) for target in ("2", "1"))
    assert traced["path_step"] == [5, 10, 15, 20, 25] and straight["path_step"] == []
    np.testing.assert_allclose(traced["path_prob"], np.linspace(0.01, 0.99, 31)[[5, 10, 15, 20, 25]], atol=6e-4)


def test_report_reads_an_audit_in_either_way(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_audit(tmp_path / "audit", make_tables(planted=EVERYTHING), tiny_model)
    by_files = Path(report.write_report([place]).uri).read_text()
    # As from an object store: DuckDB scans what Arrow reads.
    monkeypatch.setattr(queries, "local_paths", lambda table: table)
    assert Path(report.write_report([place]).uri).read_text() == by_files


def test_report_decodes_the_pictures_that_the_audit_lacks(tmp_path: Path, tiny_model: Any) -> None:
    place = write_audit(tmp_path / "a", make_tables(images="none"), tiny_model, images="none")
    data = data_of(Path(report.write_report([place]).uri).read_text())
    audit = data["audits"][0]
    image_id = data["examples"]["0-2"][0][0]
    row = dict(zip(data["figures"], audit["rows"][image_id]["2"]))
    assert data["images"][image_id]["x"] == -1
    assert row["cf"] >= 0 and audit["reconstructions"][image_id] >= 0 and audit["change"][0][2] >= 0


def test_report_of_codes_alone_has_numbers_and_no_pictures(tmp_path: Path) -> None:
    place = write_audit(tmp_path / "a", make_tables(images="none"), images="none")
    made = report.write_report([place])
    assert made.tiles == 0 and "The audit holds no model" in Path(made.uri).read_text()


@pytest.mark.parametrize("num_classes", [2, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_report_stays_within_its_bounds(tmp_path: Path, num_classes: int, channels: int) -> None:
    tables = make_tables(300, tuple(f"class {i}" for i in range(num_classes)), (channels, 8, 12))
    place = write_audit(tmp_path / "a", tables)
    bounds = report.Bounds(min_tiles=400, max_tiles=400)
    made = report.write_report([place], bounds=bounds)
    # The sample, and what is not a sample: the pictures beside findings, and mean changes where they are kept.
    assert made.tiles <= 400 + 120 + (num_classes**2 if num_classes <= 24 else 0)
    assert made.size < 4e6


def test_report_embeds_the_images_and_pairs_asked_for(tmp_path: Path) -> None:
    tables = make_tables(400, tuple("abcdefghijklmn"))
    place = write_audit(tmp_path / "a", tables)
    bounds = report.Bounds(min_tiles=120, max_tiles=120)
    ids = tables.codes["image_id"].to_pylist()
    before = data_of(Path(report.write_report([place], bounds=bounds).uri).read_text())
    image = next(i for i in ids if i not in before["lookup"])
    pair = next((s, t) for s in range(14) for t in range(14) if s != t and f"{s}-{t}" not in before["examples"])
    names = (tables.class_names[pair[0]], tables.class_names[pair[1]])
    after = data_of(Path(report.write_report([place], images=[image], pairs=[names], bounds=bounds).uri).read_text())
    assert image in after["lookup"] and len(after["audits"][0]["rows"][image]) == 13
    assert f"{pair[0]}-{pair[1]}" in after["examples"]


def test_report_refuses_images_and_classes_it_cannot_find(tmp_path: Path) -> None:
    place = write_audit(tmp_path / "a", make_tables())
    with pytest.raises(ValueError, match=r"no image 'nobody'.*its ids look like img-00000"):
        report.write_report([place], images=["nobody"])
    with pytest.raises(ValueError, match=r"unknown class 'emu'.*choose from ant, bee, cow, dog"):
        report.write_report([place], pairs=[("emu", "ant")])


def test_report_says_what_an_unfinished_audit_lacks(tmp_path: Path) -> None:
    place = write_audit(tmp_path / "a", make_tables(), leave_out=(1,))
    made = report.write_report([place])
    html = Path(made.uri).read_text()
    assert not made.complete and "This audit is unfinished." in html
    assert "1 of 3 shards are not committed, so 40 images of 120 are absent" in html and "Missing: shard 1." in html
    (tmp_path / "a" / "_failures").mkdir()
    (tmp_path / "a" / "_failures" / "shard-00001.json").write_text('{"error": "out of memory"}')
    assert "What failed: shard 1: out of memory." in Path(report.write_report([place]).uri).read_text()


def test_report_of_an_audit_that_has_nothing_yet(tmp_path: Path) -> None:
    place = write_audit(tmp_path / "a", make_tables(), leave_out=(0, 1, 2))
    made = report.write_report([place])
    assert not made.complete and "3 of 3 shards are not committed" in Path(made.uri).read_text()


def test_report_survives_a_model_that_yields_no_numbers(tmp_path: Path, tiny_model: Any) -> None:
    with torch.no_grad():
        for weights in tiny_model.ensemble.weights:
            weights.mul_(1e30)
    place = write_audit(tmp_path / "a", make_tables(planted=Planted(nonfinite=300)), tiny_model)
    data = data_of(Path(report.write_report([place]).uri).read_text())
    image_id = data["examples"]["1-3"][0][0]
    assert dict(zip(data["figures"], data["audits"][0]["rows"][image_id]["3"]))["path_prob"] == [None] * 5


def test_report_sets_the_predictions_handed_in_beside_the_ensemble(tmp_path: Path) -> None:
    _, html = write(tmp_path, planted=Planted(prediction_errors=9))
    part = html[html.index('<section id="predictions"') :].split("</section>")[0]
    assert "sees the same class in 111 (92.5 %)" in part
    assert "your model is right in 92.5 %, the ensemble in 100 %" in part
    data = data_of(html)
    names = ["ant", "bee", "cow", "dog"]
    rows = re.findall(
        r"<tr><td><span.*?data-tile=\"(\d+)\".*?data-tile=\"(\d+)\".*?>(img-\d+)</a></th>\s*<td>(\w+)</td>\s*"
        r"<td>(\w+) <span class=\"quiet-text\">&gt;0.99</span></td>\s*<td>(\w+) ",
        part,
        re.S,
    )
    assert sorted(row[2] for row in rows) == [f"img-{i:05d}" for i in range(9)]
    for tile, cf, image_id, label, prediction, source in rows:
        assert label == source and names.index(prediction) == (names.index(source) + 1) % 4
        row = data["audits"][0]["rows"][image_id][str(names.index(prediction))]
        assert (int(tile), int(cf)) == (data["images"][image_id]["x"], row[data["figures"].index("cf")])
    shares = re.findall(r"<tr><th scope=\"row\">(\w+)</th><td class=\"num\">(\d+)</td>", part)
    assert sum(int(count) for _, count in shares) == 120
    _, html = write(tmp_path / "none")
    assert 'id="predictions"' not in html and "prediction_name" not in html


def test_report_puts_audits_side_by_side(tmp_path: Path) -> None:
    places = [
        write_audit(tmp_path / name, make_tables(planted=planted), method=name)
        for name, planted in (("clarity", Planted()), ("schut", Planted(lost=1)))
    ]
    html = Path(report.write_report(places).uri).read_text()
    data = data_of(html)
    assert [audit["name"] for audit in data["audits"]] == ["clarity", "schut"]
    image_id = data["examples"]["0-1"][0][0]
    assert all(audit["rows"][image_id]["1"] for audit in data["audits"])
    other = write_audit(tmp_path / "other", make_tables(class_names=("ant", "bee", "cow")))
    with pytest.raises(ValueError, match="must share class names"):
        report.write_report([places[0], other])


def test_report_lets_no_name_break_out_of_the_page(tmp_path: Path) -> None:
    names = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "a'b\"c&d", "ü → 漢")
    html = Path(report.write_report([write_audit(tmp_path / "a", make_tables(class_names=names))]).uri).read_text()
    assert "<script>alert" not in html and "<img src=x" not in html
    assert data_of(html)["names"] == list(names)


def test_report_says_what_the_data_left_out(tmp_path: Path) -> None:
    place = write_audit(tmp_path / "a", make_tables(30), left_out={"hidden files": 1234})
    assert "Left out: 1,234 hidden files." in Path(report.write_report([place]).uri).read_text()
    place = write_audit(tmp_path / "b", make_tables(30))
    assert "Left out" not in Path(report.write_report([place]).uri).read_text()


@pytest.mark.parametrize(
    ("source", "place", "split", "name"),
    [
        ("digits", "", "test", "digits, test"),
        ("parquet", "s3://bucket/cats.v2.parquet?region=eu", "all", "cats.v2, all"),
        ("folder", "/data/birds", "train", "birds, train"),
        ("mnist", "/data", None, "mnist"),
    ],
)
def test_report_names_what_was_explained(source: str, place: str, split: str | None, name: str) -> None:
    assert report._named({"source": source, "data": place, "split": split}) == name


def test_report_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    _, html = write(tmp_path)
    assert "default-src 'none'" in html and not re.search(r"""(src|href)=["']?(https?:)?//""", html)


def test_job_says_where_the_page_is_and_what_it_found(tmp_path: Path) -> None:
    place = write_audit(tmp_path / "a", make_tables(planted=EVERYTHING))
    command = [sys.executable, str(ROOT / "jobs" / "report.py"), place, "--out", str(tmp_path / "page.html")]
    run = subprocess.run(
        [*command, "--image", "img-00007"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert "page.html" in run.stdout and "4 images of" in run.stdout and (tmp_path / "page.html").exists()
    run = subprocess.run([*command, "--pair", "ant"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 2 and "expected SOURCE:TARGET, found 'ant'" in run.stderr


# ---- in a browser ----------------------------------------------------------------------------------------------------


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
    place = write_audit(tmp_path / "audit", make_tables(planted=EVERYTHING), tiny_model)
    return Path(report.write_report([place]).uri).as_uri()


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
    """Words of the script that a reader should never see."""
    return re.findall(
        r"\b(?:null|undefined|NaN(?! or infinity)|\[object \w+\])\b",
        driver.execute_script("return document.body.innerText"),
    )


def test_page_loads_without_complaint_or_request(chromium: Any, page: str) -> None:
    open_page(chromium, page)
    assert slips(chromium) == []
    assert complaints(chromium) == [] and requests(chromium, page) == []
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")


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
    places = [
        write_audit(tmp_path / name, make_tables(planted=planted), tiny_model, method=name)
        for name, planted in (("clarity", Planted()), ("schut", EVERYTHING))
    ]
    open_page(chromium, Path(report.write_report(places).uri).as_uri())
    assert complaints(chromium) == [] and len(chromium.find_elements("css selector", "#map table")) == 2
    assert slips(chromium) == []
    click(chromium, chromium.find_element("css selector", '#map td[data-s="1"][data-t="3"][data-a="1"]'))
    tags = [e.text for e in chromium.find_elements("css selector", "#gallery article:first-of-type .audit-tag")]
    assert tags[:2] == ["clarity", "schut"]
    # As many figures under each heading of the first screen, whichever the audit.
    rows = chromium.find_elements("css selector", ".masthead tbody tr")
    assert len({len(row.find_elements("css selector", "td")) for row in rows}) == 1
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_page_marks_the_cells_of_few_pairs(chromium: Any, tmp_path: Path) -> None:
    for number, marked in ((12, 12), (40, 0)):  # three pairs a cell, and ten
        made = report.write_report([write_audit(tmp_path / f"{number}", make_tables(number))])
        open_page(chromium, Path(made.uri).as_uri())
        assert len(chromium.find_elements("css selector", "#map td.few")) == marked
        assert ("fewer than 5 pairs" in chromium.find_element("id", "legend").text) == bool(marked)
        assert slips(chromium) == []


@pytest.mark.parametrize("width", [360, 820, 2200])
def test_page_fits_every_width(chromium: Any, page: str, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        open_page(chromium, page)
        assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
    made = report.write_report([write_audit(tmp_path / "a", tables)])
    open_page(chromium, Path(made.uri).as_uri())
    assert complaints(chromium) == []
    assert chromium.execute_script("return performance.getEntriesByName('clarity-interactive')[0].startTime") < 8000
    chromium.execute_script('document.querySelector(\'#map td[data-s="3"][data-t="70"]\').click()')
    assert chromium.find_element("id", "gallery-title").text == "class number 3 → class number 70"
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")
