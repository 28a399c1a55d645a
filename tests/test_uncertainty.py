"""The decomposition of uncertainty against hand calculations and at its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clarity.uncertainty import decompose


def test_decompose_agrees_with_a_calculation_by_hand() -> None:
    probs = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.6, 0.3]]])
    found = decompose(probs.log() + 5)
    mean = [0.4, 0.4, 0.2]
    predictive = -sum(p * math.log(p) for p in mean)
    aleatoric = -sum(p * math.log(p) for row in probs[:, 0].tolist() for p in row) / 2
    assert found.predictive.item() == pytest.approx(predictive, abs=1e-6)
    assert found.aleatoric.item() == pytest.approx(aleatoric, abs=1e-6)
    assert found.epistemic.item() == pytest.approx(predictive - aleatoric, abs=1e-6)
    assert found.predictive.dtype == torch.float32 and found.predictive.shape == (1,)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e30])
def test_saturated_logits_give_neither_nan_nor_negative_values(scale: float) -> None:
    logits = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)) * scale
    for value in decompose(logits):
        assert torch.isfinite(value).all()
        assert (value >= 0).all() and (value <= math.log(4) + 1e-5).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-60, 60, width=32), min_size=12, max_size=12))
def test_parts_add_up_and_members_order_does_not_matter(values: list[float]) -> None:
    logits = torch.tensor(values).reshape(3, 1, 4)
    found = decompose(logits)
    assert found.predictive.item() == pytest.approx(found.aleatoric.item() + found.epistemic.item(), abs=1e-6)
    for ours, theirs in zip(found, decompose(logits.flip(0))):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_decompose_keeps_the_digits_of_a_tiny_epistemic_part() -> None:
    # Two members that differ by a hair where both are sure: float32 entropies would cancel to nothing.
    logits = torch.tensor([[[18.0, 0.0]], [[18.5, 0.0]]])
    found = decompose(logits)
    p = [1 / (1 + math.exp(18.0)), 1 / (1 + math.exp(18.5))]

    def entropy(q: float) -> float:
        return -(q * math.log(q) + (1 - q) * math.log1p(-q))

    assert found.epistemic.item() == pytest.approx(entropy(sum(p) / 2) - (entropy(p[0]) + entropy(p[1])) / 2, rel=1e-3)


def by_logarithms(logits: torch.Tensor) -> list[torch.Tensor]:
    """The decomposition as it is written in the literature, from the logarithms of all probabilities."""
    log_probs = torch.log_softmax(logits.double(), -1)
    log_mean = torch.logsumexp(log_probs, 0) - math.log(len(logits))

    def entropy(logs: torch.Tensor) -> torch.Tensor:
        return -(logs.exp() * logs).nan_to_num(nan=0.0).sum(-1).clamp_max(0)

    aleatoric, predictive = entropy(log_probs).mean(0), entropy(log_mean)
    epistemic = (predictive - aleatoric).clamp_min(0)
    return [aleatoric + epistemic, aleatoric, epistemic]


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3])
def test_decompose_agrees_with_the_plain_formula_in_float64(scale: float) -> None:
    logits = torch.randn(5, 128, 7, generator=torch.Generator().manual_seed(0)) * scale
    logits[0, 0, 0], logits[:, 1], logits[2, 2, 3] = -math.inf, math.nan, math.inf
    for ours, exact in zip(decompose(logits), by_logarithms(logits)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-12)
