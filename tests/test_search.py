"""The search against a slow transcription of Algorithm 1, against closed forms, and the same row in other batches."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clarity import native_search, search, triton_search
from clarity.objectives import LatentObjective, ensemble_terms
from clarity.search import ENGINES, Counterfactuals, SearchConfig, descend

# All axis sizes differ: members, codes, two hidden layers, classes.
MEMBERS, LATENT, HIDDEN, CLASSES = 3, 5, (6, 7), 4


pytestmark = pytest.mark.usefixtures("single_thread")


def networks(members: int, widths: tuple[int, ...], scale: float = 3.0, seed: int = 3) -> list[nn.Sequential]:
    """Members as a researcher would write them, separate modules: random, but near enough each other to agree."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)

        def network() -> nn.Sequential:
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            return nn.Sequential(*layers[:-1])

        base, nets = network(), [network() for _ in range(members)]
    for net in nets:
        for parameter, shared in zip(net.parameters(), base.parameters()):
            parameter.data = scale * (shared.data + 0.2 * parameter.data)
    return nets


def stacked(nets: list[nn.Sequential], distance_weight: float = 0.001) -> LatentObjective:
    columns = zip(*[[layer for layer in net if isinstance(layer, nn.Linear)] for net in nets])
    layers = [
        (
            torch.stack([layer.weight.detach().t() for layer in column]).contiguous(),
            torch.stack([layer.bias.detach() for layer in column]),
        )
        for column in columns
    ]
    return LatentObjective(layers, distance_weight)


def algorithm_1(
    nets: list[nn.Sequential], z: Tensor, target: int, config: SearchConfig
) -> tuple[Tensor, int, bool, float, float]:
    """The paper's loop, literally: one code (D,), one step at a time, one member after the other."""
    z_cf = z.clone().requires_grad_()
    optimiser = torch.optim.Adam([z_cf], lr=config.learning_rate)
    steps, first = 0, math.nan
    while True:
        logits = [net(z_cf) for net in nets]
        target_prob = torch.stack([F.softmax(values, dim=0)[target] for values in logits]).mean().item()
        first = target_prob if steps == 0 else first
        if target_prob > config.min_target_prob or steps == config.max_steps:
            return z_cf.detach(), steps, target_prob > config.min_target_prob, first, target_prob
        losses = [F.cross_entropy(values, torch.tensor(target)) for values in logits]
        loss = sum(losses) / len(nets) + config.distance_weight * (z_cf - z).abs().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1


def questions(
    rows: int, latent: int = LATENT, classes: int = CLASSES, seed: int = 5
) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, latent, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    return z, {"target": target, "reference": z}


def select(rows: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: values[index] for name, values in rows.items()}


