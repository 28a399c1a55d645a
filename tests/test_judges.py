"""A held-out judge learns, is repeatable, and reads bytes and floats alike."""

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from networks import BUILD_NAMES, BUILDS

from clarity import compiled
from clarity.judges import JudgeNet, build_judge, judge_rows, predict_features, predict_probs, probs_of_features
from clarity.training.judge import JudgeTraining, augmented, train_judge

C, H, W, K = 3, 8, 12, 4


pytestmark = pytest.mark.usefixtures("single_thread")


def bars(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of a bright bar whose column is the class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (number, C, H, W)).astype(np.uint8)
    labels = np.arange(number) % K
    for i in range(number):
        images[i, :, :, 3 * labels[i] : 3 * labels[i] + 3] = 220
    return images, labels


def trained_judge(updates: int = 40, precision: str = "auto") -> tuple[JudgeNet, list[float]]:
    images, labels = bars(160)
    labels[:8] = -1
    torch.manual_seed(0)
    net = build_judge((C, H, W), K)
    augmentation = {"shift": 0.02, "turn": 0.05, "scale": 0.02}
    config = JudgeTraining(updates=updates, batch_size=16, precision=precision, **augmentation)
    return net, [report["loss"] for report in train_judge(net, images, labels, config)]


@pytest.fixture(scope="module")
def judge() -> JudgeNet:
    net, losses = trained_judge()
    assert losses[-1] < losses[0]
    return net


def test_judge_learns(judge: JudgeNet) -> None:
    images, labels = bars(60, seed=2)
    probs = predict_probs(judge, images)
    assert probs.shape == (60, K) and np.allclose(probs.sum(1), 1, atol=1e-5)
    assert (probs.argmax(1) == labels).mean() > 0.9


def test_judge_is_repeatable() -> None:
    weights = [trained_judge(3)[0].head.weight for _ in range(2)]
    assert torch.equal(*weights)
    shorter = trained_judge(3, "bf16")[0].head.weight
    assert shorter.dtype == torch.float32 and 0 < (shorter - weights[0]).abs().max() < 0.1


def test_judge_is_trained_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clarity.training.judge.mixed_precision", lambda *_: nullcontext())
    images, labels = bars(40)
    net = build_judge((C, H, W), K)
    training = train_judge(net, images, labels, JudgeTraining(updates=20, batch_size=16), device="meta")
    # Two updates run on a device without numbers, whose loss cannot be told.
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        next(training)
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}


def test_features_are_what_the_head_reads(judge: JudgeNet) -> None:
    images = bars(7, seed=5)[0]
    features = predict_features(judge, images)
    assert features.shape == (7, judge.config.num_features)
    assert np.allclose(probs_of_features(judge, features), predict_probs(judge, images), atol=1e-5)


@pytest.mark.parametrize("module", BUILDS, ids=BUILD_NAMES)
def test_judge_rows_do_not_depend_on_the_batch(judge: JudgeNet, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "maps_module", lambda: module)
    judge = copy.deepcopy(judge)
    x = torch.from_numpy(bars(150, seed=8)[0]).float() / 255
    together = judge_rows(judge, x)
    assert np.allclose(together, predict_probs(judge, x.numpy()), atol=1e-5)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(judge_rows(judge, x[order]), together[order])
    assert np.array_equal(judge_rows(judge, x[141:142]), together[141:142])


@pytest.mark.parametrize("module", BUILDS, ids=BUILD_NAMES)
@pytest.mark.parametrize("shape", [(1, 9, 14), (3, 40, 33), (2, 1, 3), (1, 131, 40)])
def test_judge_rows_agree_with_the_network(
    shape: tuple[int, int, int], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "maps_module", lambda: module)
    net, x = build_judge(shape, K), torch.rand(150, *shape)
    with torch.no_grad():
        net(x)  # moves the averages of BatchNorm
        for layer in net.trunk:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.uniform_(-1, 2)
                layer.bias.uniform_(-1, 1)
        expected = net.eval()(x).softmax(1).numpy()
    np.testing.assert_allclose(judge_rows(net, x), expected, atol=1e-5)


def test_large_images_get_another_block() -> None:
    assert len(build_judge((C, 33, 12), K).config.channels) == len(build_judge((C, 32, 12), K).config.channels) + 1


def test_images_above_64_pixels_are_seen_at_most_that_large() -> None:
    assert [build_judge((C, side, 20), K).config.square for side in (64, 65, 128, 129)] == [1, 2, 2, 3]
    net, x = build_judge((1, 128, 66), K).eval(), torch.rand(3, 1, 128, 66)
    mixed = x.view(3, 1, 64, 2, 33, 2).flip(3, 5).reshape(x.shape)  # the pixels of each square change places
    np.testing.assert_allclose(judge_rows(net, mixed), judge_rows(net, x), atol=1e-6)


def test_budget_follows_the_number_of_images() -> None:
    assert JudgeTraining.for_images(10).updates == 400
    assert JudgeTraining.for_images(12_800).updates == 1000
    assert JudgeTraining.for_images(10**6).updates == JudgeTraining().updates


def test_augmentation_keeps_range_and_moves_pixels() -> None:
    x = torch.rand(6, C, H, W, generator=torch.Generator().manual_seed(0))
    moved = augmented(x, JudgeTraining(), torch.Generator().manual_seed(1))
    assert moved.shape == x.shape and moved.min() >= 0 and moved.max() <= 1
    still = augmented(x, JudgeTraining(shift=0, turn=0, scale=0), torch.Generator().manual_seed(1))
    assert torch.allclose(still, x, atol=1e-5) and not torch.allclose(moved, x, atol=1e-2)
