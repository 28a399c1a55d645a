#!/usr/bin/env python
"""Train a model on Ray Train: the VAE on all workers together, then the ensemble's members divided among them.

The same command resumes an interrupted run, with any number of workers, and adds what a finished model lacks
(--image-members, --folds, --attributes, --decoder sharp) to what it has. Exit codes: 0 finished, 1 interrupted (run it
again), 2 bad input.
"""

import argparse
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import driver
import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from clarity import storage
from clarity.classifiers import EnsembleConfig
from clarity.data import list_images
from clarity.model import read_card
from clarity.planning import describe_predictor
from clarity.predictor import load_predictor
from clarity.report.text import counted
from clarity.training.cost import Cost, costs
from clarity.training.directory import begin, finish, networks, require_same
from clarity.training.loops import PRECISIONS, VAETraining
from clarity.training.plan import DECODERS, OPTIONS, RECIPES, TRAININGS, TrainingPlan, plan_training
from clarity.training.recipe import LEAST_LABELLED, with_recipe
from clarity.training.stages import STAGES, TRAINED, Worker, run_stages
from clarity.vae import VAES, VAEConfig

#: Little goes through Ray's object store.
OBJECT_STORE_BYTES = 200_000_000
#: Flags that are parameters of ``plan_training`` as they are.
SAME_NAMES = (*OPTIONS, "num_members", "hidden", "mode", "center_crop", "recipe", "predictor")
#: How often stages are tried again after a worker or its node died; they go on from their checkpoints.
RETRIES = 3
#: After so many seconds Ray knows that a node died, and another attempt does not count on it.
NODE_DEATH_S = 30
#: How long workers wait for the first one at most, which trains the guide alone; by default half an hour.
WAIT_S = 24 * 3600
#: What the trainings' flags train, by their prefix.
NETWORKS = {"vae": "VAE", "ensemble": "ensemble", "image": "image ensemble"}
#: What is said of images with the same pixels: entries of the card, the name of a line, its text.
COPIES = (
    ("held_out", "copy", "copies", "held-out images with the same pixels as training images"),
    ("relabelled", "relabelled_copy", "labels", "pictures under several labels"),
)
#: Classes that are listed one by one.
SHOWN_CLASSES = 12


def new_parser() -> argparse.ArgumentParser:
    """The flags; those of the trainings come from their dataclasses."""
    parser, number = driver.new_parser(__doc__), {"type": int, "metavar": "N"}
    group = driver.add_data_flags(parser, "train", "Part of the data to train on: train, validation, test or all")
    add = group.add_argument
    about = "Part of the data to measure on: a split, none, or held-out: test, else validation (default: held-out)."
    add("--held-out", default="held-out", metavar="SPLIT", help=about)
    add = parser.add_argument_group("learning from your own model").add_argument
    about = "Your own model, FILE.onnx or module:function, to learn from instead of labels."
    add("--predictor", metavar="MODEL", help=about)
    about = "Audit of training images by the model in --out, whose pictures the predictor labels, too."
    add("--refit", metavar="URI", help=about)
    add = parser.add_argument_group("model").add_argument
    add("--vae", default="conv", choices=list(VAES), help="Architecture of the VAE (default: conv).")
    about = (
        "Source of latent dimensions, KL and label weights, adversary's step and hidden layers that are not given: the "
        "paper, or a search (auto) (default: paper for digits, mnist and beta_vae, else auto)."
    )
    add("--recipe", choices=RECIPES, help=about)
    add("--latent-dim", **number, help=f"Latent dimensions ({of_vaes('latent_dim')}).")
    add("--channels", nargs="+", **number, help=f"Channels of the encoder ({of_vaes('channels')}).")
    add("--beta", type=float, metavar="X", help=f"Weight of the KL term ({of_vaes('beta')}).")
    about = (
        "Weight of labels and --attributes in the VAE's training, so that codes know them and pictures show them "
        "(default: 0; auto: 10, and more for images above 32 pixels)."
    )
    add("--label-weight", type=float, metavar="X", help=about)
    about = "Reconstruction loss: bce (binary cross-entropy), mse (squared error) or l1 (absolute error)"
    add("--loss", metavar="NAME", help=f"{about} ({of_vaes('loss')}).")
    about = "Side, or height and width, of the images (default: from the data)."
    add("--image-size", nargs="+", **number, help=about)
    add("--mode", choices=["L", "RGB"], help="Grey or colour (default: from the data).")
    add("--center-crop", **number, help="Side of the centred square to crop to first.")
    members = EnsembleConfig.num_members
    add("--num-members", default=members, **number, help=f"Members of the ensemble (default: {members}).")
    widths = " ".join(map(str, EnsembleConfig.hidden))
    about = f"Width of each hidden layer of a classifier; none: a linear one (default: {widths}; auto searches them)."
    add("--hidden", nargs="*", **number, help=about)
    about = "Members of an image ensemble, for the methods that need one (default: 0)."
    add("--image-members", default=0, **number, help=about)
    about = (
        "Also train N ensembles, each without a part of the training split, so that --split train explains each image "
        "by one that has not seen it (default: 0)."
    )
    add("--folds", dest="num_folds", default=0, **number, help=about)
    about = "Updates of the held-out judge; 0: no judge (default: by the number of images)."
    add("--judge-updates", **number, help=about)
    about = "Columns of two values, or all, to fit linear heads for --keep of jobs/explain_all.py."
    add("--attributes", nargs="+", default=[], metavar="NAME", help=about)
    about = "What draws the pictures: the VAE's own decoder, or a sharp one, trained after it (default: plain)."
    add("--decoder", default="plain", choices=DECODERS, help=about)
    for prefix, training in TRAININGS.items():
        group = parser.add_argument_group(f"training of the {NETWORKS[prefix]}")
        driver.add_config_flags(group, training, f"{prefix}_", ["seed"])
    # What is not given stays None: a number of epochs alone is meant as such, whatever min_updates is by default.
    parser.set_defaults(**dict.fromkeys(training_flags()))
    add = parser.add_argument_group("output and resources").add_argument
    add("--out", metavar="URI", help="Model directory (default: runs/DATASET/model).")
    seed = VAETraining.seed
    add("--seed", default=seed, **number, help=f"Random seed of the training (default: {seed}).")
    about = "Precision of convolutions; auto: bf16 on GPUs, else fp32 (default: auto)."
    add("--precision", default="auto", choices=PRECISIONS, help=about)
    about = "Training processes (default: one per GPU, else one per CPU; for the VAE one per node)."
    add("--workers", **number, help=about)
    add("--dry-run", action="store_true", help="Say what the training would cost on this machine, and train nothing.")
    return parser


