"""Each method against a slow transcription of its equation, a known boundary, and the same row in other batches."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clarity import methods
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.images import Preprocessing
from clarity.methods import METHODS, Pairs, classifier_logits
from clarity.model import Model
from clarity.rows import encode_rows
from clarity.search import Counterfactuals, SearchConfig
from clarity.vae import VAE, VAEConfig

MEMBERS, CLASSES, LATENT, IMAGE = 2, 4, 5, (1, 8, 12)
ON_IMAGES = [name for name, method in METHODS.items() if method.classifies_images]


pytestmark = pytest.mark.usefixtures("single_thread")


def small_model(
    *,
    hidden: tuple[int, ...] = (6, 7),
    classes: int = CLASSES,
    image: tuple[int, int, int] = IMAGE,
    linear: bool = False,
) -> Model:
    """Random but fixed networks whose members nearly agree; ``linear``: activations and BatchNorm are the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(13)
        vae = VAE(VAEConfig(image_shape=image, latent_dim=LATENT, channels=(6, 7)))
        config = EnsembleConfig(num_classes=classes, latent_dim=LATENT, hidden=hidden, num_members=MEMBERS)
        ensembles = LatentEnsemble(config), ImageEnsemble(config, vae.config)
        for module in [*vae.modules(), *ensembles[1].modules()]:
            if isinstance(module, nn.BatchNorm2d) and not linear:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.1, 0.3)
            if isinstance(module, nn.PReLU) and linear:
                module.weight.data.fill_(1)
    for ensemble in ensembles:
        for parameter in ensemble.parameters():
            each = parameter.data.unflatten(0, (MEMBERS, -1))
            each[1:] = each[:1] + 0.2 * (each[1:] - each[:1])
        for parameter in [*ensemble.weights, *ensemble.biases]:
            parameter.data *= 3 if linear else 4
    vae.decoder_layers[-1].weight.data *= 4
    names = tuple("abcdefgh"[:classes])
    return Model(
        vae.eval(), ensembles[0].eval(), names, Preprocessing("L", *image[1:]), image_ensemble=ensembles[1].eval()
    )


def questions(model: Model, rows: int, seed: int = 1) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *model.image_shape, generator=generator)
    mean, log_var = (values.clone() for values in encode_rows(model.vae, x))
    noise = torch.randn(rows, LATENT, generator=generator)
    return Pairs(x, mean, log_var, noise, torch.randint(0, model.num_classes, (rows,), generator=generator))


