"""Metrics against slow transcriptions of their definitions, and against closed forms."""

from itertools import pairwise
from math import log
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from clarity import schema
from clarity.judges import predict_probs
from clarity.paper import metrics, tables
from clarity.paper.evaluators import Judges

B, C, H, W, K, F = 3, 2, 8, 12, 4, 5


def images(seed: int, rows: int = B) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, C, H, W)).astype(np.float32)


def test_sparsity_counts_pixels_not_channels() -> None:
    a = np.zeros((1, C, H, W), dtype=np.float32)
    b = a.copy()
    b[0, 0, 2, 3] = 0.11
    b[0, :, 4, 5] = -0.5
    b[0, 1, 6, 7] = 0.09
    assert metrics.sparsity(b, a)[0] == pytest.approx(2 / (H * W))


def test_im1_and_im2_follow_their_definitions() -> None:
    x, target, source, every = (images(seed) for seed in range(4))
    for i in range(B):
        top = sum((float(p) - float(q)) ** 2 for p, q in zip(x[i].ravel(), target[i].ravel()))
        bottom = sum((float(p) - float(q)) ** 2 for p, q in zip(x[i].ravel(), source[i].ravel()))
        assert metrics.im1(x, target, source)[i] == pytest.approx(top / (bottom + 1e-7))
        gap = sum((float(p) - float(q)) ** 2 for p, q in zip(target[i].ravel(), every[i].ravel()))
        assert metrics.im2(x, target, every)[i] == pytest.approx(gap / (float(np.abs(x[i]).sum()) + 1e-7))


def test_implausibility_is_the_mean_of_the_nearest() -> None:
    rng = np.random.default_rng(3)
    rows, real = rng.normal(size=(2100, F)), rng.normal(size=(17, F))
    slow = [sorted(float(np.linalg.norm(row - other)) for other in real)[:3] for row in rows]
    assert np.allclose(metrics.implausibility(rows, real, 3), np.mean(slow, axis=1))
    assert np.isnan(metrics.implausibility(rows[:4], real[:2], 3)).all()


def slow_cout(x: np.ndarray, x_cf: np.ndarray, source: int, target: int, predict, steps: int) -> float:
    pixels = [(i, j) for i in range(H) for j in range(W)]
    pixels.sort(key=lambda p: -float(np.abs(x_cf[:, p[0], p[1]] - x[:, p[0], p[1]]).sum()))
    now, curve = x.copy(), []
    for step in range(steps + 1):
        for i, j in pixels[: round(H * W * step / steps)]:
            now[:, i, j] = x_cf[:, i, j]
        curve.append(predict(now[None])[0])
    area = [sum((a[k] + b[k]) / 2 for a, b in pairwise(curve)) / steps for k in (target, source)]
    return float(area[0] - area[1])


def test_cout_matches_a_slow_walk() -> None:
    weight = np.random.default_rng(5).normal(size=(C * H * W, K))

    def predict(batch: np.ndarray) -> np.ndarray:
        logits = batch.reshape(len(batch), -1) @ weight
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    x, x_cf = images(6), images(7)
    source, target = np.array([0, 1, 2]), np.array([3, 0, 1])
    fast = metrics.cout(x, x_cf, source, target, predict, steps=7)
    slow = [slow_cout(x[i], x_cf[i], source[i], target[i], predict, 7) for i in range(B)]
    assert np.allclose(fast, slow, atol=1e-6)


def test_jensen_shannon_is_zero_symmetric_and_at_most_log_two() -> None:
    p, q = np.array([0.0, 0.3, 1.0]), np.array([1.0, 0.3, 0.2])
    divergence = metrics.jensen_shannon(p, q)
    assert divergence[0] == pytest.approx(log(2), abs=1e-6) and divergence[1] == pytest.approx(0, abs=1e-12)
    assert np.allclose(divergence, metrics.jensen_shannon(q, p))
    middle = 0.6
    slow = sum(
        0.5 * (a * log(a / m) if a else 0) + 0.5 * (b * log(b / m) if b else 0)
        for a, b, m in ((1.0, 0.2, middle), (0.0, 0.8, 1 - middle))
    )
    assert divergence[2] == pytest.approx(slow, abs=1e-6)


