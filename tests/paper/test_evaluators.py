"""The networks of the comparison learn, are identified by their weights, and are read as they were saved."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clarity import judges
from clarity.paper import evaluators
from clarity.paper.evaluators import Judges, load_judges, save_judges, train_judges
from clarity.training.judge import JudgeTraining

C, H, W, K = 3, 8, 12, 4


SHORT = JudgeTraining(updates=40, batch_size=16, shift=0.02, turn=0.05, scale=0.02)


def bars(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of a bright bar whose column is the class and whose channel is the attribute."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (number, C, H, W)).astype(np.uint8)
    labels = np.arange(number) % K
    red = rng.integers(0, 2, number)
    for i in range(number):
        images[i, 0 if red[i] else 1, :, 3 * labels[i] : 3 * labels[i] + 3] = 220
    return images, labels, np.stack([red, 1 - red, np.full(number, -1)], axis=1)


@pytest.fixture(scope="module")
def trained() -> evaluators.Judges:
    torch.manual_seed(0)
    images, labels, attributes = bars(160)
    built = Judges((C, H, W), "abcd", ("red", "green", "unknown"))
    reports = list(train_judges(built, images, labels, attributes, SHORT))
    assert {report["net"] for report in reports} == {
        "oracle", "attributes", "autoencoder all", *(f"autoencoder {name}" for name in "abcd"),
    }  # fmt: skip
    losses = [report["loss"] for report in reports if report["net"] == "oracle"]
    assert losses[-1] < losses[0]
    evaluators.evaluate_judges(built, *bars(40, seed=1))
    return built


def test_attribute_net_learns_what_is_known(trained: evaluators.Judges) -> None:
    images, _, attributes = bars(60, seed=3)
    assert trained.attribute_net is not None
    probs = judges.predict_probs(trained.attribute_net, images, sigmoid=True)
    assert probs.shape == (60, 3)
    assert ((probs[:, :2] > 0.5) == attributes[:, :2]).mean() > 0.9
    assert trained.card["oracle_accuracy"] > 0.9
    on_card = trained.card["attribute_accuracy"]
    assert list(on_card) == ["red", "green"]  # the third is known of no image
    assert on_card["red"]["accuracy"] > 0.9 and on_card["red"]["balanced_accuracy"] > 0.9
    assert on_card["red"]["share"] + on_card["green"]["share"] == 1


def test_attribute_accuracies_count_the_known_and_weigh_both_answers_alike() -> None:
    probs = np.array([[0.9, 0.9], [0.2, 0.9], [0.1, 0.9], [0.9, 0.1]])
    truth = np.array([[1, -1], [0, -1], [0, -1], [0, -1]])
    found = evaluators.attribute_accuracies(("a", "b"), probs, truth)
    assert found == {"a": {"accuracy": 0.75, "balanced_accuracy": pytest.approx((1 + 2 / 3) / 2), "share": 0.25}}


def test_autoencoder_of_a_class_draws_it_better_than_others(trained: evaluators.Judges) -> None:
    images, labels, _ = bars(80, seed=4)
    x = images / np.float32(255)
    own = evaluators.reconstruct(trained.autoencoders, labels, x)
    other = evaluators.reconstruct(trained.autoencoders, (labels + 1) % K, x)
    assert own.shape == x.shape and own.dtype == np.float32
    assert ((own - x) ** 2).sum() < ((other - x) ** 2).sum()


def test_saved_judges_come_back(trained: evaluators.Judges, tmp_path: Path) -> None:
    save_judges(trained, str(tmp_path / "judges"))
    again = load_judges(str(tmp_path / "judges"))
    assert (again.class_names, again.attributes, again.card) == (trained.class_names, trained.attributes, trained.card)
    images = bars(5, seed=7)[0]
    assert np.array_equal(judges.predict_probs(trained.oracle, images), judges.predict_probs(again.oracle, images))


def test_judges_are_drawn_alike(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    built, again = Judges((C, H, W), "abcd").state_dict(), Judges((C, H, W), "abcd").state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert built.keys() == again.keys() and all(torch.equal(built[name], again[name]) for name in built)
    with pytest.raises(ValueError, match=r"judges: expected judges\.json in .*, found none"):
        load_judges(str(tmp_path / "elsewhere"))


def test_training_refuses_what_cannot_work() -> None:
    images, labels, attributes = bars(16)
    with pytest.raises(ValueError, match="every class needs"):
        next(train_judges(Judges((C, H, W), "abcd"), images[labels > 0], labels[labels > 0], attributes[labels > 0]))
