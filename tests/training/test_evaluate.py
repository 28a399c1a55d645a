"""Metrics of a trained model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from clarity.training.evaluate import classification_metrics


def test_classification_metrics_by_hand() -> None:
    probs = torch.tensor([[[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]], [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]])
    found = classification_metrics(probs.log(), torch.tensor([0, 0]), ["a", "b", "c"])
    assert found["accuracy"] == 0.5 and found["member_accuracy"] == [1.0, 0.5]
    assert found["per_class"] == {"a": 0.5} and found["balanced_accuracy"] == 0.5
    # Two bins of one image each: certain by 0.7 and right, by 0.5 and wrong.
    assert found["calibration_error"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2)
    json.dumps(found)
