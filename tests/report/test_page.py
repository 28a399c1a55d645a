"""The page: what it holds and leaves out, and that no text breaks out of it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from audits import Planted, make_tables, with_predictor, write_audit

from clarity.report import overview
from clarity.report.page import Report, write_report
from clarity.report.text import percent

ROOT = Path(__file__).parents[2]
EVERYTHING = Planted(hard=(1, 3), asymmetry=(0, 2), wrong_labels=4, edge=5, rising=2, lost=1, unreadable=2, nonfinite=1)


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def row_of(data: dict[str, Any], image_id: str, target: int, audit: int = 0) -> dict[str, Any]:
    """The row of one pair, by the names of its fields."""
    rows = [dict(zip(data["fields"], row)) for row in data["audits"][audit]["rows"][image_id]]
    return next(row for row in rows if row["target"] == target)


def write(tmp_path: Path, **options: Any) -> tuple[Report, str]:
    """The report of one synthetic audit: its figures and its HTML."""
    uri = write_audit(
        tmp_path / "audit", make_tables(planted=options.pop("planted", EVERYTHING)), options.pop("model", None)
    )
    made = write_report([uri], **options)
    return made, Path(made.uri).read_text()


def test_report_tells_the_findings_in_words_and_in_order(tmp_path: Path) -> None:
    made, html = write(tmp_path)
    told = [html.index(f">{finding.title}<") for finding in made.findings]
    assert told == sorted(told) and len(told) >= 8
    assert made.complete and made.size == len(html.encode())


def test_report_is_the_same_each_time(tmp_path: Path, tiny_model: Any) -> None:
    uri = write_audit(tmp_path / "audit", make_tables(planted=EVERYTHING), tiny_model)
    pages = []
    for name in ("a.html", "b.html"):
        write_report([uri], str(tmp_path / name))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_report_shows_original_path_and_counterfactual(tmp_path: Path, tiny_model: Any) -> None:
    _, html = write(tmp_path, model=tiny_model)
    data = data_of(html)
    (image_id, kind), *_ = data["examples"]["1-3"]
    assert kind == "closest" and data["images"][image_id]["x"] >= 0
    audit = data["audits"][0]
    row = row_of(data, image_id, 3)
    assert row["cf"] >= 0 and audit["reconstructions"][image_id] >= 0
    assert len(row["path"]) == len(row["path_prob"]) == 5
    assert [entry[1] for entry in data["examples"]["1-3"]].count("failed") == 3


def test_report_path_is_the_straight_line_between_the_codes(tmp_path: Path, tiny_model: Any) -> None:
    from clarity.rows import logits_rows

    tables = make_tables()
    uri = write_audit(tmp_path / "audit", tables, tiny_model)
    data = data_of(Path(write_report([uri]).uri).read_text())
    image_id = data["examples"]["0-2"][0][0]
    row = row_of(data, image_id, 2)
    codes = {r["image_id"]: r["z"] for r in tables.codes.select(["image_id", "z"]).to_pylist()}
    pairs = tables.counterfactuals.select(["image_id", "target", "z_cf"]).to_pylist()
    z_cf = next(p["z_cf"] for p in pairs if p["image_id"] == image_id and p["target"] == 2)
    along = np.arange(1, 6)[:, None] / 6
    points = np.array(codes[image_id]) + along * (np.array(z_cf) - np.array(codes[image_id]))
    probs = torch.softmax(logits_rows(tiny_model.ensemble, torch.tensor(points, dtype=torch.float32)), -1).mean(0)
    np.testing.assert_allclose(row["path_prob"], probs[:, 2].numpy(), atol=6e-4)


def test_report_decodes_the_pictures_that_the_audit_lacks(tmp_path: Path, tiny_model: Any) -> None:
    uri = write_audit(tmp_path / "a", make_tables(images="none"), tiny_model, images="none")
    data = data_of(Path(write_report([uri]).uri).read_text())
    audit = data["audits"][0]
    image_id = data["examples"]["0-2"][0][0]
    row = row_of(data, image_id, 2)
    assert data["images"][image_id]["x"] == -1
    assert row["cf"] >= 0 and audit["reconstructions"][image_id] >= 0 and audit["change"][0][2] >= 0


def test_report_of_codes_alone_has_numbers_and_no_pictures(tmp_path: Path) -> None:
    uri = write_audit(tmp_path / "a", make_tables(images="none"), images="none")
    made = write_report([uri])
    assert made.tiles == 0 and "The audit holds no model" in Path(made.uri).read_text()


@pytest.mark.parametrize("num_classes", [2, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_report_stays_within_its_bounds(tmp_path: Path, num_classes: int, channels: int) -> None:
    tables = make_tables(300, tuple(f"class {i}" for i in range(num_classes)), (channels, 8, 12))
    uri = write_audit(tmp_path / "a", tables)
    made = write_report([uri], max_tiles=400)
    # The sample, and what is not a sample: the pictures beside findings, and mean changes where they are kept.
    assert made.tiles <= 400 + 120 + (num_classes**2 if num_classes <= 24 else 0)
    assert made.size < 4e6


def test_report_embeds_the_images_and_pairs_asked_for(tmp_path: Path) -> None:
    tables = make_tables(400, tuple("abcdefghijklmn"))
    uri = write_audit(tmp_path / "a", tables)
    ids = tables.codes["image_id"].to_pylist()
    before = data_of(Path(write_report([uri], max_tiles=120).uri).read_text())
    image = next(i for i in ids if i not in before["lookup"])
    pair = next((s, t) for s in range(14) for t in range(14) if s != t and f"{s}-{t}" not in before["examples"])
    names = (tables.class_names[pair[0]], tables.class_names[pair[1]])
    after = data_of(Path(write_report([uri], images=[image], pairs=[names], max_tiles=120).uri).read_text())
    assert image in after["lookup"] and len(after["audits"][0]["rows"][image]) == 13
    assert f"{pair[0]}-{pair[1]}" in after["examples"]


def test_report_refuses_images_and_classes_it_cannot_find(tmp_path: Path) -> None:
    uri = write_audit(tmp_path / "a", make_tables())
    with pytest.raises(ValueError, match=r"no image 'nobody'.*its ids look like img-00000"):
        write_report([uri], images=["nobody"])
    with pytest.raises(ValueError, match=r"unknown class 'emu'.*choose from ant, bee, cow, dog"):
        write_report([uri], pairs=[("emu", "ant")])


def test_report_says_what_an_unfinished_audit_lacks(tmp_path: Path) -> None:
    uri = write_audit(tmp_path / "a", make_tables(), leave_out=(1,))
    made = write_report([uri])
    html = Path(made.uri).read_text()
    assert not made.complete and "This audit is unfinished." in html
    assert "1 of 3 shards are not committed, so 40 images of 120 are absent" in html and "Missing: shard 1." in html
    (tmp_path / "a" / "_failures").mkdir()
    (tmp_path / "a" / "_failures" / "shard-00001.json").write_text('{"error": "out of memory"}')
    assert "What failed: shard 1: out of memory." in Path(write_report([uri]).uri).read_text()


def test_report_of_an_audit_that_has_nothing_yet(tmp_path: Path) -> None:
    uri = write_audit(tmp_path / "a", make_tables(), leave_out=(0, 1, 2))
    made = write_report([uri])
    assert not made.complete and "3 of 3 shards are not committed" in Path(made.uri).read_text()


def test_report_survives_a_model_that_yields_no_numbers(tmp_path: Path, tiny_model: Any) -> None:
    with torch.no_grad():
        for weights in tiny_model.ensemble.weights:
            weights.mul_(1e30)
    uri = write_audit(tmp_path / "a", make_tables(planted=Planted(nonfinite=300)), tiny_model)
    data = data_of(Path(write_report([uri]).uri).read_text())
    image_id = data["examples"]["1-3"][0][0]
    assert row_of(data, image_id, 3)["path_prob"] == [None] * 5


def test_report_sets_the_predictions_handed_in_beside_the_ensemble(tmp_path: Path) -> None:
    _, html = write(tmp_path, planted=Planted(prediction_errors=9))
    part = html[html.index('<section id="predictions"') :].split("</section>")[0]
    assert "predicts the same class for 111 (92.5 %; 86 % to 96.5 %)" in part
    assert "your model is right in 92.5 % (86 % to 96.5 %), the ensemble in 100 % (97.0 % to 100 %)" in part
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
        row = row_of(data, image_id, names.index(prediction))
        assert (int(tile), int(cf)) == (data["images"][image_id]["x"], row["cf"])
    shares = re.findall(r"<tr><th scope=\"row\">(\w+)</th><td class=\"num\">(\d+)</td>", part)
    assert sum(int(count) for _, count in shares) == 120
    _, html = write(tmp_path / "none")
    assert 'id="predictions"' not in html and "prediction_name" not in html


def test_report_speaks_of_the_predictor_that_it_explains(tmp_path: Path) -> None:
    html = Path(write_report([write_audit(tmp_path / "a", with_predictor(make_tables()))]).uri).read_text()
    assert "Rows are the classes that your model predicts" in html and "Your own model is explained" in html
    part = html[html.index('<section id="predictions"') :].split("</section>")[0]
    assert "predicts the same class for 111 (92.5 %" in part and "your model is asked about every picture" in part
    # Links start at the class of the model explained, which is the prediction; nine images of four classes differ.
    assert "0-1" in re.findall(r'href="#pair=(\d-\d)"', part) and part.count("its counterfactual, ") == 9
    data = data_of(html)
    assert "confirmed_share" in [kind["key"] for kind in data["maps"]]
    assert row_of(data, data["examples"]["0-2"][-1][0], 2)["predicted_prob"] == "0.01 → 0.90"


def test_report_puts_audits_side_by_side(tmp_path: Path) -> None:
    uris = [
        write_audit(tmp_path / name, make_tables(planted=planted), method=name)
        for name, planted in (("clarity", Planted()), ("schut", Planted(lost=1)))
    ]
    html = Path(write_report(uris).uri).read_text()
    data = data_of(html)
    assert [audit["name"] for audit in data["audits"]] == ["clarity", "schut"]
    image_id = data["examples"]["0-1"][0][0]
    assert all(row_of(data, image_id, 1, audit)["target"] == 1 for audit in range(2))
    other = write_audit(tmp_path / "other", make_tables(class_names=("ant", "bee", "cow")))
    with pytest.raises(ValueError, match="the same class names"):
        write_report([uris[0], other])


def test_report_lets_no_name_break_out_of_the_page(tmp_path: Path) -> None:
    names = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "a'b\"c&d", "ü → 漢")
    html = Path(write_report([write_audit(tmp_path / "a", make_tables(class_names=names))]).uri).read_text()
    assert "<script>alert" not in html and "<img src=x" not in html
    assert data_of(html)["names"] == list(names)


def test_report_says_what_the_data_left_out(tmp_path: Path) -> None:
    uri = write_audit(tmp_path / "a", make_tables(30), left_out={"hidden files": 1234})
    assert "Left out: 1,234 hidden files." in Path(write_report([uri]).uri).read_text()
    uri = write_audit(tmp_path / "b", make_tables(30))
    assert "Left out" not in Path(write_report([uri]).uri).read_text()


def test_report_begins_with_the_model_of_another_data_set(tmp_path: Path) -> None:
    tables = make_tables(30)
    uri = write_audit(tmp_path / "a", tables)
    assert 'class="banner"' not in Path(write_report([uri]).uri).read_text()
    index = tables.codes.column_names.index("label")
    nothing = pa.nulls(len(tables.codes), pa.int32())
    strange = tables.codes.set_column(index, tables.codes.schema.field("label"), nothing)
    uri = write_audit(tmp_path / "b", dataclasses.replace(tables, codes=strange))
    page = Path(write_report([uri]).uri).read_text()
    assert page.index("labels of the data is a class of the model") < page.index("<h1>")


@pytest.mark.parametrize(
    ("source", "uri", "split", "name"),
    [
        ("digits", "", "test", "digits, test"),
        ("parquet", "s3://bucket/cats.v2.parquet?region=eu", "all", "cats.v2, all"),
        ("folder", "/data/birds", "train", "birds, train"),
        ("mnist", "/data", None, "mnist"),
    ],
)
def test_report_names_what_was_explained(source: str, uri: str, split: str | None, name: str) -> None:
    assert overview.dataset_name({"source": source, "data": uri, "split": split}) == name


def test_report_begins_with_the_verdict_on_the_model(tmp_path: Path, tiny_model: Any) -> None:
    html = Path(write_report([write_audit(tmp_path / "none", make_tables())]).uri).read_text()
    assert 'class="verdict not-checked"' in html and "because its card has no held-out figures" in html
    for correct, level in ((14, "no-go"), (48, "sound")):
        per_class = {name: {"images": 50, "correct": correct} for name in tiny_model.class_names}
        card = {"evaluation": {"images": 200, "correct": 4 * correct, "per_class": per_class}}
        model = replace(tiny_model, card=card)
        made = write_report([write_audit(tmp_path / level, make_tables(), model)])
        html = Path(made.uri).read_text()
        assert [verdict.level for verdict in made.verdicts] == [level]
        assert html.index(f'class="verdict {level}"') < html.index('class="keys"') < html.index('id="findings"')
        assert "Balanced accuracy" in html and "200 images" in html


def test_report_says_what_was_not_checked_and_why(tmp_path: Path) -> None:
    _, html = write(tmp_path)
    part = html[html.index("<h3>Not checked</h3>") :].split("</div>")[0]
    assert "not checked, because" in part


def test_report_writes_shares_with_their_intervals(tmp_path: Path) -> None:
    _, html = write(tmp_path, planted=Planted(wrong_labels=4))
    assert re.search(r"Classified as labelled</dt><dd>96.7 %\s*<div class=\"sub\">91.7 % to 99.08 %; 4 are not", html)
    assert re.search(r"Strict validity</dt><dd>100 %\s*<div class=\"sub\">97.0 % to 100 %; all converged", html)


def test_report_shows_what_judge_and_checks_say_of_the_counterfactuals(tmp_path: Path) -> None:
    tables = make_tables()
    pairs = tables.counterfactuals
    for name, values in (
        ("judge_class", np.where(np.arange(len(pairs)) < 36, 0, pairs["target"].to_numpy())),
        ("judge_target_prob", np.full(len(pairs), 0.75)),
        ("confirmed", np.arange(len(pairs)) >= 18),
        ("rungs", np.where(np.arange(len(pairs)) < 30, 1, 0)),
        ("prediction_target_prob_final", np.full(len(pairs), 0.5)),
    ):
        column = pa.array(values).cast(pairs[name].type)
        pairs = pairs.set_column(pairs.schema.get_field_index(name), name, column)
    html = Path(write_report([write_audit(tmp_path / "a", replace(tables, counterfactuals=pairs))]).uri).read_text()
    seen = (pairs["judge_class"].to_numpy() == pairs["target"].to_numpy()).mean()
    first = re.search(r'class="keys">\s*<div><dt>([^<]*)</dt><dd>([^<]*)<', html)
    assert first and first.groups() == ("Judge sees the target", percent(float(seen)))
    data = data_of(html)
    assert "judge_agreement" in [kind["key"] for kind in data["maps"]]
    assert row_of(data, data["examples"]["0-2"][0][0], 2)["judge_prob"] == "0.75"
    assert "Confirmed</dt><dd>95.0 %" in html and "passed every check, 30 after a further search" in html
    assert row_of(data, data["examples"]["0-2"][0][0], 2)["predicted_prob"] == "– → 0.50"
    _, html = write(tmp_path / "none")
    assert "Judge sees" not in html and "judge_agreement" not in [kind["key"] for kind in data_of(html)["maps"]]


def test_report_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    _, html = write(tmp_path)
    assert "default-src 'none'" in html and not re.search(r"""(src|href)=["']?(https?:)?//""", html)


def test_job_says_where_the_page_is_and_what_it_found(tmp_path: Path) -> None:
    uri = write_audit(tmp_path / "a", make_tables(planted=EVERYTHING))
    command = [sys.executable, str(ROOT / "jobs" / "report.py"), uri, "--out", str(tmp_path / "page.html")]
    run = subprocess.run(
        [*command, "--image", "img-00007"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert "page.html" in run.stdout and "4 images of" in run.stdout and (tmp_path / "page.html").exists()
    run = subprocess.run([*command, "--pair", "ant"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 2 and "expected SOURCE:TARGET, got 'ant'" in run.stderr