def training_flags() -> list[str]:
    """The names of the trainings' flags, as fields of ``plan_training``."""
    return [
        f"{prefix}_{field.name}"
        for prefix, training in TRAININGS.items()
        for field in dataclasses.fields(training)
        if field.name != "seed"
    ]


def of_vaes(name: str) -> str:
    """The default of a field of VAEConfig in each architecture, for the help."""
    return ", ".join(f"{key}: {entry.defaults.get(name, getattr(VAEConfig, name))}" for key, entry in VAES.items())


def make_plan(args: argparse.Namespace) -> TrainingPlan:
    """Everything that can be wrong is found here, before anything starts."""
    if args.predictor and args.predictor.endswith(".onnx") and "://" not in args.predictor:
        args.predictor = os.path.abspath(args.predictor)  # a Ray that runs already has another working directory
    given = {name: value for name in training_flags() if (value := getattr(args, name)) is not None}
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"workers: expected at least 1, got {args.workers}")
    if args.seed < 0:
        raise ValueError(f"seed: expected at least 0, got {args.seed}")
    if args.image_size and len(args.image_size) > 2:
        raise ValueError(f"image_size: expected a side, or height and width, got {args.image_size}")
    size = tuple(args.image_size * 2)[:2] if args.image_size else None
    out = driver.job_path(args.out, f"runs/{args.dataset}/model", "--out")
    # The unlabelled images of a source teach the VAE, though not the classifiers.
    dataset = driver.open_dataset(args, args.split, unlabelled=True)
    try:
        held_out = None if args.held_out == "none" else driver.open_dataset(args, args.held_out)
    except ValueError as error:  # all else is as above
        raise ValueError(str(error).replace("split:", "held_out:", 1)) from None
    return plan_training(
        out,
        dataset,
        held_out,
        architecture=args.vae,
        vae_fields={name: getattr(args, name) for name in ("latent_dim", "channels", "beta", "loss", "label_weight")},
        image_size=size,
        refit=None if args.refit is None else driver.job_path(args.refit, "", "--refit"),
        **{name: getattr(args, name) for name in SAME_NAMES},
        **{f"{prefix}_seed": args.seed for prefix in TRAININGS},
        **given,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, train, measure; the exit code."""
    return driver.run(new_parser(), train, argv)


def train(args: argparse.Namespace) -> int:
    """Train what is not there yet and print how good the model is."""
    start = time.time()
    asked = make_plan(args)
    plan, out = with_recipe(asked) or asked, storage.display(asked.out)
    if (changed := require_same(plan)) is not None:
        if asked.searched and not plan.recipe:
            changed["recipe"] = "none was searched there, auto here"
        card = read_card(plan.out) or {"data": plan.data}
        there, here = (data.get("held_out") or "none" for data in (card["data"], plan.data))
        if there != here:
            changed["held_out"] = f"{there} there, {here} here"
    if args.dry_run:
        lines = [about_images(plan), *about_kept(plan, changed), *describe_costs(costs_left(plan))]
        lines += [*plan.data["remarks"], *about_predictor(plan)]
        if plan.searched and (labelled := plan.data["labelled"]) < LEAST_LABELLED:
            lines.append(f"no search for a recipe: it takes {LEAST_LABELLED} labelled images, there are {labelled}")
        print("\n".join(lines))
        return 0
    plan = choose(plan)
    if begin(plan):
        print(f"already finished{in_brackets(changed)}\n{describe(plan)}\nmodel      {out}")
        return 0
    lines = [*about_predictor(plan), f"training {out} on {about_images(plan)}", *plan.data["remarks"]]
    print("\n".join([*lines, *about_kept(plan, changed)]), flush=True)
    driver.start_ray(OBJECT_STORE_BYTES)
    for by_member in (False, True):
        fit(plan, [name for name in TRAINED if STAGES[name].by_member == by_member], args.workers)
    finish(plan, log=partial(print, flush=True))
    print(f"{describe(plan)}\nmodel      {out}  ({time.time() - start:.0f} s)")
    return 0


def about_predictor(plan: TrainingPlan) -> list[str]:
    """What the predictor sees in one image, so that a wrong preprocessing shows."""
    if plan.predictor is None:
        return []
    predictor, listing = load_predictor(plan.predictor), list_images(plan.dataset)
    return [describe_predictor(predictor, plan.dataset, listing, plan.preprocessing)]


def about_kept(plan: TrainingPlan, changed: Mapping[str, str] | None) -> list[str]:
    """Which networks of a model that is there are kept, and why the others are trained."""
    there = networks(plan)
    kept, left = ([name for name in there if there[name] == known] for known in (True, False))
    if changed is None or not kept:
        return []
    return [f"kept: {', '.join(kept)}; to train: {', '.join(left) or 'nothing'}{in_brackets(changed)}"]


def in_brackets(changed: Mapping[str, str] | None) -> str:
    """What differs from the model that is there, after what follows from it."""
    return f" ({'; '.join(f'{name}: {values}' for name, values in changed.items())})" if changed else ""


def costs_left(plan: TrainingPlan) -> list[Cost]:
    """The costs of what is not there yet."""
    there = networks(plan)
    guided = [name for name in ("VAE", "sharp decoder") if not there.get(name, True)]
    return [cost for cost in costs(plan) if not there.get(cost.part, cost.part == "guide" and not guided)]


def describe_costs(found: Sequence[Cost]) -> list[str]:
    """A line for each part of a training, and one for all; none where nothing is to train."""
    if not found:
        return []
    lines = []
    for cost in found:
        networks = f"{cost.networks} x " if cost.networks > 1 else ""
        lines.append(f"{cost.part:<18} {networks + counted(cost.updates, 'updates'):>20}  {cost.seconds:8.0f} s")
    minutes = max(1, round(sum(cost.seconds for cost in found) / 60))
    about = f"about {counted(minutes, 'minutes')} on one free core of this machine, less on several"
    searched = any(cost.part.startswith("search") for cost in found)
    left_out = "measuring and the counterfactuals of the search" if searched else "measuring"
    return [*lines, f"{about}; without {left_out}"]


def choose(plan: TrainingPlan) -> TrainingPlan:
    """The plan with the values that the recipe's search chooses."""
    if (known := with_recipe(plan)) is not None:
        return known
    print(f"recipe: searching {', '.join(plan.searched)} on the training split", flush=True)
    driver.start_ray(OBJECT_STORE_BYTES)
    fit(plan, ["recipe"], 1)
    if (chosen := with_recipe(plan)) is None:
        raise ValueError(
            f"out: a worker does not see {storage.display(plan.out)}; with several nodes, choose a directory that "
            "every node sees: s3://..., or a shared mount"
        )
    return chosen


def about_images(plan: TrainingPlan) -> str:
    """How many images of what size there are, with and without a label, and of the rarest and the commonest class."""
    images, labelled, counts = plan.data["images"], plan.data["labelled"], plan.data["per_class"]
    channels, height, width = plan.preprocessing.image_shape
    text = f"{counted(images, 'images')} of {plan.data['source']} at {height} x {width}"
    text += " in colour" if channels == 3 else ""
    if not labelled:
        return f"{text} without labels"
    ends = sorted(counts, key=counts.__getitem__)[:: max(1, len(counts) - 1)]
    few = len(counts) <= SHOWN_CLASSES
    classes = ", ".join(f"{counts[name]} {name}" for name in counts if few or name in ends)
    if labelled < images:
        text += f", {labelled} of them with a label"
    return f"{text} ({classes}{'' if few else ', others between'})"


def describe(plan: TrainingPlan) -> str:
    """How good the model is, by its card."""
    card = read_card(plan.out) or {}
    metrics, evaluation = card.get("metrics", {}), card.get("evaluation") or {}
    lines = []
    if parts := metrics.get("vae"):
        lines.append(f"vae        loss {parts['loss']:.2f} nats, of which {parts['kl']:.2f} KL, held out")
    for key, name in (("ensemble", "ensemble"), ("image_ensemble", "images")):
        if found := metrics.get(key):
            lines.append(
                f"{name:<10} accuracy {found['accuracy']:.2%} held out, members {found['member_accuracy_mean']:.2%}, "
                f"balanced {found['balanced_accuracy']:.2%}, calibration error {found['calibration_error']:.3f}"
            )
            lines.append(f"{'':<10} {shares(found['per_class'])}")
    if baseline := evaluation.get("baseline"):
        lines.append(f"baseline   accuracy {baseline['accuracy']:.2%}, logistic regression on principal components")
    if told := card.get("predictor"):
        lines += describe_fidelity(told)
    if judge := evaluation.get("judge"):
        again = judge["accuracy_on_reconstructions"]
        lines.append(f"judge      accuracy {judge['accuracy']:.2%} held out, {again:.2%} on reconstructions")
    copies = evaluation.get("copies") or {}
    for key, pair, name, text in COPIES:
        if count := copies.get(key):
            lines.append(f"{name:<10} {counted(count, text)}, such as {' and '.join(copies[pair])}")
    heads = {name: about for name, about in metrics.get("attributes", {}).items() if about["accuracy"] is not None}
    if heads:
        balanced = shares({name: about["balanced_accuracy"] for name, about in heads.items()})
        lines.append(f"attributes {balanced}, balanced accuracy held out")
    measured = metrics.get("ensemble", {}).get("per_class", {})
    unseen = [name for name in card.get("class_names", []) if name not in measured]
    if measured and unseen:
        more = f" and {len(unseen) - SHOWN_CLASSES} more" if len(unseen) > SHOWN_CLASSES else ""
        lines.append(f"{'':<10} not measured, no held-out image: {', '.join(unseen[:SHOWN_CLASSES])}{more}")
    return "\n".join(lines) or "nothing was held out to measure on"


def shares(figures: Mapping[str, float]) -> str:
    """Figures by name, as text; of hundreds the worst."""
    worst = sorted(figures, key=figures.__getitem__)[:SHOWN_CLASSES]
    shown = ", ".join(f"{name} {figures[name]:.2%}" for name in figures if name in worst)
    return f"worst: {shown}" if len(figures) > len(worst) else shown


def describe_fidelity(told: Mapping[str, Any]) -> list[str]:
    """How closely the ensemble agrees with the predictor, by the card."""
    if "codes" not in told:
        return [f"predictor  {told['name']}, no held-out image to compare the ensemble with it"]
    shares = [f"{told[name]['agreement']:.2%} of {name}" for name in ("codes", "reconstructions", "perturbed")]
    lines = [
        f"predictor  the ensemble agrees on {', '.join(shares)} codes; {counted(told['images'], 'held-out images')}",
        f"{'':<10} the reconstruction alone changes its answer on {1 - told['reconstructing']['agreement']:.2%}",
    ]
    labelled = told.get("labelled") or {"images": 0}
    if count := labelled["images"]:
        right = f"accuracy {labelled['correct'] / count:.2%} on {counted(count, 'labelled held-out images')}"
        lines.insert(1, f"{'':<10} {right}, too good if it was trained on them")
    if confused := told["confused"]:
        pairs = [f"{name} seen as {other} in {share:.0%}" for name, other, share in confused[:SHOWN_CLASSES]]
        lines.append(f"{'':<10} not told apart once reconstructed: {', '.join(pairs)}")
    return lines


def fit(plan: TrainingPlan, stages: Sequence[str], workers: int | None) -> None:
    """Run stages on all workers; nothing where nothing is left to do.

    A ValueError of a worker is raised at once: another attempt would end in it, too.
    """
    if all(STAGES[stage].done(plan) for stage in stages):
        return
    for left in reversed(range(1 + RETRIES)):
        try:
            return attempt(plan, stages, workers)
        except ray.train.WorkerGroupError as error:
            for failure in error.worker_failures.values():
                if isinstance(failure, ValueError):
                    raise failure from None
            if not left:
                raise
            first: Exception = next(iter(error.worker_failures.values()), error)
        why = f"{type(first).__name__}: {first}".partition("\n")[0]
        print(f"a worker died or failed ({why}); trying again from the last checkpoints", flush=True)
        time.sleep(NODE_DEATH_S)


def attempt(plan: TrainingPlan, stages: Sequence[str], workers: int | None) -> None:
    """Run stages in one trainer, on the nodes that are there."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a predictor may read files by relative paths
    nodes = driver.offered_nodes()
    count, threads, use_gpu = divide(plan, stages, nodes, workers)
    with progress() as lines:
        ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"plan": plan, "stages": stages, "log": lines.put, "threads": threads},
            scaling_config=ray.train.ScalingConfig(
                num_workers=count,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": threads} | ({"GPU": 1} if use_gpu else {}),
            ),
            torch_config=ray.train.torch.TorchConfig(timeout_s=WAIT_S),
            # Ray Train itself would try again after any error, and with as many workers when a node is gone.
            run_config=ray.train.RunConfig(name=f"{stages[0]}-{time.time_ns()}", **ray_storage(plan)),
        ).fit()


def divide(
    plan: TrainingPlan, stages: Sequence[str], nodes: Sequence[Mapping[str, float]], workers: int | None
) -> tuple[int, int, bool]:
    """Number of workers for some stages, CPUs of each, and whether each has a GPU; ``workers`` is the user's number.

    By default one for each GPU, else for each CPU; or one for each node, where all train one network: without GPUs the
    parts of a batch talk more than they compute. No more than there are networks, or images of a batch, to divide.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    by_member = any(STAGES[stage].by_member for stage in stages)
    most = gpus or (sum(cpus) if by_member or workers else min(len(cpus), 4))
    # A cluster that scales from nothing offers nothing yet: Ray waits for its nodes.
    if cpus and (workers or 0) > most:
        raise ValueError(f"--workers {workers}: Ray offers {f'{gpus} GPUs' if gpus else f'{most} CPUs'}; ask for fewer")
    in_batch = min(plan.vae_training.batch_size, plan.data["images"])
    useful = max(plan.ensemble.num_members, plan.image_members) if by_member else in_batch
    count = max(1, min(workers or most, useful))
    threads = 1 if gpus or not cpus else min(16, *cpus, max(1, sum(cpus) // count))
    return count, threads, bool(gpus)


def work(config: dict[str, Any]) -> None:
    """One worker's share of the stages."""
    import torch

    torch.set_num_threads(config["threads"])
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cuda":  # before anything speaks to the other workers
        torch.cuda.set_device(device)
    worker = Worker(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=device,
        wrap=ray.train.torch.prepare_model,
        log=config["log"],
    )
    run_stages(config["plan"], config["stages"], worker)


def ray_storage(plan: TrainingPlan) -> dict[str, Any]:
    """Where Ray keeps its own notes on a run: beside ours, deleted with them."""
    uri = plan.file("ray")
    if not storage.is_remote(uri):
        return {"storage_path": uri}
    filesystem, path = storage.filesystem(uri)
    return {"storage_path": path, "storage_filesystem": filesystem}


@contextmanager
def progress() -> Iterator[Queue]:
    """A queue for the workers to speak through; what they report is printed while the block runs."""
    driver.interruptible()
    queue = Queue(actor_options={"num_cpus": 0})

    def listen() -> None:
        # The queue's end is told by whoever ended it; the training goes on without.
        with suppress(ray.exceptions.RayError):
            for line in iter(queue.get, None):
                print(line, flush=True)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield queue
    except SystemExit:  # Ray Train's answer to Ctrl-C; it would give exit code 0
        raise KeyboardInterrupt from None
    finally:
        driver.interruptible()  # Ray Train took SIGINT for itself
        with suppress(ray.exceptions.RayError):
            queue.put(None)
        listener.join(10)


if __name__ == "__main__":
    sys.exit(main())
