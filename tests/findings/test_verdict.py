"""The verdict on made-up model cards."""

import re
from pathlib import Path
from typing import Any

import pytest
from audits import model_card as card

from clarity.findings.verdict import BLURRED, MIN_UPDATES, RARE, REMEDY, TOO_SHORT, verdict
from clarity.training.loops import VAETraining


def test_verdict_is_sound_for_a_good_model() -> None:
    found = verdict(card())
    assert found.level == "sound" and not found.reasons
    assert [row[0] for row in found.classes] == ["ant", "bee", "cow", "dog"]
    assert found.classes[0][1].startswith("95.0 % (89 % to") and found.classes[0][2:] == ("0.90", "0.990", "")
    shown = {name: value for name, value, _ in found.figures}
    assert shown["Baseline"] == "90 %" and shown["Calibration error"] == "3.1 %"
    assert shown["Reconstruction error"] == "20 %"


@pytest.mark.parametrize(
    ("made", "level", "reason"),
    [
        (card((0.28, 0.27, 0.25, 0.3)), "no-go", "may be no more than the 25 % of always naming one class"),
        (card((0.95, 0.9, 0.2, 0.9)), "with care", "It may recognise 1 class no better than by guessing: “cow”."),
        (card((0.95, 0.3, 0.2, 0.9)), "no-go", "may recognise 2 classes no better than by guessing: “bee” and “cow”"),
        (card(baseline=0.99), "sound", ""),
        (card() | {"data": {"held_out_trained": 0}}, "sound", ""),
        (card() | {"data": {"held_out_trained": 3}}, "with care", "trained on images that it is measured on"),
        (card(copies=8), "sound", ""),
        (card(copies=9), "with care", "At least 2.2 % of the held-out images have copies in its training"),
        (card((0.85, 0.85, 0.85, 0.85), baseline=0.92), "with care", "separates the classes. A longer code"),
        (card((0.85, 0.85, 0.85, 0.85), 0.92, error=0.31), "with care", "7 points behind logistic regression on"),
        (card((0.85, 0.85, 0.85, 0.85), 0.92, error=0.31), "with care", "the VAE is worse than a linear code"),
        (card(judge=(0.9, 0.79)), "with care", "90 % of the images, but only 79 % of their reconstructions"),
        (card(judge=(0.9, 0.81)), "sound", ""),
        (card(error=0.6), "with care", "60 % of the mean image's error"),
        (card(p90=(0.99, 0.72, 0.99, 0.99)), "with care", "1 class is out of reach (“bee”)"),
    ],
)
def test_verdict_has_documented_cuts(made: dict[str, Any], level: str, reason: str) -> None:
    found = verdict(made)
    assert found.level == level and (reason in " ".join(found.reasons))
    assert bool(found.reasons) == (level != "sound")


def test_verdict_knows_a_first_look_and_a_model_of_other_data() -> None:
    short = card() | {"vae_updates": 300}
    (reason,) = verdict(short).reasons
    assert reason == "Its VAE was trained for only 300 updates (default: at least 1,200): a first look."
    assert VAETraining().min_updates == MIN_UPDATES
    assert verdict(short | {"vae_updates": 1_200}).level == "sound"
    found = verdict(short, foreign_labels=True)
    assert found.level == "no-go" and "none of the labels of the data is one of its classes" in found.sentence


def test_verdict_advises_flags_that_exist() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    flags = re.findall(r"--[a-z-]+", REMEDY + TOO_SHORT + RARE + BLURRED)
    assert len(flags) == 8 and all(f"- `{flag}`" in reference for flag in flags)


@pytest.mark.parametrize(
    ("images", "rare"), [({"ant": 49, "bee": 100}, True), ({"ant": 50, "bee": 100}, False), ({}, False)]
)
def test_verdict_is_with_care_where_one_of_two_classes_has_the_errors(images: dict[str, int], rare: bool) -> None:
    made = card((0.4, 0.98, 0, 0)) | {"data": {"per_class": images}}
    made["evaluation"]["per_class"] = {name: made["evaluation"]["per_class"][name] for name in ("ant", "bee")}
    found = verdict(made)
    assert found.level == "with care" and "may recognise 1 class no better than by guessing" in found.sentence
    assert (RARE in found.sentence) == rare


