"""Hyperparameters that follow from the data: a small search on the training split, with nothing held out used.

Chooses the size of the code, the weight of the KL term and the step of the adversary together, as none of them can be
chosen alone: a longer code keeps more of the image, and needs a longer adversary to keep counterfactuals realistic.
Labels count in the VAE's training. Of the trials, it takes the one with the largest product of the ensemble's accuracy
on validation images, the share of requested counterfactuals that are reached, and the fourth power of the share of
these in which a held-out judge sees the target. Either alone misleads: accuracy grows with hybrids that only the
ensemble takes for the target, and realism with codes that have lost the classes. The power is there because a hybrid
misleads, while a counterfactual that is not reached is only missing, and a lower threshold reaches it.

Images above 32 pixels are searched as small ones, of means of squares: what a trial costs does not grow with them. The
reconstruction loss is a sum over pixels, so that the weights of the other terms grow with the squares' size.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clarity import storage
from clarity.classifiers import EnsembleConfig
from clarity.ids import in_judges_half
from clarity.images import shrunk_shape, square_of
from clarity.judges import JudgeNet, judge_rows
from clarity.methods import METHODS, Pairs
from clarity.model import Model, read_card
from clarity.rows import decode_rows, encode_rows, logits_rows, mean_probs
from clarity.search import SearchConfig
from clarity.training.evaluate import LabelledImages, encode_pixels
from clarity.training.guide import known_of, train_guide
from clarity.training.loops import (
    Codes,
    Log,
    num_updates,
    train_latent_ensemble,
    train_vae,
    vae_weights,
)
from clarity.training.plan import EXTRAS, TrainingPlan, channels_for
from clarity.vae import VAE, VAEConfig

#: Pixels a side above which the search looks at smaller images.
MAX_SIDE = 32
#: Codes that are tried: (D, weight of the KL term, of the labels), the weights for images of at most 32 pixels; without
#: labels the first is the paper's.
CODES = ((16, 1.0, 10.0), (32, 0.45, 10.0), (64, 0.2, 10.0))
#: Steps of the adversary that are tried, in standard deviations of the codes.
STEPS = (0.2, 0.5, 0.8)
#: Steps that are tried with the best code, after a longer training of its VAE, as factors of the best step.
FACTORS = (0.5, 0.75, 1.0, 1.35, 1.8)
#: Hidden layers that are tried then, too; the others are the plan's own, the paper's.
WIDE = (64, 64)
#: The budget: labelled images that are looked at, one in five of them for validation; updates of each VAE, of the
#: best code's, at most, and of each ensemble; members of an ensemble; images and targets of each whose counterfactuals
#: are searched.
IMAGES = 6_000
VALIDATION_PARTS = 5
VAE_UPDATES = 400
LONG_UPDATES = 800
ENSEMBLE_UPDATES = 1000
MEMBERS = 10
ASKED_IMAGES = 400
ASKED_TARGETS = 4
#: Validation images below which nothing can be chosen.
MIN_VALIDATION = 40
#: About as many labelled images have so many for validation, as half of a part are the judge's.
LEAST_LABELLED = 2 * VALIDATION_PARTS * MIN_VALIDATION


@dataclass(frozen=True)
class Trial:
    """What one setting reached on validation images."""

    latent_dim: int  # D
    beta: float  # weight of the KL term
    label_weight: float  # of the labels in the VAE's training
    adversarial_eps: float  # step of the adversary, in standard deviations of the codes
    hidden: tuple[int, ...]  # widths of the classifiers' hidden layers
    vae_updates: int  # of its VAE's training
    accuracy: float  # of the ensemble
    reached: float  # share of the requested counterfactuals whose search reached 0.99
    judged: float  # share of them that were reached and in which the judge sees the target
    judge_on_reconstructions: float  # accuracy of the judge on reconstructed images
    seconds: float  # of the ensemble's training and the search

    @property
    def seen(self) -> float:
        """Share of the counterfactuals that were reached in which the judge sees the target."""
        return self.judged / self.reached if self.reached else 0.0

    def __str__(self) -> str:
        return (
            f"latent_dim {self.latent_dim}, beta {self.beta:g}, label_weight {self.label_weight:g}, "
            f"adversarial_eps {self.adversarial_eps:g}, hidden {' '.join(map(str, self.hidden))}"
        )


def with_recipe(plan: TrainingPlan) -> TrainingPlan | None:
    """The plan with the values that an earlier search or the finished model chose; None before a search."""
    if not plan.searched:
        return plan
    file, card = plan.file("recipe.json"), read_card(plan.out)
    if card is not None:
        found = card.get("recipe") or {}
    elif not storage.exists(file) or (found := storage.read_json(file))["key"] != recipe_key(plan):
        return None
    kept = {name: value for name, value in found.get("chosen", {}).items() if name in plan.searched}
    chosen = own_values(plan) | kept
    dim = chosen["latent_dim"]
    return replace(
        plan,
        vae=replace(plan.vae, latent_dim=dim, beta=chosen["beta"], label_weight=chosen["label_weight"]),
        ensemble=replace(plan.ensemble, latent_dim=dim, hidden=tuple(chosen["hidden"])),
        ensemble_training=replace(plan.ensemble_training, adversarial_eps=chosen["adversarial_eps"]),
        searched=(),
        recipe=found,
    )


def own_values(plan: TrainingPlan) -> dict[str, Any]:
    """The plan's own values of what can be searched."""
    return {
        "latent_dim": plan.vae.latent_dim,
        "beta": plan.vae.beta,
        "label_weight": plan.vae.label_weight,
        "adversarial_eps": plan.ensemble_training.adversarial_eps,
        "hidden": list(plan.ensemble.hidden),
    }