def assert_same_bits(found: Counterfactuals, expected: Counterfactuals) -> None:
    for name in ("point", "steps", "converged", "target_prob_initial", "target_prob_final", "finite"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name


CPU_ENGINES = ["plain", "batched", *(f"native-{build}" for build in native_search.modules())]


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("hidden", [(), (6,), HIDDEN])
def test_descend_is_algorithm_1(engine: str, hidden: tuple[int, ...]) -> None:
    nets = networks(MEMBERS, (LATENT, *hidden, CLASSES))
    z, rows = questions(40)
    config = SearchConfig(min_target_prob=0.7, max_steps=25)
    found = descend(stacked(nets), z, rows, config, engine=engine)
    assert found.engine == engine
    slow = [algorithm_1(nets, z[row], int(rows["target"][row]), config) for row in range(len(z))]
    assert found.steps.tolist() == [steps for _, steps, _, _, _ in slow]
    assert found.converged.tolist() == [converged for _, _, converged, _, _ in slow]
    # The case covers rows that start satisfied, that converge, and that do not.
    assert {0, 25} < set(found.steps.tolist())
    assert 0 < found.converged.sum() < len(z)
    torch.testing.assert_close(found.point, torch.stack([point for point, *_ in slow]), atol=2e-4, rtol=0)
    for name, place in (("target_prob_initial", 3), ("target_prob_final", 4)):
        expected = torch.tensor([values[place] for values in slow])
        torch.testing.assert_close(getattr(found, name), expected, atol=1e-4, rtol=0)
    assert found.finite.all()


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_descend_of_a_linear_classifier_goes_straight_to_its_boundary(engine: str) -> None:
    # Two classes, one layer: p(1) = sigmoid(w z + b). Every dimension's gradient is the same sequence times its weight,
    # which Adam divides out: the path is the ray along sign(w), and it ends within one step past the known boundary.
    weight, bias = torch.tensor([0.5, -2.0, 1.0, 0.25, -0.75]), 0.3
    layers = [(torch.stack([-weight / 2, weight / 2], 1)[None], torch.tensor([[-bias / 2, bias / 2]]))]
    z = torch.tensor([[-1.0, 0.5, 0.2, 0.0, 0.1], [-3.0, 1.0, -1.0, 2.0, 0.0], [2.0, -2.0, 1.0, 1.0, -1.0]])
    rows = {"target": torch.ones(3, dtype=torch.int64), "reference": z}
    config = SearchConfig(distance_weight=0, min_target_prob=0.75)
    found = descend(LatentObjective(layers, 0.0), z, rows, config, engine=engine)
    boundary = math.log(0.75 / 0.25)
    missing = ((boundary - (z @ weight + bias)) / weight.abs().sum()).clamp_(min=0)  # along sign(w), in closed form
    walked = (found.point - z) * weight.sign()
    torch.testing.assert_close(walked, walked[:, :1].expand(-1, LATENT), atol=1e-5, rtol=0)
    assert found.converged.all()
    assert missing[2] == 0 and found.steps[2] == 0 and torch.equal(found.point[2], z[2])
    assert (walked[:2, 0] >= missing[:2]).all() and (walked[:2, 0] <= missing[:2] + config.learning_rate).all()
    # Adam's step never exceeds the rate while gradients fall, so the rate bounds the steps from below.
    assert (found.steps >= (missing / config.learning_rate).floor()).all()


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_descend_is_algorithm_1_where_softmax_saturates(engine: str) -> None:
    nets = networks(2, (LATENT, 6, CLASSES), scale=1.0)
    for net in nets:
        net[-1].weight.data *= 2000
    z, rows = questions(12)
    config = SearchConfig(max_steps=15)
    found = descend(stacked(nets), z, rows, config, engine=engine)
    slow = [algorithm_1(nets, z[row], int(rows["target"][row]), config) for row in range(len(z))]
    assert (found.target_prob_initial < 1e-20).any()
    assert found.finite.all()
    assert found.steps.tolist() == [steps for _, steps, *_ in slow]
    torch.testing.assert_close(found.point, torch.stack([point for point, *_ in slow]), atol=1e-3, rtol=0)


def test_ensemble_terms_average_the_members_losses_not_their_probabilities() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0]], [[-3.0, 1.0, 0.0]]])
    cross_entropy, target_prob = ensemble_terms(logits, torch.tensor([0]))
    probs = F.softmax(logits, dim=2)[:, 0, 0]
    assert cross_entropy.item() == pytest.approx(-probs.log().mean().item())
    assert target_prob.item() == pytest.approx(probs.mean().item())


