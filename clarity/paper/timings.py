"""How fast a gradient and an update are: Eq. 5 beside Eq. 3, and Clarity beside REVISE-E."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clarity.classifiers import ImageEnsemble
from clarity.methods import METHODS, Pairs
from clarity.model import Model
from clarity.paper.compare import NAMES, Images, first_pairs, pairs_of
from clarity.report.text import number, plural
from clarity.search import SearchConfig

#: Pairs of a batch in which steps are timed.
STEP_PAIRS = 128


def time_steps(model: Model, config: SearchConfig, images: Images) -> list[dict[str, Any]]:
    """The paper's claim on speed, both sides with the same number of members.

    ``gradient`` rows time one gradient of the loss with respect to the codes in plain PyTorch, for one image and for
    STEP_PAIRS pairs; ``search`` rows time an update of one pair in searches of STEP_PAIRS pairs, each by its engine.
    Medians over repeats in which all take turns; ``ratio`` is the median of the repeats' own, ``_low`` and ``_high``
    the least and the largest.
    """
    ensemble = model.image_ensemble
    if ensemble is None:
        return []
    members = min(ensemble.config.num_members, model.ensemble.config.num_members)
    # So close to certainty that next to no row ends early: what is timed is the step.
    long = replace(config, min_target_prob=1 - 1e-6, max_steps=10)
    rows: list[dict[str, Any]] = []
    for batch in (1, STEP_PAIRS):
        pairs = pairs_of(model, images, *first_pairs(images, batch, model.num_classes))
        for fast, slow, count in (("latent", "revise", 1), ("clarity", "revise_e", members)):
            latent, image = model.ensemble.select(range(count)), ensemble.select(range(count))
            about = {"fast": fast, "slow": slow, "members": count, "pairs": len(pairs)}

            def through_decoder(z: Tensor, image: ImageEnsemble = image) -> Tensor:
                return image(model.vae.decode(z))

            works = {
                "autograd": gradient_work(latent, pairs.z, pairs.target),
                slow: gradient_work(through_decoder, pairs.z, pairs.target),
            }
            rows += compare_works({"kind": "gradient", **about}, works)
            if batch == 1:
                continue
            same = replace(model, ensemble=latent, image_ensemble=image)

            def search(method: str, engine: str, same: Model = same, pairs: Pairs = pairs) -> int:
                return int(METHODS[method].search(same, pairs, long, engine=engine).steps.sum())

            chosen = METHODS[fast].search(same, pairs, replace(long, max_steps=0)).engine
            works = {engine: partial(search, fast, engine) for engine in dict.fromkeys((chosen, "plain"))}
            rows += compare_works({"kind": "search", **about}, {**works, slow: partial(search, slow, "auto")})
    return rows


def compare_works(about: Mapping[str, Any], works: Mapping[str, Callable[[], int]]) -> list[dict[str, Any]]:
    """One row for each work but the last, timed against the last."""
    seconds = seconds_in_turns(works)
    *engines, last = works
    rows = []
    for engine in engines:
        ratios = seconds[last] / seconds[engine]
        times = {"fast_ms": 1000 * np.median(seconds[engine]), "slow_ms": 1000 * np.median(seconds[last])}
        times |= {"ratio": np.median(ratios), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
        rows.append({**about, "engine": engine, **{name: float(value) for name, value in times.items()}})
    return rows


def gradient_work(logits_of: Callable[[Tensor], Tensor], z: Tensor, target: Tensor) -> Callable[[], int]:
    """One gradient of the mean cross-entropy over members with respect to codes z (B, D) in plain PyTorch, as work.

    ``logits_of`` maps codes to logits (M, B, K).
    """
    point = z.detach().clone().requires_grad_()

    def gradient() -> int:
        logits = logits_of(point)
        loss = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(logits)), reduction="sum") / len(logits)
        torch.autograd.grad(loss, point)
        return 1

    return gradient


def seconds_in_turns(
    works: Mapping[str, Callable[[], int]], *, repeats: int = 7, at_least: float = 0.1
) -> dict[str, np.ndarray]:
    """Seconds of one unit of each work, (``repeats``,).

    A work is a function that returns how many units it has done. In each repeat all works have their turn of at least
    ``at_least`` seconds, so that what else the machine does meets all of them: compare within a repeat.
    """
    for work in works.values():
        work()  # what the first call alone costs
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            units, begin = 0, time.perf_counter()
            while (spent := time.perf_counter() - begin) < at_least:
                units += work()
            seconds[name].append(spent / units)
    return {name: np.array(values) for name, values in seconds.items()}


def describe_step(row: Mapping[str, Any]) -> str:
    """One row of ``time_steps`` in words."""
    what = "a gradient" if row["kind"] == "gradient" else "an update of one pair"
    sizes = f"{plural(row['pairs'], 'pair')}, {plural(row['members'], 'member')} each"
    fast, slow = (f"{NAMES[row[name]]} {number(row[f'{name}_ms'])} ms" for name in ("fast", "slow"))
    low, ratio, high = (number(row[name]) for name in ("ratio_low", "ratio", "ratio_high"))
    return f"{what}, {sizes}, engine {row['engine']}: {fast}, {slow}, {ratio} times [{low}, {high}]"
