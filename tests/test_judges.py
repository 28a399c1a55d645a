"""A held-out judge learns, is repeatable, and reads bytes and floats alike."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch

from clarity import kernels
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


def test_features_are_what_the_head_reads(judge: JudgeNet) -> None:
    images = bars(7, seed=5)[0]
    features = predict_features(judge, images)
    assert features.shape == (7, judge.config.num_features)
    assert np.allclose(probs_of_features(judge, features), predict_probs(judge, images), atol=1e-5)


def modules() -> list[ModuleType | None]:
    """The builds of the compiled judge that run here, and none."""
    names = [f"_clarity_judge_{build}" for build in kernels.native_modules()]
    return [*(import_module(name) for name in names if find_spec(name)), None]


@pytest.mark.parametrize("module", modules(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_judge_rows_do_not_depend_on_the_batch(
    judge: JudgeNet, module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "judge_module", lambda: module)
    x = torch.from_numpy(bars(150, seed=8)[0]).float() / 255
    together = judge_rows(judge, x)
    assert np.allclose(together, predict_probs(judge, x.numpy()), atol=1e-5)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(judge_rows(judge, x[order]), together[order])
    assert np.array_equal(judge_rows(judge, x[141:142]), together[141:142])


@pytest.mark.parametrize("module", modules(), ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("shape", [(1, 9, 14), (3, 40, 33), (2, 1, 3)])
def test_judge_rows_agree_with_the_network(
    shape: tuple[int, int, int], module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "judge_module", lambda: module)
    net, x = build_judge(shape, K), torch.rand(150, *shape)
    with torch.no_grad():
        net(x)  # moves the averages of BatchNorm
        for layer in net.trunk:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.uniform_(-1, 2)
                layer.bias.uniform_(-1, 1)
        expected = net.eval()(x).softmax(1).numpy()
    np.testing.assert_allclose(judge_rows(net, x), expected, atol=1e-5)


def test_builds_of_the_judge_with_fused_multiply_add_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = build_judge((1, 28, 28), K).eval(), torch.rand(40, 1, 28, 28)
    found = []
    for build in {"avx512", "avx2"} & set(kernels.native_modules()):
        monkeypatch.setattr(kernels, "judge_module", lambda build=build: import_module(f"_clarity_judge_{build}"))
        found.append(judge_rows(net, x))
    if len(found) < 2:
        pytest.skip("this processor runs one of them at most")
    assert np.array_equal(*found), "nodes of both kinds work at one audit"


def test_compiled_judge_refuses_arrays_that_do_not_fit() -> None:
    module = kernels.judge_module() or pytest.skip("the judge is not compiled here")
    fits = [np.zeros((2, 1, 4, 4), np.float32), 1, 4, 4, np.array([3, 5], np.int32)]
    fits += [np.zeros(size, np.float32) for size in (16 * (3 + 15), 8, 10)]
    module.features(*fits)
    wrong = {0: fits[0][..., 1:].copy(), 4: np.array([3], np.int32), 5: fits[5][1:], 7: fits[7][1:]}
    for index, value in wrong.items():
        with pytest.raises(ValueError, match="do not agree"):
            module.features(*fits[:index], value, *fits[index + 1 :])


def test_large_images_get_another_block() -> None:
    assert len(build_judge((C, 33, 12), K).config.channels) == len(build_judge((C, 32, 12), K).config.channels) + 1


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