def ramp(rise: Tensor) -> Any:
    """An objective on points (B, 1) whose target probability rises by ``rise`` with each unit walked downhill."""

    def objective(point: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        prob = (point[:, 0] * rows["rise"]).clamp(0, 1)
        return -point[:, 0], prob, torch.stack([prob, 1 - prob], 1)[None]

    return objective


@pytest.mark.parametrize("max_steps", [0, 1, 2, 7])
def test_descend_tests_once_more_after_the_last_update(max_steps: int) -> None:
    # With a constant slope Adam's step is its rate: after n updates the probability is 0.1 n.
    config = SearchConfig(
        min_target_prob=0.1 * max_steps - 0.05 if max_steps else 0.5, max_steps=max_steps, learning_rate=0.1
    )
    seen: list[int] = []
    found = descend(
        ramp(torch.ones(2)),
        torch.zeros(2, 1),
        {"rise": torch.tensor([1.0, 0.5])},
        config,
        on_step=lambda steps, indices, *_: seen.extend(zip(indices.tolist(), steps.tolist())),
    )
    assert found.steps.tolist() == [max_steps, max_steps]
    assert found.converged.tolist() == [max_steps > 0, False]
    assert found.finite.all()
    assert sorted(seen) == [(row, step) for row in range(2) for step in range(max_steps + 1)]


def test_descend_requires_more_than_the_threshold_in_float32() -> None:
    def objective(point: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        return point.sum(1), rows["prob"], rows["prob"].expand(2, 1, -1).permute(1, 2, 0)

    at = torch.tensor(0.99)
    prob = torch.stack([at, torch.nextafter(at, torch.tensor(1.0)), torch.nextafter(at, torch.tensor(0.0))])
    found = descend(objective, torch.zeros(3, 2), {"prob": prob}, SearchConfig(max_steps=4))
    assert found.converged.tolist() == [False, True, False]
    assert found.steps.tolist() == [4, 0, 4]


def test_descend_accepts_no_rows() -> None:
    z, rows = questions(0)
    for engine in CPU_ENGINES:
        found = descend(stacked(networks(2, (LATENT, CLASSES))), z, rows, SearchConfig(), engine=engine)
        assert len(found) == 0 and found.point.shape == (0, LATENT) and found.engine == engine


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize(
    ("latent", "hidden", "classes"), [(LATENT, HIDDEN, CLASSES), (16, (16, 16), 10), (33, (17,), 3)]
)
def test_descend_gives_a_row_the_same_bits_in_any_batch(
    engine: str, latent: int, hidden: tuple[int, ...], classes: int
) -> None:
    objective = stacked(networks(MEMBERS, (latent, *hidden, classes)))
    total = 2 * search.SLOTS + 45  # more than two blocks, so that rows enter late
    z, rows = questions(total, latent, classes)
    config = SearchConfig(min_target_prob=0.8, max_steps=25)
    found = descend(objective, z, rows, config, engine=engine, threads=1)
    assert 0 < found.converged.sum() < total and len(found.steps.unique()) > 5

    def part(index: Tensor) -> Counterfactuals:
        values = {name: value[index] for name, value in vars(found).items() if name != "engine"}
        return Counterfactuals(**values, engine=engine)

    def again(index: Tensor, threads: int) -> Counterfactuals:
        return descend(objective, z[index], select(rows, index), config, engine=engine, threads=threads)

    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    for index in (torch.tensor([total - 3]), shuffled, shuffled[:31], shuffled[: search.SLOTS + 1]):
        assert_same_bits(again(index, 1), part(index))
    assert_same_bits(again(shuffled, 2), part(shuffled))
    # Among other rows, some of them not finite.
    strangers, others = questions(77, latent, classes, seed=9)
    strangers[::5] = math.nan
    mixed = torch.cat([strangers, z[:9]])
    asked = {"target": torch.cat([others["target"], rows["target"][:9]]), "reference": mixed}
    among = descend(objective, mixed, asked, config, engine=engine, threads=2)
    assert not among.finite[:77:5].any()
    values = {name: value[77:] for name, value in vars(among).items() if name != "engine"}
    assert_same_bits(Counterfactuals(**values, engine=engine), part(torch.arange(9)))


def test_descend_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    z, rows = questions(7)
    descend(stacked(networks(2, (LATENT, CLASSES))), z, rows, SearchConfig(max_steps=2), threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("members", "classes", "slots"), [(50, 10, 16384), (50, 1000, 5368), (10**6, 1000, 1)])
def test_blocks_on_a_gpu_fit_its_memory(members: int, classes: int, slots: int) -> None:
    layers = [(torch.empty((members, 16, size), device="meta"), torch.empty(0)) for size in (16, classes)]
    assert search.device_slots(LatentObjective(layers, 0.0)) == slots
    assert search.device_slots(lambda point, rows: (point, point, point)) == 16384


def test_descend_convolves_in_float32() -> None:
    z, rows = questions(7)
    objective, seen = stacked(networks(2, (LATENT, CLASSES))), set()

    def recording(point: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.add(torch.backends.cudnn.conv.fp32_precision)
        return objective(point, rows)

    before = torch.backends.cudnn.conv.fp32_precision
    descend(recording, z, rows, SearchConfig(max_steps=2))
    assert seen == {"ieee"} and torch.backends.cudnn.conv.fp32_precision == before != "ieee"


def test_descend_lets_waiting_rows_enter_and_reports_each_in_order() -> None:
    nets = networks(MEMBERS, (LATENT, *HIDDEN, CLASSES))
    z, rows = questions(23)
    config = SearchConfig(min_target_prob=0.8, max_steps=30)
    paths: dict[int, list[tuple[int, Tensor, float]]] = {}
    sizes = []

    def on_step(steps: Tensor, indices: Tensor, point: Tensor, target_prob: Tensor, logits: Tensor) -> None:
        sizes.append(len(indices))
        assert logits.shape == (MEMBERS, len(indices), CLASSES)
        assert point.shape == (len(indices), LATENT)
        for place, row in enumerate(indices.tolist()):
            path = paths.setdefault(row, [])
            path.append((int(steps[place]), point[place].clone(), float(target_prob[place])))

    found = descend(stacked(nets), z, rows, config, slots=4, on_step=on_step)
    assert found.engine == "plain"
    assert sorted(paths) == list(range(23))
    assert max(sizes) == 4 and sum(sizes) == int(found.steps.sum()) + 23
    for row, path in paths.items():
        assert [step for step, *_ in path] == list(range(int(found.steps[row]) + 1))
        assert torch.equal(path[0][1], z[row]) and torch.equal(path[-1][1], found.point[row])
        assert path[0][2] == found.target_prob_initial[row] and path[-1][2] == found.target_prob_final[row]


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_descend_ends_a_row_that_is_not_finite_without_changing_others(engine: str) -> None:
    objective = stacked(networks(MEMBERS, (LATENT, *HIDDEN, CLASSES)))
    z, rows = questions(9)
    config = SearchConfig(min_target_prob=0.8, max_steps=25)
    healthy = descend(objective, z, rows, config, engine=engine)
    ill = z.clone()
    ill[2, 1], ill[5, 0], ill[7, 3], ill[8] = math.nan, math.inf, -math.inf, 3e38
    found = descend(objective, ill, {**rows, "reference": ill}, config, engine=engine)
    assert found.finite.tolist() == [row not in (2, 5, 7, 8) for row in range(9)]
    assert not found.converged[[2, 5, 7, 8]].any()
    assert found.steps[[2, 5, 7, 8]].tolist() == [0] * 4
    well = torch.tensor([0, 1, 3, 4, 6])
    for name in ("point", "steps", "converged", "target_prob_final"):
        assert torch.equal(getattr(found, name)[well], getattr(healthy, name)[well])


@pytest.mark.parametrize("ill", [math.nan, math.inf, -math.inf])
def test_descend_leaves_a_row_that_is_not_finite_at_its_last_finite_point(ill: float) -> None:
    # A slope that is not finite beyond 0.25, while the probability stays fine.
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, point: Tensor, breaks: Tensor) -> Tensor:
            ctx.save_for_backward(point, breaks)
            return -point.sum(1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            point, breaks = ctx.saved_tensors
            slope = torch.full_like(point, -1.0)
            slope[breaks & (point[:, 0] > 0.25)] = ill
            return slope * grad[:, None], None

    def objective(point: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        prob = point[:, 0].detach() / 2
        return Break.apply(point, rows["breaks"]), prob, torch.stack([prob, 1 - prob], 1)[None]

    config = SearchConfig(max_steps=6, learning_rate=0.1)
    found = descend(objective, torch.zeros(3, 2), {"breaks": torch.tensor([False, True, False])}, config)
    assert found.finite.tolist() == [True, False, True]
    assert found.steps.tolist() == [6, 3, 6]
    torch.testing.assert_close(found.point, torch.tensor([[0.6, 0.6], [0.3, 0.3], [0.6, 0.6]]))
    assert found.target_prob_final[1] == found.point[1, 0] / 2
    assert not found.converged.any()


def test_descend_never_calls_a_row_converged_whose_probability_is_not_a_number() -> None:
    def objective(point: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        prob = torch.where(point[:, 0] > rows["until"], math.nan, 0.5 * point[:, 0])
        return -point.sum(1), prob, torch.stack([prob, 1 - prob], 1)[None]

    config = SearchConfig(min_target_prob=0.35, max_steps=20, learning_rate=0.1)
    found = descend(objective, torch.zeros(2, 3), {"until": torch.tensor([0.45, 9.0])}, config)
    assert found.finite.tolist() == [False, True]
    assert found.converged.tolist() == [False, True]
    assert found.point.isfinite().all()
    assert found.steps[0] == 5 and math.isnan(found.target_prob_final[0])


def pixel_classifier(weight: Tensor) -> Any:
    """Two classes of images (B, C, H, W): log-odds of class 1 are the sum of weight * x."""

    def objective(x: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        odds = (x * weight).flatten(1).sum(1)
        logits = torch.stack([-odds / 2, odds / 2], 1)[None]
        return *ensemble_terms(logits, rows["target"]), logits

    return objective


def schut_update(x: Tensor, grad: Tensor, changes: Tensor, step_size: float) -> None:
    """One step of the authors' rule on one flat image, pixel by pixel, in place."""
    best, size = -1, -1.0
    for pixel in range(len(x)):
        moved = min(max(float(x[pixel]) - step_size * math.copysign(1, grad[pixel]) * (grad[pixel] != 0), 0.0), 1.0)
        if changes[pixel] < 5 and abs(moved - float(x[pixel])) > 0 and abs(float(grad[pixel])) > size:
            best, size = pixel, abs(float(grad[pixel]))
    if best >= 0:
        x[best] = (x[best] - step_size * grad[best].sign()).clamp(0, 1)
        changes[best] += 1


@pytest.mark.parametrize("step_size", [0.2, 0.07])
def test_jsma_is_the_rule_of_schut(step_size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (1, 2, 3)
    weight = torch.randn(shape, generator=generator)
    weight[0, 0, 1] = 0.0
    x = torch.rand((5, *shape), generator=generator)
    rows = {"target": torch.tensor([0, 1, 1, 0, 1])}
    config = SearchConfig(max_steps=26, min_target_prob=0.9, step_size=step_size)
    found = descend(pixel_classifier(weight), x, rows, config, "jsma", bounds=(0, 1))
    for row in range(len(x)):
        here, changes, steps = x[row].flatten().clone(), torch.zeros(weight.numel(), dtype=torch.int64), 0
        while True:
            point = here.view(1, *shape).clone().requires_grad_()
            loss, prob, _ = pixel_classifier(weight)(point, {"target": rows["target"][row : row + 1]})
            if prob.item() > config.min_target_prob or steps == config.max_steps:
                break
            (grad,) = torch.autograd.grad(loss.sum(), point)
            schut_update(here, grad.flatten(), changes, step_size)
            steps += 1
        assert found.steps[row] == steps
        torch.testing.assert_close(found.point[row].flatten(), here, atol=1e-6, rtol=0)


def test_jsma_changes_a_pixel_five_times_and_breaks_ties_by_index() -> None:
    weight = torch.tensor([[[2.0, 2.0, 1.0]]])
    rows = {"target": torch.tensor([1])}
    path: list[Tensor] = []
    config = SearchConfig(max_steps=11, step_size=0.03)
    descend(
        pixel_classifier(weight),
        torch.zeros(1, 1, 1, 3),
        rows,
        config,
        "jsma",
        bounds=(0, 1),
        on_step=lambda *step: path.append(step[2][0].flatten()),
    )
    moved = [int((after - before).argmax()) for before, after in pairwise(path)]
    assert moved == [0] * 5 + [1] * 5 + [2]


def test_descend_clamps_each_update_to_its_bounds() -> None:
    weight = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(3))
    x = torch.rand(4, 1, 2, 3, generator=torch.Generator().manual_seed(4))
    points: list[Tensor] = []
    config = SearchConfig(max_steps=40, learning_rate=0.2)
    rows = {"target": torch.tensor([0, 1, 0, 1])}
    descend(pixel_classifier(weight), x, rows, config, bounds=(0, 1), on_step=lambda *step: points.append(step[2]))
    every = torch.cat(points)
    assert every.min() == 0 and every.max() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_target_prob", 0.0),
        ("min_target_prob", 1.0),
        ("min_target_prob", 1 - 1e-12),
        ("min_target_prob", math.nan),
        ("max_steps", -1),
        ("max_steps", 2.5),
        ("max_steps", True),
        ("distance_weight", -0.1),
        ("distance_weight", math.inf),
        ("learning_rate", 0.0),
        ("learning_rate", "0.1"),
        ("step_size", 0.0),
        ("step_size", 1.5),
    ],
)
def test_config_rejects_invalid_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SearchConfig.{name}: expected"):
        SearchConfig(**{name: value})


def test_config_defaults_are_the_papers() -> None:
    assert SearchConfig() == SearchConfig(0.99, 500, 0.001, 0.05, 0.2, False)


def test_descend_rejects_arguments_that_do_not_fit() -> None:
    objective = stacked(networks(2, (LATENT, CLASSES)))
    z, rows = questions(3)
    config = SearchConfig()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("unknown update 'sgd'; choose from adam, jsma", {"update": "sgd"}),
        (
            "unknown engine 'fast'; choose from auto, triton, native-avx512, native-avx2, native-base, batched, plain",
            {"engine": "fast"},
        ),
        ("start: expected float32", {"start": z.double()}),
        ("start: expected float32", {"start": z[:, 0]}),
        ("3 rows", {"rows": {"target": rows["target"][:2], "reference": z}}),
        ("needs target and reference", {"rows": {"target": rows["target"]}}),
        ("classes 0 ... 3, got", {"rows": {"target": rows["target"] + 4, "reference": z}}),
        ("int64", {"rows": {"target": rows["target"].float(), "reference": z}}),
        (r"expected codes \(3, 5\)", {"start": z[:, :4]}),
        ("layers: expected weights", {"objective": LatentObjective([(torch.zeros(2, 5, 6), torch.zeros(2, 4))], 0.0)}),
        ("threads: expected at least 1", {"threads": 0}),
        ("engine triton runs on a CUDA GPU, not on cpu", {"engine": "triton"}),
        ("engine batched searches over latent classifiers only", {"engine": "batched", "update": "jsma"}),
    ]
    for message, change in cases:
        arguments: dict[str, Any] = {"objective": objective, "start": z, "rows": rows, "config": config, **change}
        with pytest.raises(ValueError, match=message):
            descend(**arguments)


def test_auto_takes_the_native_engine_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = questions(3)
    objective, config = stacked(networks(2, (LATENT, CLASSES))), SearchConfig(max_steps=2)
    monkeypatch.setattr(native_search, "modules", dict)
    assert descend(objective, z, rows, config).engine == "batched"
    with pytest.raises(ValueError, match="engine native-base cannot run on this machine, which has none"):
        descend(objective, z, rows, config, engine="native-base")
    assert descend(objective, z, rows, config, bounds=(-1, 1)).engine == "plain"
    assert descend(lambda *args: objective(*args), z, rows, config).engine == "plain"
    monkeypatch.setattr(native_search, "modules", lambda: {"avx2": None, "base": None})
    monkeypatch.setitem(ENGINES, "native-avx2", ENGINES["batched"])
    assert descend(objective, z, rows, config).engine == "native-avx2"
    assert descend(objective, z, rows, config, on_step=lambda *_: None, engine="native-avx2").engine == "plain"
    with pytest.raises(ValueError, match=r"engine native-avx512 cannot run .* which has native-avx2, native-base"):
        descend(objective, z, rows, config, engine="native-avx512")


def test_auto_takes_the_fused_engine_on_a_gpu_where_it_holds_the_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    small = stacked(networks(2, (LATENT, 6, CLASSES)))
    wide = stacked(networks(2, (LATENT, triton_search.MOST_WIDTH + 1, CLASSES)))
    monkeypatch.setattr(triton_search, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("clarity.triton_search.shutil.which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.setenv("CPATH", "/usr/include/python3")
    assert search.choose_engine("auto", small, True, "cuda") == "triton"
    assert search.choose_engine("auto", wide, True, "cuda") == "batched"
    with pytest.raises(ValueError, match="engine triton holds codes up to"):
        search.choose_engine("triton", wide, True, "cuda")
    with pytest.raises(ValueError, match="engine native-base runs on a CPU, not on cuda"):
        search.choose_engine("native-base", small, True, "cuda")
    # Where triton could not start a kernel, the search goes on without it.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert search.choose_engine("auto", small, True, "cuda") == "batched"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("clarity.triton_search.shutil.which", {}.get)
    monkeypatch.delenv("CC", raising=False)
    assert search.choose_engine("auto", small, True, "cuda") == "batched"
    with pytest.raises(ValueError, match="engine triton needs a C compiler and Python's headers"):
        search.choose_engine("triton", small, True, "cuda")
    monkeypatch.setattr(triton_search, "is_installed", lambda: False)
    assert search.choose_engine("auto", small, True, "cuda") == "batched"
    with pytest.raises(ValueError, match="engine triton needs the package triton"):
        search.choose_engine("triton", small, True, "cuda")