def recipe_key(plan: TrainingPlan) -> str:
    """Digest of everything that the search depends on."""
    described = {name: value for name, value in plan.describe().items() if name not in EXTRAS}
    tried = [MAX_SIDE, CODES, STEPS, FACTORS, WIDE, IMAGES, VAE_UPDATES, LONG_UPDATES, ENSEMBLE_UPDATES]
    content = [described, sorted(plan.searched), *tried]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def search_recipe(
    plan: TrainingPlan,
    images: LabelledImages,
    judge: JudgeNet | None,
    device: str | torch.device,
    log: Log,
) -> dict[str, Any]:
    """Searches the values that ``plan.searched`` names; returns the entry ``recipe`` of model.json.

    ``images`` are labelled, of the training split, some or all, as large as those of ``small_plan``, as the judge's
    are; ``judge`` was trained on the judges' half of them, and is None where a class has too few.
    """
    started = time.monotonic()
    pixels = square_of(plan.vae.image_shape, MAX_SIDE) ** 2  # for each that the search sees
    chosen = own_values(plan)
    found: dict[str, Any] = {"key": recipe_key(plan), "searched": sorted(plan.searched), "chosen": chosen, "trials": []}
    labels = images.labels.numpy()
    left_out = last_of_each_class(labels)
    validation = left_out & ~in_judges_half(images.ids)
    rarest = np.bincount(labels[~left_out], minlength=len(plan.class_names)).min()
    if judge is None or validation.sum() < MIN_VALIDATION or rarest < 2:
        found["why"] = f"too few labelled images for a search ({len(labels)}); the paper's values are taken"
        log(f"recipe: {found['why']}")
        return found | {"seconds": 0.0}
    x = images.pixels[torch.from_numpy(validation)].to(device).float() / 255
    train = images.take(np.flatnonzero(~left_out))
    trials = Trials(small_plan(plan), judge.to(device).eval(), train, x, labels[validation], device, log)
    accuracy = trials.accuracy_of_judge(x)
    log(f"recipe: the judge sees {accuracy:.1%} of {len(x)} validation images right")
    tried = []
    for small in trials.run():
        trial = replace(small, beta=small.beta * pixels, label_weight=small.label_weight * pixels)
        tried.append(trial)
        figures = f"accuracy {trial.accuracy:.1%}, reached {trial.reached:.1%}, seen as the target {trial.seen:.1%}"
        log(f"recipe: {trial}: {figures}")
    best = best_of(tried)
    why = (
        f"{best}: of {len(tried)} trials the largest product of accuracy ({best.accuracy:.1%}), counterfactuals that "
        f"are reached ({best.reached:.1%}), and the fourth power of the share of these in which a held-out judge "
        f"sees the target ({best.seen:.1%})"
    )
    log(f"recipe: {why}")
    values = asdict(best) | {"hidden": list(best.hidden)}
    return found | {
        "chosen": chosen | {name: values[name] for name in plan.searched},
        "why": why,
        "trials": [asdict(trial) for trial in tried],
        "judge": {"accuracy": accuracy, "images": len(x)},
        "seconds": round(time.monotonic() - started, 1),
    }


