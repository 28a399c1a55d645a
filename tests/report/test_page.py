"""The page: what it holds and leaves out, and that no text breaks out of it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from audits import EVERYTHING, Planted, Tables, make_tables, model_card, replaced, with_predictor, write_audit

from clarity.report.page import Report, unbroken, write_report
from clarity.report.text import percent
from clarity.rows import logits_rows

ROOT = Path(__file__).parents[2]


class Page:
    """The report of synthetic audits: its figures, its HTML and the data of its script."""

    def __init__(self, *uris: str, **options: Any) -> None:
        self.made: Report = write_report(uris, **options)
        self.html = Path(self.made.uri).read_text().replace("\u00a0%", " %")
        script = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.html, re.S)
        self.data: dict[str, Any] = json.loads(script.group(1))

    def row(self, image_id: str, target: int, audit: int = 0) -> dict[str, Any]:
        """The row of one pair, by the names of its fields."""
        rows = [dict(zip(self.data["fields"], row)) for row in self.data["audits"][audit]["rows"][image_id]]
        return next(row for row in rows if row["target"] == target)

    def first(self, pair: str) -> dict[str, Any]:
        """The row of the first example of a class pair."""
        return self.row(self.data["examples"][pair][0][0], int(pair[-1]))

    def section(self, start: str, end: str = "</section>") -> str:
        return self.html[self.html.index(start) :].split(end)[0]


def page_of(tmp_path: Path, tables: Tables | None = None, model: Any = None, **options: Any) -> Page:
    """The page of some tables, by default of those in which everything is planted."""
    tables = make_tables(planted=EVERYTHING) if tables is None else tables
    asked = {name: options.pop(name) for name in ("images", "pairs", "max_tiles") if name in options}
    return Page(write_audit(tmp_path / "audit", tables, model, **options), **asked)


def test_report_says_which_probabilities_the_search_asked_for(tmp_path: Path) -> None:
    lead = "until the mean target probability exceeded "
    assert f"{lead}0.99 or 500 steps" in page_of(tmp_path / "one").html
    by_class = page_of(tmp_path / "by_class", checks={"min_target_probs": [0.99, 0.676, 0.9, 0.99]}).html
    assert f"{lead}0.68 to 0.99 (by class) or 500 steps" in by_class


def test_report_says_which_pairs_its_first_figures_count(tmp_path: Path) -> None:
    html = page_of(tmp_path / "some").html
    assert "still seen as the target, converged or not; median probability 0.98" in html
    assert re.search(r"median latent distance [\d.]+; of those that converged", html)
    assert "still seen as the target; median probability" in page_of(tmp_path / "all", make_tables()).html


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ({}, False),
        ({"split": "all"}, True),
        *(({"trained": known}, known is not False) for known in (False, True, None)),
    ],
)
def test_report_clears_no_labels_that_the_ensemble_may_know(tmp_path: Path, dataset: Any, told: bool) -> None:
    page = page_of(tmp_path, make_tables(200), dataset=dataset)
    assert ("the ensemble may have been trained on these labels" in page.html) is told
    lead = page.section('class="lead"', "</p>")
    assert ("Some or all of these images were used to train the model." in lead) is (dataset.get("trained") is True)
    assert ("None of these images was used to train the model." in lead) is (dataset.get("trained") is False)


def test_report_tells_the_findings_in_words_and_in_order(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    told = [page.html.index(f">{finding.title}<") for finding in page.made.findings]
    assert told == sorted(told) and len(told) >= 8
    assert page.made.complete and page.made.size == Path(page.made.uri).stat().st_size
    assert "Attributes that drift: the attributes of" in page.section("<h3>Not checked</h3>", "</div>")
    assert re.search(r"<figcaption>\S+: \w+ → \w+, labelled \w+</figcaption>", page.html)
    # It asks for nothing from outside.
    assert "default-src 'none'" in page.html and not re.search(r"""(src|href)=["']?(https?:)?//""", page.html)


def test_report_shows_original_path_and_counterfactual(tmp_path: Path, tiny_model: Any) -> None:
    page = page_of(tmp_path, model=tiny_model)
    (image_id, kind), *_ = page.data["examples"]["1-3"]
    assert kind == "closest" and page.data["images"][image_id]["x"] >= 0
    row = page.row(image_id, 3)
    assert row["cf"] >= 0 and page.data["audits"][0]["reconstructions"][image_id] >= 0
    assert len(row["path"]) == len(row["path_prob"]) == 5
    assert [entry[1] for entry in page.data["examples"]["1-3"]].count("failed") == 3
    assert Page(str(tmp_path / "audit"), out=str(tmp_path / "again.html")).html == page.html


