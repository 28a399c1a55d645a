"""What a training costs: updates of each network, and seconds, from timing a few updates on random images."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clarity.judges import build_judge
from clarity.training.judge import JudgeTraining, train_judge
from clarity.training.loops import Codes, num_epochs, train_image_members, train_latent_members, train_vae
from clarity.training.loops import updates_per_epoch as per_epoch
from clarity.training.plan import TrainingPlan
from clarity.training.recipe import (
    ENSEMBLE_UPDATES,
    IMAGES,
    LEAST_LABELLED,
    MEMBERS,
    VAE_UPDATES,
    num_trials,
    searched_codes,
    small_plan,
)
from clarity.training.sharp import train_sharp
from clarity.vae import VAE, VAEConfig

#: Rows of a timed update, and how many are timed; the first warms up.
ROWS = 32
TIMED = 6


@dataclass(frozen=True)
class Cost:
    """What one part of a training costs: ``networks`` of it, ``updates`` each, ``seconds`` in all."""

    part: str
    networks: int
    updates: int
    seconds: float


def costs(plan: TrainingPlan) -> list[Cost]:
    """The cost of each part of a training; with ``searched`` values, of the largest code that the search may choose."""
    small = small_plan(plan)
    codes_tried = searched_codes(small) if plan.searched and plan.data["labelled"] >= LEAST_LABELLED else []
    dim = max((code.latent_dim for code in codes_tried), default=plan.vae.latent_dim)
    weight = max((code.label_weight for code in codes_tried), default=plan.vae.label_weight)
    vae, ensemble = replace(plan.vae, latent_dim=dim, label_weight=weight), replace(plan.ensemble, latent_dim=dim)
    generator = torch.Generator().manual_seed(0)
    images, small_images = (
        torch.randint(0, 256, (ROWS, *shape), dtype=torch.uint8, generator=generator)
        for shape in (vae.image_shape, small.vae.image_shape)
    )
    labels = torch.arange(ROWS) % ensemble.num_classes
    codes = Codes(torch.randn(ROWS, dim, generator=generator), torch.zeros(ROWS, dim), labels)
    short: dict[str, Any] = {"epochs": TIMED, "min_updates": 0, "batch_size": ROWS}

    def cost(part: str, networks: int, updates: int, batch: int, timed: Iterable[Any]) -> Cost:
        return Cost(part, networks, updates, networks * updates * seconds(timed) * batch / ROWS)

    def updates(training: Any, rows: int) -> int:
        return num_epochs(training, rows) * per_epoch(rows, training.batch_size)

    def members(count: int) -> Iterable[Any]:
        training = replace(plan.ensemble_training, **short)
        return train_latent_members(codes, replace(ensemble, num_members=count), training, range(count))

    def image_net(part: str, outputs: int, training: JudgeTraining, vae: VAEConfig, images: Tensor) -> Cost:
        timed = replace(training, updates=TIMED, batch_size=ROWS)
        loop = train_judge(build_judge(vae.image_shape, outputs), images.numpy(), labels.numpy(), timed)
        return cost(part, 1, training.updates, training.batch_size, loop)

    def vaes(part: str, networks: int, updates: int, vae: VAEConfig, images: Tensor) -> Cost:
        guide = build_judge(vae.image_shape, known.shape[1]).eval().requires_grad_(False)
        epochs = train_vae(images, vae, replace(vae_training, **short), known=known, guide=guide)
        return cost(part, networks, updates, vae_training.batch_size, epochs)

    counted, ensemble_training, vae_training = plan.data, plan.ensemble_training, plan.vae_training
    known = torch.ones(ROWS, ensemble.num_classes + len(plan.attributes))
    rows = counted["labelled"] if plan.predictor is None else counted["codes"]
    found = []
    if (judge := plan.judge_training) is not None and counted["labelled"]:
        found.append(image_net("judge", ensemble.num_classes, judge, vae, images))
    if codes_tried:
        some = JudgeTraining.for_images(min(IMAGES, counted["labelled"]) // 2)
        small_vae = replace(small.vae, latent_dim=dim, label_weight=weight)
        if small is not plan:
            found.append(image_net("search: judge", ensemble.num_classes, some, small_vae, small_images))
        if weight:
            found.append(image_net("search: guide", known.shape[1], some, small_vae, small_images))
        found.append(vaes("search: VAEs", len(codes_tried), VAE_UPDATES, small_vae, small_images))
        trials, batch = num_trials(plan), ensemble_training.batch_size
        found.append(cost("search: ensembles", trials, ENSEMBLE_UPDATES, batch, members(MEMBERS)))
    found.append(vaes("VAE", 1, updates(vae_training, counted["images"]), vae, images))
    count, all_members = updates(ensemble_training, rows), members(ensemble.num_members)
    found.append(cost("ensembles", 1 + plan.num_folds, count, ensemble_training.batch_size, all_members))
    if plan.image_members:
        training, count = plan.image_training, updates(plan.image_training, counted["labelled"])
        one = replace(plan.image_ensemble, num_members=1)
        member = train_image_members(images, labels, one, vae, replace(training, **short), [0])
        found.append(cost("image ensemble", plan.image_members, count, training.batch_size, member))
    if (counted["labelled"] or plan.attributes) and (weight or plan.decoder == "sharp"):
        half = JudgeTraining.for_images(counted["images"] // 2)
        found.append(image_net("guide", known.shape[1], half, vae, images))
    if plan.decoder == "sharp":
        sharp, count = plan.sharp_training, updates(plan.sharp_training, counted["images"])
        epochs = train_sharp(images, VAE(vae).eval(), replace(sharp, **short))
        found.append(cost("sharp decoder", 1, count, sharp.batch_size, epochs))
    return found


def seconds(loop: Iterable[Any]) -> float:
    """The shortest time between two items of a training loop, of this thread's processor: other jobs do not count."""
    times = []
    for _ in loop:
        times.append(time.thread_time())
    return float(np.diff(times).min())