def last_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Marks the last fifth of each class in the listing's order, (N,).

    Frames of one recording lie side by side. Of images whose neighbours were trained on, any code looks accurate.
    """
    marked = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        marked[rows[len(rows) - len(rows) // VALIDATION_PARTS :]] = True
    return marked


def small_plan(plan: TrainingPlan) -> TrainingPlan:
    """The plan for the search's images; the same where these are not smaller."""
    if (square := square_of(plan.vae.image_shape, MAX_SIDE)) == 1:
        return plan
    shape = shrunk_shape(plan.vae.image_shape, square)
    channels = plan.vae.channels[: len(channels_for(shape))]
    weights = {name: getattr(plan.vae, name) / square**2 for name in ("beta", "label_weight")}
    vae = replace(plan.vae, image_shape=shape, channels=channels, **weights)
    return replace(plan, vae=vae, preprocessing=replace(plan.preprocessing, height=shape[1], width=shape[2]))


def small_images(plan: TrainingPlan, images: LabelledImages) -> LabelledImages:
    """Images of the plan's size as those of ``small_plan``."""
    if (square := square_of(plan.vae.image_shape, MAX_SIDE)) == 1:
        return images
    parts = [F.avg_pool2d(part.float(), square, ceil_mode=True) for part in images.pixels.split(1024)]
    return replace(images, pixels=torch.cat([part.round().to(torch.uint8) for part in parts]))


def searched_codes(plan: TrainingPlan) -> list[VAEConfig]:
    """The VAE of each code to try; a value that was given is kept."""
    tried = [dict(zip(("latent_dim", "beta", "label_weight"), code)) for code in CODES]
    kept = [{name: code[name] for name in code if name in plan.searched} for code in tried]
    return list(dict.fromkeys(replace(plan.vae, **code) for code in kept))  # type: ignore[arg-type]


def searched_steps(plan: TrainingPlan) -> tuple[float, ...]:
    """The adversary's steps to try with each code."""
    return STEPS if "adversarial_eps" in plan.searched else (plan.ensemble_training.adversarial_eps,)


def further_settings(plan: TrainingPlan) -> list[tuple[float, tuple[int, ...]]]:
    """Factors of the best step, and hidden layers, that are tried with the best code."""
    factors = FACTORS if "adversarial_eps" in plan.searched else (1.0,)
    widths = [plan.ensemble.hidden, WIDE] if "hidden" in plan.searched else [plan.ensemble.hidden]
    return [(factor, hidden) for hidden in widths for factor in factors]


def long_updates(plan: TrainingPlan) -> int:
    """Updates of the best code's VAE: as many as in the training itself, or LONG_UPDATES."""
    return min(LONG_UPDATES, num_updates(plan.vae_training, plan.data["images"]))


def num_trials(plan: TrainingPlan) -> int:
    """How many ensembles the search trains."""
    return len(searched_codes(plan)) * len(searched_steps(plan)) + len(further_settings(plan))


def best_of(trials: Sequence[Trial]) -> Trial:
    """The rule, among the trials of the VAEs that were trained for longest."""
    longest = max(trial.vae_updates for trial in trials)
    comparable = [trial for trial in trials if trial.vae_updates == longest]
    return max(comparable, key=lambda trial: trial.accuracy * trial.reached * trial.seen**4)