def test_frechet_distance_matches_the_definition_where_covariances_do_not_commute() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(700, F)) @ rng.normal(size=(F, F))
    b = rng.normal(size=(600, F)) @ rng.normal(size=(F, F)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()  # eigenvalues of a product of two covariances
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a[:500], b[:499]) is None, "of too few images"


def test_clustered_mean_counts_images_not_rows() -> None:
    per_image = np.random.default_rng(2).normal(size=100)
    rows = np.repeat(per_image, 9)  # nine identical pairs an image carry the information of one
    mean, low, high = metrics.clustered_mean(rows, np.repeat(np.arange(100), 9))
    width = 2 * 1.96 * per_image.std(ddof=1) / 10
    assert mean == pytest.approx(per_image.mean()) and high - low == pytest.approx(width)
    _, naive_low, naive_high = metrics.clustered_mean(rows, np.arange(900))
    assert naive_high - naive_low < 0.5 * width
    assert metrics.clustered_mean(np.array([1.0, np.nan, 3.0]), np.array(["a", "a", "b"]))[0] == 2
    assert np.isnan(metrics.clustered_mean(np.array([np.nan]), np.array(["a"]))).all()


def test_clustered_share_is_wide_where_rows_of_an_image_agree() -> None:
    values = np.repeat(np.array([1.0, 0.0, 1.0, 1.0]), 25)
    share, low, high = metrics.clustered_share(values, np.arange(100))
    assert share == 0.75 and 0 < low < share < high < 1
    _, wide_low, wide_high = metrics.clustered_share(values, np.repeat(np.arange(20), 5))
    assert (wide_high - wide_low) > 1.8 * (high - low)
    groups, edge = np.repeat(np.arange(100), 9), 0.025**0.01  # of none and of all it is not empty
    assert metrics.clustered_share(np.ones(900), groups) == pytest.approx((1, edge, 1))
    assert metrics.clustered_share(np.zeros(900), groups) == pytest.approx((0, 0, 1 - edge))


def scored_table(**columns: Any) -> pa.Table:
    rows = len(columns["image_id"])
    return pa.table(columns | {"features": schema.fixed_size_list(np.zeros((rows, 2), np.float32))})


def test_rows_by_pair_are_all_pairs_then_each() -> None:
    table = scored_table(
        image_id=["a", "a", "b", "c"],
        source=[0, 0, 0, 1],
        target=[1, 2, 1, 2],
        strict_validity=[1.0, 0.0, 1.0, 1.0],
        epistemic_final=[float("nan")] * 4,
    )
    real = metrics.Reality([np.zeros((9, 2))] * 3, [])
    rows = tables.rows_by_pair(table, real)
    assert [(row["source"], row["target"]) for row in rows] == [(None, None), (0, 1), (0, 2), (1, 2)]
    assert [row["num_pairs"] for row in rows] == [4, 2, 1, 1] and rows[0]["num_images"] == 3
    assert [row["strict_validity"] for row in rows] == [0.75, 1, 0, 1]
    assert rows[0]["frechet_distance"] is None  # of too few images
    assert rows[0]["epistemic_final"] is None and rows[0]["epistemic_final_low"] is None
    assert 0 <= rows[0]["strict_validity_low"] < 0.75 < rows[0]["strict_validity_high"] <= 1


def test_rows_by_pair_leave_a_mean_over_targets_out_when_one_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    table = scored_table(image_id=["a", "b", "c"], source=[0, 0, 0], target=[1, 1, 2], steps=[3.0, 3.0, 4.0])
    real = metrics.Reality([np.zeros((9, 2)), np.zeros((7, 2)), np.zeros((8, 2))], [])
    monkeypatch.setattr(metrics, "frechet_distance", lambda a, b: float(len(b)))
    assert tables.rows_by_pair(table, real)[0]["frechet_distance"] == 7.5
    monkeypatch.setattr(metrics, "frechet_distance", lambda a, b: 1.0 if len(a) > 1 and len(b) == 7 else None)
    rows = tables.rows_by_pair(table, real)
    assert rows[0]["frechet_distance"] is None and rows[1]["frechet_distance"] == 1
    assert rows[0]["steps"] == pytest.approx(10 / 3)