def test_report_path_is_the_straight_line_between_the_codes(tmp_path: Path, tiny_model: Any) -> None:
    tables = make_tables()
    row = (page := page_of(tmp_path, tables, tiny_model)).first("0-2")
    image_id = page.data["examples"]["0-2"][0][0]
    codes = {r["image_id"]: r["z"] for r in tables.codes.select(["image_id", "z"]).to_pylist()}
    pairs = tables.counterfactuals.select(["image_id", "target", "z_cf"]).to_pylist()
    z_cf = next(p["z_cf"] for p in pairs if p["image_id"] == image_id and p["target"] == 2)
    along = np.arange(1, 6)[:, None] / 6
    points = np.array(codes[image_id]) + along * (np.array(z_cf) - np.array(codes[image_id]))
    probs = torch.softmax(logits_rows(tiny_model.ensemble, torch.tensor(points, dtype=torch.float32)), -1).mean(0)
    np.testing.assert_allclose(row["path_prob"], probs[:, 2].numpy(), atol=6e-4)


def test_report_decodes_the_pictures_that_the_audit_lacks(tmp_path: Path, tiny_model: Any) -> None:
    tables = make_tables(images="none")
    page = Page(write_audit(tmp_path / "a", tables, tiny_model, images="none"))
    image_id, audit = page.data["examples"]["0-2"][0][0], page.data["audits"][0]
    assert page.data["images"][image_id]["x"] == -1
    assert page.first("0-2")["cf"] >= 0 and audit["reconstructions"][image_id] >= 0 and audit["change"][0][2] >= 0
    # Codes alone have numbers and no pictures.
    page = Page(write_audit(tmp_path / "b", tables, images="none"))
    assert page.made.tiles == 0 and "The audit holds no model" in page.html


@pytest.mark.parametrize(("num_classes", "channels"), [(2, 1), (100, 3)])
def test_report_stays_within_its_bounds(tmp_path: Path, num_classes: int, channels: int) -> None:
    tables = make_tables(300, tuple(f"class {i}" for i in range(num_classes)), (channels, 8, 12))
    made = page_of(tmp_path, tables, max_tiles=400).made
    # The sample, and what is not a sample: the pictures beside findings, and mean changes where they are kept.
    assert made.tiles <= 400 + 120 + (num_classes**2 if num_classes <= 24 else 0)
    assert made.size < 4e6


def test_report_embeds_the_images_and_pairs_asked_for(tmp_path: Path) -> None:
    tables = make_tables(400, tuple("abcdefghijklmn"))
    before = page_of(tmp_path, tables, max_tiles=120).data
    image = next(i for i in tables.codes["image_id"].to_pylist() if i not in before["lookup"])
    pair = next((s, t) for s in range(14) for t in range(14) if s != t and f"{s}-{t}" not in before["examples"])
    names = (tables.class_names[pair[0]], tables.class_names[pair[1]])
    uri = str(tmp_path / "audit")
    after = Page(uri, images=[image], pairs=[names], max_tiles=120).data
    assert image in after["lookup"] and len(after["audits"][0]["rows"][image]) == 13
    assert f"{pair[0]}-{pair[1]}" in after["examples"]
    with pytest.raises(ValueError, match=r"no image 'nobody'.*its ids look like img-00000"):
        write_report([uri], images=["nobody"])
    with pytest.raises(ValueError, match=r"unknown class 'emu'.*choose from a, b, c, d"):
        write_report([uri], pairs=[("emu", "a")])


def test_report_says_what_an_unfinished_audit_lacks(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_tables(), leave_out=(1,), dataset={"left_out": {"hidden files": 1234}})
    assert not page.made.complete and "This audit is unfinished." in page.html
    assert "1 of 3 shards are not committed, so 40 images of 120 are absent" in page.html
    assert "Missing: shard 1." in page.html and "Left out: 1,234 hidden files." in page.html
    (tmp_path / "audit" / "_failures").mkdir()
    (tmp_path / "audit" / "_failures" / "shard-00001.json").write_text('{"error": "out of memory"}')
    assert "What failed: shard 1: out of memory." in Page(str(tmp_path / "audit")).html
    page = Page(write_audit(tmp_path / "empty", make_tables(), leave_out=(0, 1, 2)))
    assert not page.made.complete and "3 of 3 shards are not committed" in page.html and "Left out" not in page.html


def test_report_survives_a_model_that_yields_no_numbers(tmp_path: Path, tiny_model: Any) -> None:
    with torch.no_grad():
        for weights in tiny_model.ensemble.weights:
            weights.mul_(1e30)
    page = page_of(tmp_path, make_tables(planted=Planted(nonfinite=300)), tiny_model)
    assert page.first("1-3")["path_prob"] == [None] * 5


