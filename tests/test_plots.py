"""Figures: they show what they are given, write the same files each time, and leave the session's style alone."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from audits import Planted, make_tables, write_audit
from PIL import Image

from clarity import figure, plots
from clarity.audit.queries import PAIR_FIGURES, connect
from clarity.audit.read import read_audit
from clarity.images import decode_png

C, H, W, K = 3, 8, 12, 4
SHARE = PAIR_FIGURES["strict_validity"]


def image(value: float) -> np.ndarray:
    return np.full((C, H, W), value, dtype=np.float32)


PICTURES = {
    "counterfactual": lambda: plots.counterfactual(image(0.2), image(0.7), source="cat", target="dog", note="p = 1"),
    "path_strip": lambda: plots.path_strip([image(0.1), image(0.9)], [0, 7], [0.1, 0.99], target="dog"),
    "class_pair_map": lambda: plots.class_pair_map(np.where(np.eye(K, dtype=bool), np.nan, 0.5), "abcd", SHARE),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_renders_the_same_bytes_each_time(name: str) -> None:
    picture = PICTURES[name]()
    first = picture._repr_png_()
    shown = Image.open(BytesIO(first))
    assert min(shown.size) > 50 and np.asarray(shown.convert("L")).std() > 1
    assert first == PICTURES[name]().render() and picture.render("pdf").startswith(b"%PDF-")
    assert picture.get_size_inches()[0] <= 2 * figure.FULL_WIDTH


def test_importing_touches_nothing_global() -> None:
    code = (
        "import matplotlib, sys; before = dict(matplotlib.rcParams); import clarity.plots as p; "
        "p.path_strip([__import__('numpy').zeros((1, 2, 2))], [0], [0.5], target='a')._repr_png_(); "
        "assert 'matplotlib.pyplot' not in sys.modules; "
        "assert {k: v for k, v in matplotlib.rcParams.items() if k != 'backend'} "
        "== {k: v for k, v in before.items() if k != 'backend'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_style_of_the_session_does_not_reach_a_picture() -> None:
    plain = PICTURES["path_strip"]().render()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert PICTURES["path_strip"]().render() == plain


def test_difference_is_grey_where_nothing_changed() -> None:
    changed = image(0.5)
    changed[:, 2, 3] = 1.0
    picture = plots.counterfactual(image(0.5), changed, source="a", target="b")
    shown = picture.axes[-1].images[0].get_array()
    assert shown.shape == (H, W) and shown[2, 3] == pytest.approx(0.5) and np.count_nonzero(shown) == 1
    assert picture.axes[-1].images[0].get_clim() == (-1, 1)


def test_bytes_and_floats_are_drawn_alike() -> None:
    byte = np.full((1, H, W), 51, dtype=np.uint8)
    assert np.allclose(plots.displayed(byte), 0.2) and plots.displayed(byte).shape == (H, W)
    assert plots.displayed(image(2.0)).max() == 1 and plots.displayed(image(0.3)).shape == (H, W, 3)


def test_class_pairs_are_those_of_the_view(tmp_path: Path) -> None:
    tables = make_tables(planted=Planted(hard=(1, 3), lost=2))
    opened = read_audit(write_audit(tmp_path / "audit", tables))
    view = connect(tables.codes, tables.counterfactuals).sql("FROM class_pair_figures WHERE source IS NOT NULL").df()
    for what in PAIR_FIGURES.keys() - {"judge_agreement", "confirmed_share"}:  # neither judge nor checks here
        shown = plots.class_pairs(opened, what).axes[0].images[0].get_array()
        assert np.ma.getmaskarray(shown).tolist() == np.eye(4, dtype=bool).tolist()
        assert shown[view.source, view.target].tolist() == pytest.approx(view[what].tolist())
    with pytest.raises(ValueError, match="choose from strict_validity"):
        plots.class_pairs(opened, "steps")


def test_counterfactual_of_an_audit_shows_itself(tmp_path: Path, tiny_model: Any) -> None:
    tables = make_tables()
    opened = read_audit(write_audit(tmp_path / "audit", tables, tiny_model))
    row = tables.counterfactuals.filter(tables.counterfactuals["target_name"].to_numpy() == "dog").to_pylist()[0]
    found = plots.Counterfactual(opened, row["image_id"], "dog")
    assert found.row["steps"] == row["steps"] and found.code["image_id"] == row["image_id"]
    picture = found.picture()
    assert [ax.get_title() for ax in picture.axes] == [
        "original", "reconstruction", f"{row['source_name']} → dog", "difference",
    ]  # fmt: skip
    stored = decode_png([row["x_cf"]], tables.image_shape)[0, 0] / 255
    assert np.allclose(picture.axes[2].images[0].get_array(), stored)
    assert found._repr_png_().startswith(b"\x89PNG")
    assert "your model" not in picture.axes[2].get_xlabel()
    assert found.path(frames=2).axes[0].texts[0].get_text() == "p(dog) ="
    found.row["prediction_target_prob_final"] = 0.55  # now another model is explained
    assert found.picture().axes[2].get_xlabel().startswith("your model: p(dog) = 0.550, ")
    assert found.path(frames=2).axes[0].texts[0].get_text() == "ensemble: p(dog) ="
    # The search again, by the audit's own model and configuration.
    steps = found.trace["step"].to_pylist()
    assert steps == list(range(len(steps))) and set(found.trace["target"].to_pylist()) == {3}
    strip = found.path(frames=4)
    assert len([ax for ax in strip.axes if ax.images]) == min(4, len(steps))
    assert set(opened.query("closest_to", source="ant", target="dog").column_names) >= {"image_id", "distance"}
    with pytest.raises(ValueError, match=r"(source|target): expected a class of ant, bee, cow, dog, got none"):
        opened.query("closest_to")
    with pytest.raises(ValueError, match="it is classified as"):
        plots.Counterfactual(opened, row["image_id"], row["source_name"])
    with pytest.raises(ValueError, match="no such image"):
        plots.Counterfactual(opened, "nobody", "dog")
    with pytest.raises(ValueError, match="target: expected one of the classes ant, bee, cow, dog, got 'cat'"):
        plots.Counterfactual(opened, row["image_id"], "cat")


def test_picture_draws_long_names_and_formulas_as_they_are() -> None:
    names = ["a" * 300, "$b$", "a" * 299 + "c"]
    picture = plots.class_pair_map(np.eye(3), names, SHARE)
    assert len({label.get_text() for label in picture.axes[0].get_xticklabels()}) == 3
    assert picture.render() and picture.get_tightbbox().width < 2 * figure.FULL_WIDTH
    titled = plots.counterfactual(image(0.2), image(0.7), source="a" * 300, target="$x_{$")
    titled.render()
    boxes = [ax.title.get_window_extent() for ax in titled.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_picture_takes_a_font_that_has_the_letters() -> None:
    picture = plots.counterfactual(image(0.2), image(0.7), source="cat", target="\u1d81")  # STIX comes with matplotlib
    picture.render("png")
    title = picture.axes[1].title
    assert title.get_fontfamily()[0] == "DejaVu Sans" and figure.font_with("\u1d81") in title.get_fontfamily()
    assert figure.font_with("\U0010fffe") is None