def test_judge_images_answers_for_every_row() -> None:
    torch.manual_seed(0)
    judges = Judges((C, H, W), "abcd", ("hat", "beard"))
    rng = np.random.default_rng(0)
    real_images = rng.integers(0, 256, (60, C, H, W)).astype(np.uint8)
    real = metrics.split_reality(judges, real_images, np.arange(60) % K)
    assert [len(features) for features in real.features] == [8, 8, 8, 8] == [len(drawn) + 1 for drawn in real.images]
    for k, others in enumerate(real.images):  # the other half, drawn from by turns
        assert np.array_equal(others, real_images[k::K][1::2])
    x, drawn, x_cf = (rng.integers(0, 256, (B, C, H, W)).astype(np.uint8) for _ in range(3))
    source, target = np.array([0, 1, 3]), np.array([2, 0, 1])
    only, every = np.array([True, False]), np.ones(B, bool)
    out = metrics.judge_images(judges, real, x, drawn, x_cf, source, target, only, every)
    assert all(len(values) == B for values in out.values())
    assert np.allclose(out["l1_x"], np.abs(x_cf / 255.0 - x / 255.0).sum((1, 2, 3)), rtol=1e-5)
    assert out["features"].shape == (B, 64) and (np.abs(out["cout"]) <= 1).all()
    with torch.inference_mode():
        rebuilt = judges.autoencoders[2](torch.from_numpy(x_cf[:1]) / 255).numpy()
        common = judges.autoencoders[K](torch.from_numpy(x_cf[:1]) / 255).numpy()
    seen = predict_probs(judges.oracle, x_cf)
    target[0], target[1] = seen[0].argmax(), (seen[1].argmax() + 1) % K
    source[0] = (target[0] + 1) % K
    again = metrics.judge_images(judges, real, x, drawn, x_cf, source, target, only, ~every)
    assert again["oracle_agreement"][:2].tolist() == [1, 0]
    assert np.allclose(again["oracle_target_prob"], seen[np.arange(B), target])
    expected = ((rebuilt - common) ** 2).sum() / (x_cf[0].sum() / 255 + 1e-7)
    assert out["im2"][0] == pytest.approx(expected, rel=1e-4)
    one = (images[1:2] for images in (x, drawn, x_cf, source, target))
    alone = metrics.judge_images(judges, real, *one, ~only, every[:1])
    assert np.isnan(again["cout"]).all() and alone["label_variation"][0] != out["label_variation"][1]
    assert alone["implausibility"][0] == pytest.approx(again["implausibility"][1], rel=1e-4)
    assert set(metrics.METRICS_DOC) > {"label_variation", "im1"} and "flip_beard" in out


def test_monotonicity_and_plateaus_of_known_curves() -> None:
    rising, wave, flat = np.linspace(0, 1, 101), np.array([0, 1, 0, 1.0]), np.zeros(5)
    assert metrics.monotonicity(rising) == pytest.approx(1)
    assert metrics.monotonicity(wave) == pytest.approx(1 / 3)
    assert metrics.monotonicity(np.stack([wave, -wave])) == pytest.approx([1 / 3, -1 / 3])
    assert metrics.plateau_width(rising, margin=0.0999) == pytest.approx(20 / 101)
    assert metrics.plateau_width(flat) == 1
    assert metrics.steepest(rising) == pytest.approx(1) and metrics.steepest(wave) == pytest.approx(3)


def test_gradient_spread_recovers_noise_over_signal() -> None:
    rng = np.random.default_rng(0)
    signal = np.zeros((1, 400, F))
    signal[..., 0] = 2.0
    spread = metrics.gradient_spread(signal + rng.normal(size=(60, 400, F)))
    assert spread["noise_to_signal"] == pytest.approx(F / 4, rel=0.05)
    two = np.array([[[1.0, 0.0]], [[3.0, 0.0]]])  # mean 2, variance 2 of one member, 1 of their mean
    assert metrics.gradient_spread(two)["noise_to_signal"] == pytest.approx(2 / (4 - 1))
    same = metrics.gradient_spread(np.repeat(signal, 3, axis=0))
    assert same["noise_to_signal"] == pytest.approx(0, abs=1e-9) and same["mean_cosine"] == pytest.approx(1)