def reachable(model: Model, method: str, pairs: Pairs, config: SearchConfig) -> SearchConfig:
    """The config with a threshold that about half the rows exceed within its steps, and none meets exactly."""
    found = METHODS[method].search(model, pairs, replace(config, min_target_prob=0.9999))
    ends = found.target_prob_final.sort().values
    return replace(config, min_target_prob=float(ends[len(ends) // 2 - 1 : len(ends) // 2 + 1].mean()))


def assert_same_bits(found: Counterfactuals, expected: Counterfactuals, index: Tensor) -> None:
    for name in ("point", "steps", "converged", "target_prob_initial", "target_prob_final", "finite"):
        assert torch.equal(getattr(found, name), getattr(expected, name)[index]), name


def members(model: Model, method: str) -> list[Callable[[Tensor], Tensor]]:
    """The method's classifiers, apart, each from a point (1, ...) to logits (K,)."""
    ensemble: Any = model.image_ensemble if METHODS[method].classifies_images else model.ensemble
    count = 1 if METHODS[method].classifier.endswith("member") else MEMBERS
    alone = [ensemble.member(m) for m in range(count)]
    return [lambda point, net=net: net(point)[0, 0] for net in alone]


def sample(pairs: Pairs) -> Tensor:
    """A sample of the posterior: a noisy code, as Eq. 3 to 5 start from."""
    return pairs.z + torch.exp(0.5 * pairs.log_var) * pairs.noise


def penalty(method: str, pair: Pairs, point: Tensor, x_cf: Tensor) -> Tensor:
    """The distance of each equation."""
    if method == "schut":
        return torch.zeros(())
    if method == "clarity":
        return (point - pair.z).abs().sum()
    if method in ("latent", "revise_e_latent"):
        return (point - sample(pair)).abs().sum()
    return (x_cf - pair.x).abs().sum()


def transcription(model: Model, method: str, pair: Pairs, config: SearchConfig) -> tuple[Tensor, int, bool, float]:
    """One pair, one step at a time, modules in a loop, torch's own Adam."""
    nets = members(model, method)
    target = pair.target[:1]
    on_images, in_pixels = METHODS[method].classifies_images, METHODS[method].space == "image"
    start = pair.x if in_pixels else pair.z
    if method == "latent" or method.startswith("revise"):
        start = sample(pair)
    point = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=config.learning_rate)
    changes = torch.zeros(point.numel(), dtype=torch.int64)
    steps = 0
    while True:
        x_cf = model.vae.decode(point) if on_images and not in_pixels else point
        logits = [net(x_cf) for net in nets]
        target_prob = torch.stack([F.softmax(values, 0)[target[0]] for values in logits]).mean().item()
        if target_prob > config.min_target_prob or steps == config.max_steps:
            return point.detach()[0], steps, target_prob > config.min_target_prob, target_prob
        loss = sum(F.cross_entropy(values[None], target) for values in logits) / len(nets)
        loss = loss + config.distance_weight * penalty(method, pair, point, x_cf)
        optimiser.zero_grad()
        loss.backward()
        if method == "schut":
            slope, here = point.grad.flatten(), point.detach().flatten()
            moved = (here - config.step_size * slope.sign()).clamp(0, 1)
            usable = [i for i in range(len(here)) if changes[i] < 5 and moved[i] != here[i]]
            best = max(usable, key=lambda i: (float(slope[i].abs()), -i))
            point.data.flatten()[best] = moved[best]
            changes[best] += 1
        else:
            optimiser.step()
            if in_pixels:
                point.data.clamp_(0, 1)
        steps += 1


@pytest.mark.parametrize("method", METHODS)
def test_method_is_its_equation(method: str) -> None:
    model = small_model()
    pairs = questions(model, 8)
    # A penalty heavy enough that one in the wrong space, or none, would be seen.
    config = reachable(model, method, pairs, SearchConfig(max_steps=20, distance_weight=0.02))
    found = METHODS[method].search(model, pairs, config, engine="plain")
    slow = [transcription(model, method, pairs.select(torch.tensor([row])), config) for row in range(len(pairs))]
    assert found.steps.tolist() == [steps for _, steps, *_ in slow]
    assert found.converged.tolist() == [converged for _, _, converged, _ in slow]
    assert found.steps.max() == 20 and 0 < found.converged.sum() < 8
    torch.testing.assert_close(found.point, torch.stack([point for point, *_ in slow]), atol=5e-4, rtol=0)
    expected = torch.tensor([prob for *_, prob in slow])
    torch.testing.assert_close(found.target_prob_final, expected, atol=5e-4, rtol=0)
    # The same search by the default engine.
    default = METHODS[method].search(model, pairs, config)
    assert default.steps.tolist() == found.steps.tolist()
    torch.testing.assert_close(default.point, found.point, atol=5e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_method_ends_one_step_past_a_known_boundary(method: str) -> None:
    # Two classes and no nonlinearity: the log-odds of a member are w . point + b, on codes or on images, and a single
    # classifier's boundary at probability gamma is the plane w . point + b = log(gamma / (1 - gamma)).
    model = small_model(hidden=(), classes=2, linear=True)
    for ensemble in (model.ensemble, model.image_ensemble):
        assert ensemble is not None
        for parameter in [*ensemble.parameters(), *(b for n, b in ensemble.named_buffers() if "running" in n)]:
            each = parameter.data.unflatten(0, (MEMBERS, -1))
            each[1:] = each[:1]
    on_images, in_pixels = METHODS[method].classifies_images, METHODS[method].space == "image"
    classifier: Any = model.image_ensemble if on_images else model.ensemble
    shape = model.image_shape if on_images else (LATENT,)

    def log_odds(point: Tensor) -> Tensor:
        logits = classifier(point[None])[0, 0]
        return logits[1] - logits[0]

    weight = torch.autograd.functional.jacobian(log_odds, torch.zeros(shape)).flatten()
    bias = log_odds(torch.zeros(shape)).detach()
    pairs = replace(questions(model, 6), target=torch.ones(6, dtype=torch.int64))
    path: dict[int, list[Tensor]] = {row: [] for row in range(6)}

    def on_step(steps: Tensor, indices: Tensor, point: Tensor, target_prob: Tensor, logits: Tensor) -> None:
        for place, row in enumerate(indices.tolist()):
            path[row].append(point[place].clone())

    codes = sample(pairs) if method == "latent" else pairs.z
    start = torch.stack([log_odds(point) for point in (pairs.x if on_images else codes)]).detach()
    gamma = torch.sigmoid(start.max() + 0.15).item()
    config = SearchConfig(min_target_prob=gamma, max_steps=300, distance_weight=0.0, step_size=0.1)
    found = METHODS[method].search(model, pairs, config, on_step=on_step)
    assert found.converged.all() and (found.steps > 0).all()
    boundary = math.log(gamma / (1 - gamma))
    for row in range(6):
        points = torch.stack(path[row])
        seen = model.vae.decode(points) if on_images and not in_pixels else points
        margin = seen.detach().flatten(1) @ weight + bias - boundary
        assert margin[-1] > -1e-4 and (margin[:-1] < 1e-4).all()
        walked = (points[-1] - points[0]).flatten()
        if method in ("clarity", "latent"):
            # Adam divides each dimension's weight out: the path is the ray along sign(w), its length known.
            missing = -margin[0] / weight.abs().sum()
            along = walked * weight.sign()
            torch.testing.assert_close(along, along[:1].expand(LATENT), atol=1e-4, rtol=0)
            assert missing - 1e-5 <= along[0] <= missing + config.learning_rate
        if method == "fgsm":
            assert (walked * weight.sign() >= 0).all()
        if method == "schut":
            # The pixels with the largest weights that have room, each spent before the next.
            order = weight.abs().argsort(descending=True, stable=True)
            room = torch.where(weight > 0, 1 - pairs.x[row].flatten(), pairs.x[row].flatten())
            left, steps = float(-margin[0]), 0
            for pixel in order.tolist():
                for _ in range(5):
                    step = min(0.1, float(room[pixel]))
                    if left < 0 or step == 0:
                        break
                    left, steps = left - step * float(weight[pixel].abs()), steps + 1
                    room[pixel] -= step
            assert abs(int(found.steps[row]) - steps) <= 1
            assert int((walked.abs() > 0).sum()) <= int(found.steps[row])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("image", [IMAGE, (3, 13, 9)])
def test_method_gives_a_row_the_same_bits_in_any_batch(method: str, image: tuple[int, int, int]) -> None:
    model = small_model(image=image)
    total = 79  # more than one block, so that rows enter late
    pairs = questions(model, total)
    config = reachable(model, method, pairs, SearchConfig(max_steps=7))
    search = METHODS[method].search
    found = search(model, pairs, config, threads=1)
    assert len(found.steps.unique()) > 2
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(1))
    for index in (torch.tensor([70]), shuffled[:11], shuffled):
        assert_same_bits(search(model, pairs.select(index), config, threads=1), found, index)
    assert_same_bits(search(model, pairs, config, threads=2), found, torch.arange(total))
    strangers = questions(model, 17, seed=2)
    strangers.z[::3] = math.nan
    strangers.x[::3] = math.nan
    some = pairs.select(shuffled[:6])
    names = ("x", "z", "log_var", "noise", "target")
    mixed = Pairs(*(torch.cat([getattr(strangers, name), getattr(some, name)]) for name in names))
    among = search(model, mixed, config)
    assert not among.finite[:17:3].any() and not among.converged[:17:3].any()
    kept = {name: value[17:] for name, value in vars(among).items() if name != "engine"}
    assert_same_bits(Counterfactuals(**kept, engine=""), found, shuffled[:6])


@pytest.mark.parametrize(("image", "slots"), [((1, 28, 28), 32), ((3, 13, 9), 32), ((3, 64, 64), 32)])
def test_method_computes_images_in_blocks_without_a_remainder(image: tuple[int, int, int], slots: int) -> None:
    # Five dimensions of code need 32 rows to fill a run of 32 numbers, sixteen need two.
    model = small_model(image=image)
    for which in ("member", "ensemble"):
        assert methods.slots(model, which) == slots
    model.vae.config = replace(model.vae.config, latent_dim=16)
    assert methods.slots(model, "ensemble") == (32 if image == (3, 13, 9) else 16)
    # The blocks of many members are small: their last long searches pay for every slot.
    assert model.image_ensemble is not None
    model.image_ensemble.config = replace(model.image_ensemble.config, num_members=50)
    assert methods.slots(model, "ensemble") == (32 if image == (3, 13, 9) else 4)


@pytest.mark.parametrize(("side", "member", "ensemble"), [(28, 8192, 163), (64, 2048, 163), (224, 167, 163)])
def test_method_computes_as_many_images_on_a_gpu_as_fit_its_memory(side: int, member: int, ensemble: int) -> None:
    model = small_model().to("meta")
    model.vae.config = replace(model.vae.config, image_shape=(3, side, side))
    assert model.image_ensemble is not None
    model.image_ensemble.config = replace(model.image_ensemble.config, num_members=50)
    assert (methods.slots(model, "member"), methods.slots(model, "ensemble")) == (member, ensemble)


def test_large_image_classifiers_are_computed_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    x = questions(model, 9).x
    together = methods.image_classifier(model, "ensemble")
    assert isinstance(together, ImageEnsemble) and methods.slots(model, "ensemble") == 32
    monkeypatch.setattr(methods, "APART_BYTES", 1)
    apart = methods.image_classifier(model, "ensemble")
    assert not isinstance(apart, ImageEnsemble)
    torch.testing.assert_close(apart(x), together(x), atol=1e-5, rtol=1e-5)
    # More rows share each reading of the weights than the number of members would allow.
    assert model.image_ensemble is not None
    model.vae.config = replace(model.vae.config, latent_dim=16, image_shape=(1, 28, 28))
    model.image_ensemble.config = replace(model.image_ensemble.config, num_members=50)
    assert methods.slots(model, "ensemble") == 16


@pytest.mark.parametrize("method", ["revise_e", "revise_e_latent", "schut"])
def test_members_one_after_another_give_a_row_the_same_bits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "APART_BYTES", 100)
    test_method_gives_a_row_the_same_bits_in_any_batch(method, (3, 13, 9))


@pytest.mark.parametrize("method", METHODS)
def test_method_starts_where_the_paper_says(method: str) -> None:
    model = small_model()
    pairs = questions(model, 4)
    found = METHODS[method].search(model, pairs, SearchConfig(max_steps=0))
    if METHODS[method].space == "image":
        expected = pairs.x
    elif method == "latent" or method.startswith("revise"):
        expected = sample(pairs)
    else:
        expected = pairs.z
    torch.testing.assert_close(found.point, expected)
    assert found.steps.tolist() == [0] * 4


@pytest.mark.parametrize("method", METHODS)
def test_method_continues_from_a_point_and_measures_distances_as_before(method: str) -> None:
    model = small_model()
    pairs = questions(model, 6)
    config = SearchConfig(max_steps=3, min_target_prob=0.9999, distance_weight=0.02)
    search = METHODS[method].search
    first = search(model, pairs, config)
    onward = search(model, replace(pairs, point=first.point), config)
    assert torch.equal(onward.target_prob_initial, first.target_prob_final)
    # One step from there in the transcription, whose distances are to the image or its code.
    single = replace(config, max_steps=1)
    found = search(model, replace(pairs, point=first.point), single, engine="plain")
    moved = search(model, replace(pairs, point=first.point), replace(single, distance_weight=0.0), engine="plain")
    assert torch.equal(found.target_prob_initial, moved.target_prob_initial)
    if method != "schut":  # which has no distance
        assert not torch.equal(found.point, moved.point)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.space == "latent"])
