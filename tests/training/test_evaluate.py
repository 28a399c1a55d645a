"""Metrics of a trained model."""

import json
import math

import numpy as np
import pytest
import torch
from bars import bars

from clarity.findings.verdict import verdict
from clarity.model import Model
from clarity.training.evaluate import LabelledImages, classification_metrics, evaluate, find_copies, linear_baseline


def test_classification_metrics_by_hand() -> None:
    probs = torch.tensor([[[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]], [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]])
    found = classification_metrics(probs.log(), torch.tensor([0, 0]), ["a", "b", "c"])
    assert found["accuracy"] == 0.5 and found["member_accuracy"] == [1.0, 0.5]
    assert found["per_class"] == {"a": 0.5} and found["balanced_accuracy"] == 0.5
    # Two bins of one image each: certain by 0.7 and right, by 0.5 and wrong.
    assert found["calibration_error"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2)
    json.dumps(found)


def test_evaluation_compares_with_simple_methods_and_real_images(tiny_model: Model) -> None:
    images, labels = bars(90, channels=1)
    split = torch.arange(90) % 4 == 0
    ids = [str(i) for i in range(90)]
    training = LabelledImages(images[~split], ids[:67], labels[~split])
    held_out = LabelledImages(images[split], ids[67:], torch.where(torch.arange(23) < 2, -1, labels[split]))
    found = evaluate(tiny_model, lambda: training, held_out)
    json.dumps(found)
    figures = found["evaluation"]
    assert figures["images"] == 21 == sum(entry["images"] for entry in figures["per_class"].values())
    assert figures["correct"] == round(21 * figures["accuracy"])
    assert figures["baseline"]["accuracy"] > 0.9 and figures["baseline"]["images"] == 67
    errors = figures["reconstruction"]
    assert errors["linear_code"] < errors["mean_image"] < errors["vae"]
    for name in ("median", "p90"):
        values = found["target_probs"][name]
        assert all(0 <= value <= 1 for value in values if value is not None)
    assert figures["judge"] is None
    assert verdict(found).level != "not checked"  # it reads every figure
    none = {"held_out": 0, "copy": None, "relabelled": 0, "relabelled_copy": None}
    assert figures["copies"] == find_copies(training, training.take(slice(0, 0))) == none


def test_copies_are_found_by_their_pixels_and_those_of_several_labels_named() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    training = LabelledImages(images[:4], ["a", "b", "c", "d"], torch.tensor([0, 0, 1, 1]))
    held_out = LabelledImages(images[[4, 3, 1, 1]], ["e", "f", "g", "h"], torch.tensor([0, 1, 0, 1]))
    found = {"held_out": 3, "copy": ["f", "d"], "relabelled": 1, "relabelled_copy": ["b", "h"]}
    assert find_copies(training, held_out) == found


def test_baseline_of_images_of_one_class_names_that_class() -> None:
    images, labels = bars(60)
    training = LabelledImages(images[labels == 2], [str(i) for i in range(60)], labels[labels == 2])
    found, _ = linear_baseline(training, images, labels.numpy(), 5)
    assert found["correct"] == int((labels == 2).sum()) and found["images"] == len(training.labels)


def test_linear_code_is_that_of_the_singular_values() -> None:
    images, labels = bars(60)
    split = LabelledImages(images, [str(i) for i in range(60)], labels)
    _, found = linear_baseline(split, images, labels.numpy(), 5)
    x = images.flatten(1).double().numpy() / 255
    values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    assert found["mean_image"] == pytest.approx(values.sum() / x.size, rel=1e-4)
    assert found["linear_code"] == pytest.approx(values[5:].sum() / x.size, rel=1e-3)