def test_report_sets_the_predictions_handed_in_beside_the_ensemble(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_tables(planted=Planted(prediction_errors=9)))
    part = page.section('<section id="predictions"')
    assert "predicts the same class for 111 (92.5 %; 86 % to 96.5 %)" in part
    assert "your model is right in 92.5 % (86 % to 96.5 %), the ensemble in 100 % (97.0 % to 100 %)" in part
    names = ["ant", "bee", "cow", "dog"]
    rows = re.findall(
        r"<tr><td><span.*?data-tile=\"(\d+)\".*?data-tile=\"(\d+)\".*?>(img-\d+)</a></th>\s*<td>(\w+)</td>\s*"
        r"<td>(\w+) <span class=\"quiet-text\">&gt;0.999</span></td>\s*<td>(\w+) ",
        part,
        re.S,
    )
    assert sorted(row[2] for row in rows) == [f"img-{i:05d}" for i in range(9)]
    for tile, cf, image_id, label, prediction, source in rows:
        assert label == source and names.index(prediction) == (names.index(source) + 1) % 4
        row = page.row(image_id, names.index(prediction))
        assert (int(tile), int(cf)) == (page.data["images"][image_id]["x"], row["cf"])
    shares = re.findall(r"<tr><th scope=\"row\">(\w+)</th><td class=\"num\">(\d+)</td>", part)
    assert sum(int(count) for _, count in shares) == 120


def test_report_speaks_of_the_predictor_that_it_explains(tmp_path: Path) -> None:
    page = page_of(tmp_path, with_predictor(make_tables()))
    assert "Rows are the classes that your model predicts" in page.html and "Your own model is explained" in page.html
    part = page.section('<section id="predictions"')
    assert "predicts the same class for 111 (92.5 %" in part and "your model is asked about every picture" in part
    # Links start at the class of the model explained, which is the prediction; nine images of four classes differ.
    assert "0-1" in re.findall(r'href="#pair=(\d-\d)"', part) and part.count("its counterfactual, ") == 9
    assert "confirmed_share" in [kind["key"] for kind in page.data["maps"]]
    assert page.row(page.data["examples"]["0-2"][-1][0], 2)["predicted_prob"] == "0.01\u00a0→\u00a00.90"


def test_report_keeps_its_columns_where_audits_have_other_figures(tmp_path: Path) -> None:
    plain, judged = make_tables(), make_tables()
    judged = replaced(judged, "counterfactuals", "judge_class", judged.counterfactuals["target"].to_numpy())
    uris = [write_audit(tmp_path / name, each, None) for name, each in (("plain", plain), ("judged", judged))]
    for order in (uris, uris[::-1]):
        section = Page(*order).section("The audits side by side", "</table>")
        names = re.findall(r'<th scope="col" class="num">(.*?)</th>', section)
        column = names.index("Judge sees the target")
        for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", section):
            cells = re.findall(r"<td.*?>(.*?)</td>", row)
            assert len(cells) == len(names) and cells[column] == ("100 %" if ">judged<" in row else "–")


def test_report_puts_audits_side_by_side(tmp_path: Path) -> None:
    uris = [
        write_audit(tmp_path / name, make_tables(planted=planted), method=name)
        for name, planted in (("clarity", Planted()), ("schut", Planted(lost=1)))
    ]
    page = Page(*uris)
    assert [audit["name"] for audit in page.data["audits"]] == ["clarity", "schut"]
    lists = page.section("<h3>Checked, nothing found</h3>", "</section>")
    assert lists.count("Every image was used") == 1
    assert "clarity: More than 99 % of the counterfactuals that converged keep" in lists
    image_id = page.data["examples"]["0-1"][0][0]
    assert all(page.row(image_id, 1, audit)["target"] == 1 for audit in range(2))
    other = write_audit(tmp_path / "other", make_tables(class_names=("ant", "bee", "cow")))
    with pytest.raises(ValueError, match="the same class names"):
        write_report([uris[0], other])


def test_report_lets_no_name_break_out_of_the_page(tmp_path: Path) -> None:
    names = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "a'b\"c&d", "ü → 漢")
    page = page_of(tmp_path, make_tables(class_names=names))
    assert "<script>alert" not in page.html and "<img src=x" not in page.html
    assert page.data["names"] == list(names)


def test_report_breaks_no_line_within_a_flag_a_class_pair_or_a_share(tmp_path: Path) -> None:
    told = unbroken("<a> → b: --min-target-prob auto asks for less")
    assert told == "&lt;a&gt;\u00a0→\u00a0b: <code>--min-target-prob auto</code> asks for less"
    assert unbroken("97 % (90 % to 99 %)") == "97\u00a0% (90\u00a0% to 99\u00a0%)"


