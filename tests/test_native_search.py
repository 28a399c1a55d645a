"""The compiled search on CPUs."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from searches import CONFIG, SIZES, arguments_of, assert_agree_with_plain, make_layers, make_rows
from torch import Tensor

from clarity import native_search
from clarity.search import SearchConfig

BUILDS = list(native_search.modules())

native = pytest.mark.skipif(not BUILDS, reason="the native search is not built here")


def run_native(*args: Any, threads: int = 1, build: str | None = None, **change: Any) -> dict[str, Tensor]:
    return native_search.search(*arguments_of(*args, **change), threads, build or BUILDS[0])


@contextmanager
def raising_after(seconds: float) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise InterruptedError("the timer's")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@native
@pytest.mark.parametrize(("members", "sizes"), SIZES)
def test_native_searches_agree_with_the_plain_one(members: int, sizes: tuple[int, ...]) -> None:
    layers = make_layers(members, sizes)
    z, target = make_rows(layers, 203)
    config = replace(CONFIG, min_target_prob=0.6 if sizes[-1] < 20 else 0.2)
    searches = [run_native(layers, z, target, config, build=build) for build in BUILDS]
    assert_agree_with_plain(searches, layers, z, target, config)


@native
@pytest.mark.parametrize("build", BUILDS)
def test_native_probabilities_are_a_softmax_to_float32(build: str) -> None:
    weight = torch.eye(6).unsqueeze(0)
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(4)) * torch.logspace(-2, 1.3, 500).unsqueeze(1)
    target = torch.arange(500) % 6
    config = replace(CONFIG, max_steps=0)
    found = run_native([(weight, torch.zeros(1, 6))], z, target, config, build=build)["target_prob_initial"]
    expected = torch.softmax(z.double(), dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    # The logits' own rounding, up to 60 units of 6e-8 each, comes on top of 2 ulp of the powers.
    assert ((found - expected).abs() <= expected * (4e-7 + 2e-7 * z.abs().amax(dim=1))).all()


@native
@pytest.mark.parametrize("build", BUILDS)
def test_native_search_pulls_towards_the_reference(build: str) -> None:
    """With flat classifiers only the distance acts: each update is one learning rate towards the reference."""
    layers = [(torch.zeros(2, 3, 4), torch.zeros(2, 4))]
    z = torch.zeros(2, 3)
    reference = torch.tensor([[1.0, -1.0, 0.0], [-2.0, 0.0, 3.0]])
    config = SearchConfig(min_target_prob=0.9, max_steps=4, distance_weight=0.5, learning_rate=0.01)
    found = run_native(layers, z, torch.tensor([0, 3]), config, reference=reference, build=build)
    assert torch.allclose(found["point"], 0.04 * reference.sign(), atol=1e-6)
    assert torch.equal(found["target_prob_final"], torch.tensor([0.25, 0.25]))


@native
@pytest.mark.parametrize("build", BUILDS)
def test_native_module_rejects_arrays_of_other_types_or_shapes(build: str) -> None:
    layers = make_layers(2, (5, 6, 7, 4))
    z, target = make_rows(layers, 9)
    good: dict[str, Any] = {
        "weights": [weight.numpy() for weight, _ in layers],
        "biases": [bias.numpy() for _, bias in layers],
        "start": z.numpy(),
        "reference": z.numpy(),
        "target": target.numpy(),
        "point": np.empty((9, 5), np.float32),
        "steps": np.empty(9, np.int32),
        "target_prob_initial": np.empty(9, np.float32),
        "target_prob_final": np.empty(9, np.float32),
        "finite": np.empty(9, np.bool_),
        "min_target_prob": np.full(9, 0.9, np.float32),
        "fixed": np.zeros((0, 5), np.float32),
        "max_steps": 5,
        "distance_weight": 0.0,
        "learning_rate": 0.1,
        "threads": 1,
    }
    search = native_search.modules()[build].search
    assert search(**good) is None
    frozen = np.empty((9, 5), np.float32)
    frozen.flags.writeable = False
    for name, value in [
        ("start", z.double().numpy()),
        ("start", np.zeros((5, 9), np.float32).T),
        ("start", "text"),
        ("weights", [None, None, None]),
        ("weights", tuple(good["weights"])),
        ("target", target.int().numpy()),
        ("target", target.numpy() + 1),
        ("target", -target.numpy()),
        ("weights", good["weights"][::-1]),
        ("weights", []),
        ("threads", 0),
        ("point", np.empty((9, 4), np.float32)),
        ("point", frozen),
        ("steps", np.empty(9, np.int64)),
        ("finite", np.empty(8, np.bool_)),
        ("max_steps", -1),
        ("learning_rate", float("nan")),
        ("min_target_prob", np.full(9, np.nan, np.float32)),
        ("min_target_prob", np.full(8, 0.9, np.float32)),
        ("fixed", np.zeros((1, 4), np.float32)),
    ]:
        with pytest.raises(ValueError):
            search(**good | {name: value})


@native
def test_native_search_releases_the_gil_and_handles_signals() -> None:
    layers = make_layers(7, (16, 16, 16, 10), scale=0.01)
    z, target = make_rows(layers, 2000)
    endless = SearchConfig(min_target_prob=0.9999, max_steps=2_000_000_000)
    seen: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen.append(time.monotonic())

    thread = threading.Thread(target=look)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(InterruptedError, match="the timer's"), raising_after(0.5):
            run_native(layers, z, target, endless)
    finally:
        over.set()
        thread.join()
    assert time.monotonic() - began < 20
    assert len(seen) > 3


@native
def test_native_modules_leave_denormal_numbers_alone() -> None:
    run_native(make_layers(3, (5, 4)), *make_rows(make_layers(3, (5, 4)), 4))
    tiny = np.float32(1e-40)
    assert tiny * np.float32(1) == tiny
    assert tiny != 0


def test_native_builds_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        @staticmethod
        def builds() -> tuple[str, ...]:
            return "avx512", "avx2", "base"

    built = {"base": Base, "avx2": object()}
    monkeypatch.setattr(native_search, "import_build", built.get)
    assert list(native_search.modules.__wrapped__()) == ["avx2", "base"]
    monkeypatch.setattr(native_search, "import_build", {"avx2": object()}.get)
    assert native_search.modules.__wrapped__() == {}, "only the plain build may ask the processor"
