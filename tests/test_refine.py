"""Thresholds of rows, fixed directions and refined results: the same row has the same bits in any batch."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from searches import assert_same_bits, make_layers, make_rows
from torch import Tensor

from clarity import native_search
from clarity.objectives import LatentObjective
from clarity.refine import log_ratio, refine, sum_rows
from clarity.search import Counterfactuals, SearchConfig, descend

NATIVE = [f"native-{build}" for build in native_search.modules()]
ENGINES = [*NATIVE, "batched", "plain"]
CONFIG = SearchConfig(max_steps=40, learning_rate=0.1)
# Members, and widths from the codes to the classes; the smallest sizes, and sizes that fill no vector.
SIZES = [(3, (5, 6, 7, 4)), (1, (1, 2)), (2, (33, 17, 3))]
FIELDS = ("point", "steps", "converged", "target_prob_initial", "target_prob_final", "finite")


pytestmark = pytest.mark.usefixtures("single_thread")


def case(members: int, sizes: tuple[int, ...], total: int, directions: int, seed: int = 2) -> tuple[Any, Tensor, dict]:
    """An objective with fixed directions, codes, and rows with a threshold each."""
    layers = make_layers(members, sizes, scale=3.0)
    z, target = make_rows(layers, total, seed)
    fixed = None
    if directions:
        noise = torch.Generator().manual_seed(4)
        fixed = torch.linalg.qr(torch.randn(sizes[0], directions, generator=noise))[0].contiguous()
    thresholds = torch.linspace(0.3, 0.8, total)[torch.randperm(total, generator=torch.Generator().manual_seed(seed))]
    rows = {"target": target, "reference": z, "min_target_prob": thresholds}
    return LatentObjective(layers, 0.001, fixed), z, rows


def results(found: Counterfactuals, index: Any = slice(None)) -> dict[str, Tensor]:
    return {name: getattr(found, name)[index].contiguous() for name in FIELDS}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("members", "sizes"), SIZES)
def test_refined_search_gives_a_row_the_same_bits_in_any_batch(
    engine: str, members: int, sizes: tuple[int, ...]
) -> None:
    total, config = 150, replace(CONFIG, refine=True)
    objective, z, rows = case(members, sizes, total, directions=1 if sizes[0] > 1 else 0)
    found = descend(objective, z, rows, config, engine=engine, threads=1)
    assert found.converged.sum() > total / 4 and len(found.steps.unique()) > 4

    def again(index: Tensor, threads: int) -> Counterfactuals:
        some = {name: values[index] for name, values in rows.items()}
        return descend(objective, z[index], some, config, engine=engine, threads=threads)

    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    for index, threads in ((torch.tensor([147]), 1), (shuffled[:31], 1), (shuffled, 1), (shuffled, 2), (shuffled, 7)):
        assert_same_bits(results(again(index, threads)), results(found, index))
    _, strangers, others = case(members, sizes, 61, directions=0, seed=9)
    strangers[::5] = math.nan
    mixed = {name: torch.cat([others[name], rows[name][:9]]) for name in rows}
    among = descend(objective, torch.cat([strangers, z[:9]]), mixed, config, engine=engine, threads=2)
    assert_same_bits(results(among, slice(61, None)), results(found, slice(0, 9)))


@pytest.mark.parametrize("engine", [*NATIVE, "batched"])
@pytest.mark.parametrize("directions", [0, 1, 3])
def test_engines_agree_with_the_plain_one_on_thresholds_and_fixed_directions(engine: str, directions: int) -> None:
    objective, z, rows = case(3, (5, 6, 7, 4), 160, directions)
    found, plain = (descend(objective, z, rows, CONFIG, engine=name) for name in (engine, "plain"))
    same = found.steps == plain.steps
    assert same.float().mean() > 0.97 and 0 < plain.converged.sum() < 160
    torch.testing.assert_close(found.point[same], plain.point[same], atol=1e-3, rtol=0)
    assert torch.equal(found.converged[same], plain.converged[same])


@pytest.mark.parametrize("engine", ENGINES)
def test_each_row_stops_at_its_own_threshold(engine: str) -> None:
    objective, z, rows = case(3, (5, 6, 7, 4), 90, 0)
    found = descend(objective, z, rows, CONFIG, engine=engine)
    for threshold in rows["min_target_prob"][:3].tolist():
        alone = {name: values for name, values in rows.items() if name != "min_target_prob"}
        expected = descend(objective, z, alone, replace(CONFIG, min_target_prob=threshold), engine=engine)
        row = int((rows["min_target_prob"] == threshold).nonzero()[0])
        assert_same_bits(results(found, slice(row, row + 1)), results(expected, slice(row, row + 1)))
    assert torch.equal(found.converged, found.target_prob_final > rows["min_target_prob"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
def test_no_point_moves_along_a_fixed_direction(engine: str, refined: bool, directions: int) -> None:
    objective, z, rows = case(3, (5, 6, 7, 4), 70, directions)
    found = descend(objective, z, rows, replace(CONFIG, refine=refined), engine=engine)
    walked = found.point - z
    assert (walked @ objective.fixed).abs().max() < 5e-6
    assert walked.abs().amax(1).median() > 0.1 and found.converged.any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("directions", [0, 1])
def test_refined_results_satisfy_and_are_closer(engine: str, directions: int) -> None:
    objective, z, rows = case(3, (5, 6, 7, 4), 120, directions)
    found = descend(objective, z, rows, CONFIG, engine=engine)
    closer = descend(objective, z, rows, replace(CONFIG, refine=True), engine=engine)
    assert torch.equal(closer.steps, found.steps) and torch.equal(closer.converged, found.converged)
    assert torch.equal(closer.point[~found.converged], found.point[~found.converged])
    before, after = ((run.point - z).abs().sum(1) for run in (found, closer))
    assert (after <= before).all()
    moved = found.converged & (found.steps > 0)
    assert after[moved].sum() < (0.9 if directions else 0.8) * before[moved].sum()
    # The probability is that of the point, by the plain engine.
    logits = objective(closer.point, rows)[1]
    torch.testing.assert_close(logits, closer.target_prob_final, atol=1e-5, rtol=0)
    assert (closer.target_prob_final > rows["min_target_prob"])[found.converged].all()


def test_refined_search_that_continues_shrinks_towards_the_reference() -> None:
    objective, z, rows = case(3, (5, 6, 7, 4), 60, 0)
    first = descend(objective, z, rows, CONFIG)
    higher = {**rows, "min_target_prob": rows["min_target_prob"] + 0.1}
    further = replace(objective, distance_weight=0.0)
    plain, closer = (
        descend(further, first.point, higher, replace(CONFIG, refine=refined)) for refined in (False, True)
    )
    assert torch.equal(plain.target_prob_initial, first.target_prob_final)
    both = plain.converged & (plain.steps > 0)
    assert both.sum() > 10
    before, after = ((run.point - z).abs().sum(1)[both] for run in (plain, closer))
    assert (after <= before).all() and after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("build", native_search.modules())
@pytest.mark.parametrize(("members", "sizes"), [*SIZES, (7, (16, 16, 16, 10))])
def test_native_value_and_grad_is_that_of_autograd(build: str, members: int, sizes: tuple[int, ...]) -> None:
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, 101)
    value, grad = native_search.value_and_grad(layers, z, target, 1, build)
    points = z.clone().requires_grad_()
    expected = LatentObjective(layers, 0.0)(points, {"target": target, "reference": z})[1]
    expected.sum().backward()
    torch.testing.assert_close(value, expected.detach(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(grad, points.grad, atol=5e-6, rtol=2e-4)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3))[:53]
    for threads in (1, 3):
        some = native_search.value_and_grad(layers, z[order], target[order], threads, build)
        assert_same_bits(dict(enumerate(some)), {0: value[order], 1: grad[order]})
    empty = native_search.value_and_grad(layers, z[:0], target[:0], 1, build)
    assert [tuple(values.shape) for values in empty] == [(0,), (0, sizes[0])]


def test_refine_finds_the_closest_point_of_a_linear_classifier() -> None:
    # One weight is twice the other: the closest point in L1 moves the first coordinate alone.
    weight = torch.tensor([2.0, 1.0])

    def evaluate(points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        prob = torch.sigmoid(points @ weight)
        return prob, (prob * (1 - prob))[:, None] * weight

    start, threshold = torch.tensor([[2.0, 2.0], [3.0, 3.0]]), torch.tensor([0.9, 0.9])
    point, prob = refine(evaluate, start, torch.zeros(2, 2), threshold, 0.05)
    assert (prob > threshold).all()
    closest = math.log(9) / 2
    assert (point.abs().sum(1) < 1.45 * closest).all() and (point.abs().sum(1) > closest).all()
    ends, _ = refine(
        lambda p, _: (torch.sigmoid(p[:, 0]), torch.ones_like(p)),
        torch.tensor([[3.0]]),
        torch.zeros(1, 1),
        threshold[:1],
        0.05,
    )
    assert math.log(9) < ends.item() < math.log(9) + 0.1, "a single coordinate shrinks to the threshold"
    unmoved, _ = refine(evaluate, -start, torch.zeros(2, 2), threshold, 0.05)
    assert torch.equal(unmoved, -start), "a point below its threshold stays"


def test_sums_and_logarithms_of_refine_do_not_depend_on_the_batch() -> None:
    for width in (1, 2, 5, 16, 33):
        values = torch.randn(77, width, generator=torch.Generator().manual_seed(width))
        torch.testing.assert_close(sum_rows(values), values.sum(1), atol=1e-5, rtol=1e-5)
        for rows in (slice(0, 1), slice(3, 70), slice(76, 77)):
            assert torch.equal(sum_rows(values[rows]), sum_rows(values)[rows])
    ratio = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    torch.testing.assert_close(log_ratio(ratio, torch.ones(5)), ratio.log(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (torch.zeros(4, 1), r"fixed: expected directions \(5, k\)"),
        (torch.full((5, 2), 0.5), "fixed: expected orthonormal columns"),
        (torch.eye(5).double(), "fixed: expected orthonormal columns of float32"),
    ],
)
def test_descend_refuses_directions_that_do_not_fit(fixed: Tensor, message: str) -> None:
    objective, z, rows = case(2, (5, 4), 3, 0)
    with pytest.raises(ValueError, match=message):
        descend(replace(objective, fixed=fixed), z, rows, CONFIG)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (torch.tensor([0.5, 0.5, 1.0]), "more than 0 and less than 1"),
        (torch.tensor([0.5, 0.5, math.nan]), "more than 0 and less than 1"),
        (torch.full((3,), 0.5, dtype=torch.float64), "expected float32"),
    ],
)
def test_descend_refuses_thresholds_that_are_no_probabilities(thresholds: Tensor, message: str) -> None:
    objective, z, rows = case(2, (5, 4), 3, 0)
    with pytest.raises(ValueError, match=message):
        descend(objective, z, {**rows, "min_target_prob": thresholds}, CONFIG)