def test_report_leaves_names_and_ids_as_they_are(tmp_path: Path) -> None:
    tables = make_tables(class_names=("5 % salt", "10 %", "cow", "dog"))
    for name in ("codes", "counterfactuals"):
        ids = pc.binary_join_element_wise(getattr(tables, name)["image_id"], " %.png", "")
        tables = replaced(tables, name, "image_id", ids)
    html = Path(page_of(tmp_path, tables).made.uri).read_text()
    assert '"full_names":["5 % salt","10 %"' in html and '"img-00000 %.png":{' in html
    assert "5 % salt → 10 %</a>" in html and not re.search("img-[0-9]{5}\u00a0", html)


def test_report_begins_with_the_model_of_another_data_set(tmp_path: Path) -> None:
    tables = make_tables(30)
    assert 'class="banner"' not in page_of(tmp_path, tables).html
    strange = replaced(tables, "codes", "label", pa.nulls(30, pa.int32()))
    page = Page(write_audit(tmp_path / "b", strange))
    assert page.html.index("labels of the data is a class of the model") < page.html.index("<h1>")


@pytest.mark.parametrize(("recall", "level"), [(0.28, "no-go"), (0.96, "sound")])
def test_report_begins_with_the_verdict_on_the_model(
    tmp_path: Path, tiny_model: Any, recall: float, level: str
) -> None:
    card = model_card((recall,) * 4, images=50)
    page = page_of(tmp_path, make_tables(), replace(tiny_model, card=card))
    assert [verdict.level for verdict in page.made.verdicts] == [level]
    order = [page.html.index(part) for part in (f'class="verdict {level}"', 'class="keys"', 'id="findings"')]
    assert order == sorted(order) and "Balanced accuracy" in page.html and "200 images" in page.html


def test_report_lists_no_suspicious_labels_where_they_were_not_checked(tmp_path: Path, tiny_model: Any) -> None:
    good, guessing = (replace(tiny_model, card=model_card((recall,) * 4)) for recall in (0.96, 0.28))
    why = {"hard images": "correct labels of hard images would be called wrong", "no-go": "not good enough"}
    for name, wrong, model in (("", 2, good), ("hard images", 30, good), ("no-go", 1, guessing)):
        (tmp_path / name).mkdir(exist_ok=True)
        page = page_of(tmp_path / name, make_tables(100, planted=Planted(wrong_labels=wrong)), model)
        assert ("Most suspicious labels first." in page.html) == (not name)
        assert ("above 0.5 it is among the findings" in page.html) == (not name)
        assert not name or why[name] in page.section('<section id="labels"')


def test_report_writes_shares_with_their_intervals(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_tables(planted=Planted(wrong_labels=4)))
    html = page.html
    assert re.search(r"Classified as labelled</dt><dd>96.7 %\s*<div class=\"sub\">91.7 % to 99.08 %; by the ens", html)
    assert re.search(r"Converged</dt><dd>100 %\s*<div class=\"sub\">97.0 % to 100 %; all reached the requested", html)
    # Of what the audit does not have, nothing is said.
    assert 'class="verdict not-checked"' in html and "because its card has no held-out figures" in html
    assert 'id="predictions"' not in html and "prediction_name" not in html
    assert "Judge sees" not in html and "judge_agreement" not in [kind["key"] for kind in page.data["maps"]]


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
        tables = replaced(tables, "counterfactuals", name, pa.array(values).cast(pairs[name].type))
    page, pairs = page_of(tmp_path, tables), tables.counterfactuals
    seen = (pairs["judge_class"].to_numpy() == pairs["target"].to_numpy()).mean()
    first = re.search(r'class="keys">\s*<div><dt>([^<]*)</dt><dd>([^<]*)<', page.html)
    assert first and first.groups() == ("Judge sees the target", percent(float(seen)))
    assert "judge_agreement" in [kind["key"] for kind in page.data["maps"]]
    row = page.first("0-2")
    assert (row["judge_prob"], row["predicted_prob"]) == ("0.75", "–\u00a0→\u00a00.50")
    assert "Confirmed</dt><dd>95.0 %" in page.html and "passed every check, 12 after a further search" in page.html


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


def test_job_takes_pairs_of_names_with_colons(load_job: Any) -> None:
    names = ("fur:red", "cat", "fur")
    pair = load_job("report").pair
    assert pair("cat:fur:red", names) == ("cat", "fur:red") and pair("fur:red:cat", names) == ("fur:red", "cat")
    assert pair("cat:fur", names) == ("cat", "fur") and pair("a:b", names) == ("a", "b")
