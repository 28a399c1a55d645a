"""What depends on an image id alone: fixed for good, even, and the same in any company."""

import random

import numpy as np

from clarity.ids import fold_of, in_judges_half, noise, sample, split_of

NOISE_OF_A = [-0.3529, -0.6566, -0.7392]
SPLIT_TEST = [0, 13, 17, 26, 28, 35]


def test_noise_depends_on_the_image_alone() -> None:
    ids = [f"img-{number}" for number in range(2_000)] + ["ü\n", ""]
    drawn = noise(ids, 5)
    assert (drawn.shape, drawn.dtype) == ((2_002, 5), np.float32)
    assert np.array_equal(noise(ids[::-1], 5), drawn[::-1])
    assert np.array_equal(noise(ids[7:8], 5), drawn[7:8])
    assert noise([], 5).shape == (0, 5)
    # A fixed value: another release must not draw other noise for the same image.
    assert np.allclose(noise(["a"], 3), [NOISE_OF_A], atol=1e-4)


def test_noise_is_standard_normal() -> None:
    drawn = noise([str(number) for number in range(20_000)], 5)
    assert np.abs(drawn.mean(axis=0)).max() < 0.03
    assert np.abs(np.cov(drawn.T) - np.eye(5)).max() < 0.04
    assert abs((drawn**4).mean() - 3) < 0.1
    assert np.isfinite(drawn).all()


def test_split_of_puts_a_tenth_into_test_for_good() -> None:
    splits = [split_of(f"class/{number}.png") for number in range(10_000)]
    assert 900 < splits.count("test") < 1_100
    assert [number for number in range(40) if splits[number] == "test"] == SPLIT_TEST


def test_folds_are_even_and_fixed() -> None:
    folds = [fold_of(str(i), 5) for i in range(5000)]
    assert set(folds) == set(range(5))
    assert all(900 < folds.count(f) < 1100 for f in range(5))
    assert [fold_of(name, 5) for name in ("0", "1", "photos/ant/3.jpg")] == [0, 0, 3]


def test_half_depends_on_the_id_alone() -> None:
    names = [f"train/{i}" for i in range(4000)]
    half = in_judges_half(names)
    assert 0.45 < half.mean() < 0.55
    assert np.array_equal(in_judges_half(names[::-1]), half[::-1])


def test_sample_is_spread_over_the_classes_and_grows() -> None:
    names = [f"{kind}/{number}.png" for kind in ("ant", "bee") for number in range(500)]
    few, more = sample(names, 100), sample(names, 300)
    assert few == sorted(few) and set(few) < set(more) and 35 < sum(row < 500 for row in few) < 65
    order = random.Random(0).sample(names, len(names))
    assert {order[row] for row in sample(order, 100)} == {names[row] for row in few}
    assert sample(names[:3], 9) == [0, 1, 2]
