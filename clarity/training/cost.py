"""What a training costs: updates of each network, and seconds, from timing a few updates on random images.

Does not know files; reads no image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from clarity.judges import build_judge
from clarity.training.judge import train_judge
from clarity.training.loops import Codes, num_epochs, train_image_members, train_latent_members, train_vae
from clarity.training.loops import updates_per_epoch as per_epoch
from clarity.training.plan import TrainingPlan
from clarity.training.recipe import ENSEMBLE_UPDATES, MEMBERS, VAE_UPDATES, num_trials, searched_codes

#: Rows of a timed update, and how many are timed; the first warms up.
ROWS = 32
TIMED = 3


@dataclass(frozen=True)
class Cost:
    """What one part of a training costs: ``networks`` of it, ``updates`` each, ``seconds`` in all."""

    part: str
    networks: int
    updates: int
    seconds: float


def costs(plan: TrainingPlan) -> list[Cost]:
    """The cost of each part of a training, without reading and writing files.

    With ``searched`` values, the largest code that the search may choose is assumed.
    """
    codes_tried = searched_codes(plan) if plan.searched else []
    dim = max((dim for dim, _ in codes_tried), default=plan.vae.latent_dim)
    vae, ensemble = replace(plan.vae, latent_dim=dim), replace(plan.ensemble, latent_dim=dim)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (ROWS, *vae.image_shape), generator=generator).to(torch.uint8)
    labels = torch.arange(len(images)) % ensemble.num_classes
    codes = Codes(torch.randn(len(images), dim, generator=generator), torch.zeros(len(images), dim), labels)
    short: dict[str, Any] = {"epochs": TIMED, "min_updates": 0, "batch_size": len(images)}

    def of_vae() -> float:
        return seconds(train_vae(images, vae, replace(plan.vae_training, **short)))

    def of_members(count: int) -> float:
        training = replace(plan.ensemble_training, **short)
        return seconds(train_latent_members(codes, replace(ensemble, num_members=count), training, range(count)))

    def of_image_member() -> float:
        one = replace(plan.image_ensemble, num_members=1)
        return seconds(train_image_members(images, labels, one, vae, replace(plan.image_training, **short), [0]))

    def of_judge() -> float:
        assert plan.judge_training is not None
        net, training = build_judge(vae.image_shape, ensemble.num_classes), plan.judge_training
        training = replace(training, updates=TIMED, batch_size=len(images))
        return seconds(train_judge(net, images.numpy(), labels.numpy(), training))

    def cost(part: str, networks: int, updates: int, batch: int, timed: Callable[[], float]) -> Cost:
        return Cost(part, networks, updates, networks * updates * timed() * batch / len(images))

    def updates(training: Any, rows: int) -> int:
        return num_epochs(training, rows) * per_epoch(rows, training.batch_size)

    counted, batch = plan.data, plan.ensemble_training.batch_size
    rows = counted["labelled"] if plan.predictor is None else counted["codes"]
    found = []
    if (judge := plan.judge_training) is not None and counted["labelled"]:
        found.append(cost("judge", 1, judge.updates, judge.batch_size, of_judge))
    if plan.searched:
        found.append(cost("search: VAEs", len(codes_tried), VAE_UPDATES, plan.vae_training.batch_size, of_vae))
        timed = cost("search: ensembles", num_trials(plan), ENSEMBLE_UPDATES, batch, lambda: of_members(MEMBERS))
        found.append(timed)
    found.append(cost("VAE", 1, updates(plan.vae_training, counted["images"]), plan.vae_training.batch_size, of_vae))
    ensembles, members = 1 + plan.num_folds, ensemble.num_members
    found.append(
        cost("ensembles", ensembles, updates(plan.ensemble_training, rows), batch, lambda: of_members(members))
    )
    if plan.image_members:
        training, count = plan.image_training, updates(plan.image_training, counted["labelled"])
        found.append(cost("image ensemble", plan.image_members, count, training.batch_size, of_image_member))
    return found


def seconds(loop: Iterable[Any]) -> float:
    """The shortest time between two items of a training loop."""
    times = []
    for _ in loop:
        times.append(time.perf_counter())
    return float(np.diff(times).min())