@pytest.mark.parametrize("refine", [False, True])
def test_method_on_codes_does_not_move_along_fixed_directions(method: str, refine: bool) -> None:
    model = small_model()
    pairs = questions(model, 7)
    fixed = torch.linalg.qr(torch.randn(LATENT, 2, generator=torch.Generator().manual_seed(0)))[0].contiguous()
    config = SearchConfig(max_steps=9, learning_rate=0.1, min_target_prob=0.4, refine=refine)
    start = METHODS[method].search(model, pairs, replace(config, max_steps=0)).point
    found = METHODS[method].search(model, pairs, config, fixed=fixed)
    assert (found.steps > 0).any() and ((found.point - start) @ fixed).abs().max() < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_refined_method_is_closer_and_gives_a_row_the_same_bits_in_any_batch(method: str) -> None:
    model = small_model()
    pairs = questions(model, 37)
    config = reachable(model, method, pairs, SearchConfig(max_steps=12, learning_rate=0.1))
    start = METHODS[method].search(model, pairs, replace(config, max_steps=0)).point.flatten(1)
    found = METHODS[method].search(model, pairs, config)
    closer = METHODS[method].search(model, pairs, replace(config, refine=True))
    assert found.converged.any() and torch.equal(found.converged, closer.converged)
    before, after = ((run.point.flatten(1) - start).abs().sum(1) for run in (found, closer))
    # One pixel at a time is sparse already: a repair along the whole gradient would not be closer.
    assert (after <= before * (1 + 1e-6)).all() and (method == "schut" or after.sum() < before.sum())
    assert METHODS[method].space == "latent" or (closer.point.min() >= 0 and closer.point.max() <= 1)
    for index in (torch.tensor([30]), torch.randperm(37, generator=torch.Generator().manual_seed(1))):
        alone = METHODS[method].search(model, pairs.select(index), replace(config, refine=True), threads=2)
        assert_same_bits(alone, closer, index)


@pytest.mark.parametrize("method", METHODS)
def test_method_leaves_the_model_as_it_was(method: str) -> None:
    model = small_model()
    networks = (model.vae, model.ensemble, model.image_ensemble)
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in networks if net is not None]
    METHODS[method].search(model, questions(model, 3), SearchConfig(max_steps=2))
    for net, state in zip(networks, before):
        assert net is not None and not net.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("method", ON_IMAGES)
def test_method_on_images_says_what_a_model_lacks(method: str) -> None:
    model = replace(small_model(), image_ensemble=None)
    pairs = questions(model, 3)
    with pytest.raises(ValueError, match="train it with image_members"):
        METHODS[method].search(model, pairs, SearchConfig())
    with pytest.raises(ValueError, match="train it with image_members"):
        classifier_logits(model, method, pairs.x if METHODS[method].space == "image" else pairs.z)
    with pytest.raises(ValueError, match="searches over latent classifiers only"):
        METHODS[method].search(small_model(), pairs, SearchConfig(), engine="batched")