def test_verdict_keeps_every_reason_and_leads_with_the_worst() -> None:
    found = verdict(card((0.95, 0.9, 0.2, 0.9), baseline=0.95, error=0.7, p90=(0.5, 0.99, 0.99, 0.99)))
    assert len(found.reasons) == 4 and "because it may recognise 1 class no better" in found.sentence
    assert found.classes[2][4] == "maybe no better than guessing" and found.classes[0][4] == "out of reach"


@pytest.mark.parametrize("made", [{}, {"metrics": {}}])
def test_verdict_of_a_card_without_figures_is_not_checked(made: dict[str, Any]) -> None:
    found = verdict(made)
    assert (
        found.level == "not checked" and "was not checked, because its card has no held-out figures" in found.sentence
    )


def test_verdict_leaves_out_classes_without_images() -> None:
    made = card(p90=(0.99, 0.99, 0.99, None))
    made["evaluation"]["per_class"]["dog"] = {"images": 0, "correct": 0}
    assert [row[0] for row in verdict(made).classes] == ["ant", "bee", "cow"] and verdict(made).level == "sound"


UNMEASURED = "another file or function, for which it was not measured"


def fidelity(codes: float = 0.99, reconstructing: float = 0.99) -> dict[str, Any]:
    shares = {"codes": codes, "reconstructions": 0.98, "perturbed": 0.97, "reconstructing": reconstructing}
    return {"images": 500, **{name: {"agreement": share, "kl": 0.1} for name, share in shares.items()}}


@pytest.mark.parametrize(
    ("told", "level", "reason"),
    [
        (fidelity(), "sound", ""),
        (fidelity(codes=0.8), "with care", "predicts the same class as your model on only 80 % of the images"),
        (fidelity(reconstructing=0.8), "with care", "keeps its answer on only 80 % of the reconstructions"),
        (fidelity(reconstructing=0.4), "no-go", "keeps its answer on only 40 % of the reconstructions"),
    ],
)
def test_verdict_says_how_far_the_ensemble_speaks_for_the_predictor(
    told: dict[str, Any], level: str, reason: str
) -> None:
    labelled = {"correct": 450, "images": 500}
    for made in ({"predictor": told}, {**card(), "predictor": told}):
        found = verdict(made)
        assert found.level == level and reason in " ".join(found.reasons)
        assert ("Changed by the reconstruction", "of your model's answers") in [(a, c) for a, _, c in found.figures]
        ours, theirs = (f"{whose} accuracy" for whose in ("Ensemble's", "Your model's"))
        figures = [(a, b) for a, b, _ in verdict({**made, "predictor": told | {"labelled": labelled}}).figures]
        assert (theirs, "90 %") in figures and (ours in dict(figures)) == ("evaluation" in made)
    assert verdict({"predictor": {"name": "asked of nobody"}}).level == "not checked"


def test_verdict_says_nothing_of_a_predictor_by_the_figures_of_another() -> None:
    told = {**fidelity(codes=0.8, reconstructing=0.4), "name": "mine.onnx", "digest": "a"}
    assert verdict({**card(), "predictor": told}, predictor="a").level == "no-go"
    found = verdict({**card(), "predictor": told}, predictor="b")
    assert found.level == "with care"
    assert found.reasons == (f"Clarity's model learned from mine.onnx; yours is {UNMEASURED}.",)
    assert not {"Agreement with your model", "Changed by the reconstruction"} & {name for name, *_ in found.figures}
    sound = verdict(card(), predictor="b")
    assert sound.level == "sound" and sound.sentence.endswith("against an audit of Clarity's model.")
    short = {**card(), "predictor": fidelity(), "vae_updates": 9}
    assert verdict(short).reasons[0].startswith("Clarity's VAE was trained for only 9 updates")
    assert verdict(card(), predictor="b").figures[0][0] == "Ensemble's accuracy"
