"""What a training costs: updates of each network, and seconds of one core, from timing a few on random images."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clarity.judges import build_judge
from clarity.rows import one_thread
from clarity.training.judge import JudgeTraining, train_judge
from clarity.training.loops import Codes, num_updates, train_image_members, train_latent_members, train_vae
from clarity.training.plan import TrainingPlan
from clarity.training.recipe import (
    ENSEMBLE_UPDATES,
    IMAGES,
    LEAST_LABELLED,
    MEMBERS,
    VAE_UPDATES,
    long_updates,
    num_trials,
    searched_codes,
    small_plan,
)
from clarity.training.sharp import train_sharp
from clarity.vae import VAE, VAEConfig

#: Updates that are made, of the training's own batches: a row of a smaller one takes up to eight times as long. The
#: first warms up.
TIMED = 4


@dataclass(frozen=True)
class Cost:
    """What one part of a training costs: ``networks`` of it, ``updates`` each, ``seconds`` of one core in all."""

    part: str
    networks: int
    updates: int
    seconds: float


@one_thread()
def costs(plan: TrainingPlan) -> list[Cost]:
    """The cost of each part of a training; with ``searched`` values, of the largest code that the search may choose."""
    small = small_plan(plan)
    codes_tried = searched_codes(small) if plan.searched and plan.data["labelled"] >= LEAST_LABELLED else []
    dim = max((code.latent_dim for code in codes_tried), default=plan.vae.latent_dim)
    weight = max((code.label_weight for code in codes_tried), default=plan.vae.label_weight)
    vae, small_vae = (replace(each.vae, latent_dim=dim, label_weight=weight) for each in (plan, small))
    ensemble = replace(plan.ensemble, latent_dim=dim)
    generator = torch.Generator().manual_seed(0)
    short: dict[str, Any] = {"epochs": TIMED, "min_updates": 0}
    counted, ensemble_training, vae_training = plan.data, plan.ensemble_training, plan.vae_training
    rows = counted["labelled"] if plan.predictor is None else counted["codes"]
    outputs = ensemble.num_classes + len(plan.attributes)

    def cost(part: str, networks: int, updates: int, timed: Iterable[Any]) -> Cost:
        return Cost(part, networks, updates, networks * updates * seconds(timed))

    def batch(training: Any, rows: int, vae: VAEConfig) -> tuple[Tensor, Tensor]:
        count = min(training.batch_size, rows)
        images = torch.randint(0, 256, (count, *vae.image_shape), dtype=torch.uint8, generator=generator)
        return images, torch.arange(count) % ensemble.num_classes

    def members(count: int) -> Iterable[Any]:
        labels = torch.arange(min(ensemble_training.batch_size, rows)) % ensemble.num_classes
        mean = torch.randn((len(labels), dim), generator=generator)
        codes, training = Codes(mean, torch.zeros_like(mean), labels), replace(ensemble_training, **short)
        return train_latent_members(codes, replace(ensemble, num_members=count), training, range(count))

    def image_net(part: str, outputs: int, training: JudgeTraining, vae: VAEConfig) -> Cost:
        images, labels = batch(training, training.batch_size, vae)
        net, timed = build_judge(vae.image_shape, outputs), replace(training, updates=TIMED)
        return cost(part, 1, training.updates, train_judge(net, images.numpy(), labels.numpy(), timed))

    def vaes(part: str, networks: int, updates: int, vae: VAEConfig) -> Cost:
        images, _ = batch(vae_training, counted["images"], vae)
        known = torch.ones(len(images), outputs)
        guide = build_judge(vae.image_shape, outputs).eval().requires_grad_(False)
        epochs = train_vae(images, vae, replace(vae_training, **short), known=known, guide=guide)
        return cost(part, networks, updates, epochs)

    found = []
    if (judge := plan.judge_training) is not None and counted["labelled"]:
        found.append(image_net("judge", ensemble.num_classes, judge, vae))
    if codes_tried:
        some = JudgeTraining.for_images(min(IMAGES, counted["labelled"]) // 2)
        if small is not plan:
            found.append(image_net("search: judge", ensemble.num_classes, some, small_vae))
        if weight:
            found.append(image_net("search: guide", outputs, some, small_vae))
        found.append(vaes("search: VAEs", len(codes_tried), min(VAE_UPDATES, long_updates(plan)), small_vae))
        found.append(vaes("search: longer VAE", 1, long_updates(plan), small_vae))
        found.append(cost("search: ensembles", num_trials(plan), ENSEMBLE_UPDATES, members(MEMBERS)))
    found.append(vaes("VAE", 1, num_updates(vae_training, counted["images"]), vae))
    count = num_updates(ensemble_training, rows)
    for part, networks in (("ensemble", 1), ("ensembles of folds", plan.num_folds)):
        if networks:
            found.append(cost(part, networks, count, members(ensemble.num_members)))
    if plan.image_members:
        training, count = plan.image_training, num_updates(plan.image_training, counted["labelled"])
        one, (images, labels) = replace(plan.image_ensemble, num_members=1), batch(training, counted["labelled"], vae)
        member = train_image_members(images, labels, one, vae, replace(training, **short), [0])
        found.append(cost("image ensemble", plan.image_members, count, member))
    if (counted["labelled"] or plan.attributes) and (weight or plan.decoder == "sharp"):
        found.append(image_net("guide", outputs, JudgeTraining.for_images(counted["images"] // 2), vae))
    if plan.decoder == "sharp":
        sharp, count = plan.sharp_training, num_updates(plan.sharp_training, counted["images"])
        images, _ = batch(sharp, counted["images"], vae)
        found.append(cost("sharp decoder", 1, count, train_sharp(images, VAE(vae).eval(), replace(sharp, **short))))
    return found


def seconds(loop: Iterable[Any]) -> float:
    """The shortest time between two items of a training loop, of this thread's processor: other jobs do not count."""
    times = []
    for _ in loop:
        times.append(time.thread_time())
    return float(np.diff(times).min())