@dataclass(frozen=True)
class Trials:
    """Trains and measures settings of a plan; ``x`` are validation images in [0, 1], ``truth`` their labels."""

    plan: TrainingPlan
    judge: JudgeNet
    train: LabelledImages
    x: Tensor
    truth: np.ndarray
    device: str | torch.device
    log: Log

    @cached_property
    def taught(self) -> dict[str, Any]:
        """What a VAE that learns labels is given: what is known of the images, and a guide trained on them alone."""
        known = torch.from_numpy(known_of(self.plan, self.train))
        return {"known": known, "guide": train_guide(self.plan, self.train, self.log, self.device)}

    def run(self) -> Iterator[Trial]:
        """Every code and step; then the best code, trained for longer, with steps around its best and wide layers.

        A short training tells which code suits, but not how long the step has to be: classes part, and counterfactuals
        get easier to reach and less often seen as their target, for as long as a VAE learns labels.
        """
        plan, found = self.plan, list[Trial]()
        steps = [(step, plan.ensemble.hidden) for step in searched_steps(plan)]
        for code in searched_codes(plan):
            for trial in self.of_code(code, min(VAE_UPDATES, long_updates(plan)), steps):
                found.append(trial)
                yield trial
        best = best_of(found)
        code = replace(plan.vae, latent_dim=best.latent_dim, beta=best.beta, label_weight=best.label_weight)
        further = [(round(best.adversarial_eps * factor, 3), hidden) for factor, hidden in further_settings(plan)]
        yield from self.of_code(code, long_updates(plan), further)

    def of_code(
        self, config: VAEConfig, updates: int, settings: Sequence[tuple[float, tuple[int, ...]]]
    ) -> Iterator[Trial]:
        """Trains a VAE; then a trial for each setting, the adversary's step and the hidden layers."""
        plan = self.plan
        training = replace(plan.vae_training, epochs=1, min_updates=updates)
        options: dict[str, Any] = {"device": self.device, "precision": plan.precision, "log": self.progress_of("VAE")}
        options |= self.taught if config.label_weight else {}
        *_, last = train_vae(self.train.pixels, config, training, **options)
        vae = VAE(config)
        vae.load_state_dict(vae_weights(last.state()))
        vae.to(self.device).eval()
        codes = Codes(*encode_pixels(vae, self.train.pixels), self.train.labels)
        z, _ = encode_rows(vae, self.x)
        reconstructed = self.accuracy_of_judge(decode_rows(vae, z))

        for step, hidden in settings:
            started, code = time.monotonic(), (config.latent_dim, config.beta, config.label_weight)
            shape = EnsembleConfig(len(plan.class_names), config.latent_dim, hidden, MEMBERS)
            training = replace(plan.ensemble_training, epochs=1, min_updates=ENSEMBLE_UPDATES, adversarial_eps=step)
            log = self.progress_of("ensemble")
            ensemble = train_latent_ensemble(codes, shape, training, device=self.device, log=log)
            model = Model(vae, ensemble, plan.class_names, plan.preprocessing, judge=self.judge)
            reached, judged = judge_counterfactuals(model, self.x)
            accuracy = float((mean_probs(logits_rows(ensemble, z)).argmax(1) == self.truth).mean())
            seconds = round(time.monotonic() - started, 1)
            yield Trial(*code, step, hidden, updates, accuracy, reached, judged, reconstructed, seconds)

    def progress_of(self, network: str) -> Log:
        """Logs how far the training of a trial's network is."""
        return lambda line: self.log(f"recipe: {network} of a trial: {line}")

    def accuracy_of_judge(self, x: Tensor) -> float:
        """Of validation images, or their reconstructions."""
        return float((judge_rows(self.judge, x).argmax(1) == self.truth).mean())


def judge_counterfactuals(model: Model, x: Tensor) -> tuple[float, float]:
    """Share of requested counterfactuals that are reached, and reached and seen as the target by the model's judge."""
    assert model.judge is not None
    x = x[:ASKED_IMAGES]
    z, log_var = encode_rows(model.vae, x)
    source = mean_probs(logits_rows(model.ensemble, z)).argmax(1)
    others = model.num_classes - 1
    image = np.repeat(np.arange(len(x)), min(others, ASKED_TARGETS))
    nth = np.arange(len(image))
    # Each image asks for other classes than its neighbours.
    target = torch.from_numpy((source[image] + 1 + nth % others) % model.num_classes).to(x.device)
    index = torch.from_numpy(image).to(x.device)
    pairs = Pairs(x[index], z[index], log_var[index], torch.zeros_like(z[index]), target)
    found = METHODS["clarity"].search(model, pairs, SearchConfig())
    x_cf = (decode_rows(model.vae, found.point) * 255).round() / 255
    seen = torch.from_numpy(judge_rows(model.judge, x_cf).argmax(1)).to(x.device) == target
    return float(found.converged.double().mean()), float((found.converged & seen).double().mean())
