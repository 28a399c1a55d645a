"""The stages of a training, resumable and shared by any number of workers: each a function and a line of STAGES."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from clarity import storage
from clarity.audit.read import read_audit
from clarity.data import Dataset, label_indices, list_images, read_all
from clarity.ids import fold_of, in_judges_half
from clarity.judges import JudgeNet, build_judge
from clarity.model import load_tensors, save_tensors
from clarity.predictor import Predictor, load_predictor
from clarity.report.text import counted
from clarity.training.distil import COPIES, audit_codes, original_probs, perturb, point_codes
from clarity.training.evaluate import LabelledImages, encode_pixels, evenly
from clarity.training.guide import known_of, new_guide, train_guide
from clarity.training.judge import JudgeTraining, log_updates, train_judge
from clarity.training.loops import (
    Codes,
    Epoch,
    Log,
    join_states,
    member_states,
    minutes_since,
    seeded,
    train_image_members,
    train_latent_members,
    train_vae,
    vae_weights,
    weights_of,
)
from clarity.training.optimiser import generator_for
from clarity.training.plan import TrainingPlan
from clarity.training.recipe import IMAGES, search_recipe, small_images, small_plan, with_recipe
from clarity.training.sharp import train_sharp
from clarity.vae import VAE, Decoder

#: Seconds of work that a killed run may lose.
CHECKPOINT_SECONDS = 15.0
#: Fall of the loss in the last third of the epochs above which a training was too short; MNIST's VAE falls by 3 %, the
#: ensemble by 5 %. The last epochs alone tell nothing: their learning rate is nearly zero.
STILL_FALLING = 0.1
#: Accuracy on the training images from which on a longer training has nothing to learn, however its loss falls.
LEARNED = 0.999
#: The epoch of a checkpoint that needs no more training.
FINISHED = 1 << 40
ENCODE_ROWS = 4096


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together; a single one by default."""

    rank: int = 0  # of this process
    world: int = 1  # number of processes
    device: str | torch.device = "cpu"  # to train on
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # makes a module data-parallel
    log: Log = lambda line: None  # receives lines about the progress

    def wait_for_all(self) -> None:
        """Returns when all workers have arrived here."""
        if self.world > 1 and torch.distributed.is_initialized():
            device = torch.device(self.device)
            # NCCL waits on a GPU, and would guess from the rank which one is this worker's.
            torch.distributed.barrier(device_ids=None if device.type == "cpu" else [device.index or 0])


def load_images(
    plan: TrainingPlan, dataset: Dataset, limit: int | None = None, labelled: bool = True
) -> LabelledImages:
    """Reads a split into memory, or at most ``limit`` of its (labelled) images, with labels as indices."""
    listing = list_images(dataset)
    if limit is not None:
        if labelled:
            listing = listing.filter(pc.is_valid(label_indices(listing["label_name"], plan.class_names)))
        listing = listing.take(evenly(len(listing), limit))
    pixels, ids, names, errors = read_all(dataset, listing, plan.preprocessing)
    labels = label_indices(pa.array(names, pa.string()), plan.class_names).fill_null(-1).to_numpy(zero_copy_only=False)
    return LabelledImages(torch.from_numpy(pixels), ids, torch.from_numpy(labels.astype(np.int64)), errors)


#: Images of the training split, read when they are first asked for.
Images = Callable[[], LabelledImages]


@dataclass(frozen=True)
class Stage:
    """A part of a training."""

    run: Callable[[TrainingPlan, Worker, Images], None]  # does a worker's share
    done: Callable[[TrainingPlan], bool]  # whether nothing of it is left to do
    #: the untrained network, where the stage writes the weights of one, or none, as ``<name of the stage>.safetensors``
    network: Callable[[TrainingPlan], nn.Module] | None = None
    by_member: bool = False  # whether its work is divided by networks, so that a worker for each CPU is of use


def run_stages(plan: TrainingPlan, stages: Iterable[str], worker: Worker) -> None:
    """Does this worker's share of some stages; what an earlier run has finished is not done again.

    ``stages`` are some of STAGES, in their order; or "recipe" alone, which comes before a plan is begun.
    """

    @cache
    def images() -> LabelledImages:
        log = worker.log if worker.rank == 0 else (lambda line: None)
        log(f"reading {counted(plan.data['images'], 'images')}")
        found = load_images(plan, plan.dataset)
        log_errors(found, log)
        return found

    for name in stages:
        needed = {"data": plan.dataset.data, "out": None if name == "recipe" else plan.file("plan.json")}
        for what, uri in needed.items():
            if uri is not None and not storage.exists(uri):
                raise ValueError(
                    f"{what}: the worker of rank {worker.rank} does not see {storage.display(uri)}; with several "
                    "nodes, choose a directory that every node sees: s3://..., or a shared mount"
                )
        done = STAGES[name].done(plan)
        if not STAGES[name].by_member:
            worker.wait_for_all()  # before one of them does what the others would then find done
        if not done:
            STAGES[name].run(plan, worker, images)


def log_errors(images: LabelledImages, log: Log) -> None:
    """Logs how many images cannot be read, a line for each of the five most frequent reasons."""
    for reason, count in Counter(images.errors.values()).most_common(5):
        first = next(image_id for image_id, error in images.errors.items() if error == reason)
        example = f"{first}{' and others' if count > 1 else ''}"
        log(f"left out: {counted(count, 'images')} that cannot be read: {reason} ({example})")


def recipe_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains the judge, and with its help searches what the plan leaves open, on the first worker."""
    if worker.rank == 0:
        some = load_images(plan, plan.dataset, IMAGES, labelled=plan.predictor is None)
        if (predictor := plan_predictor(plan, worker.device)) is not None:
            listing = list_images(plan.dataset)
            probs = original_probs(predictor, plan.dataset, listing, some, plan.preprocessing)
            some = replace(some, labels=probs.argmax(1)).take(np.flatnonzero(~probs.isnan().any(1)))
        small, some = small_plan(plan), small_images(plan, some)
        keep = small is plan and predictor is None and plan.judge_training is not None  # others are trained later
        judge = trained_judge(small, worker, images() if keep else some)
        found = search_recipe(plan, some, judge, worker.device, worker.log)
        if keep:
            save_finished(plan.file("judge.safetensors"), judge.state_dict() if judge else {})
        storage.write_json(plan.file("recipe.json"), found)


def guide_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains the guide of what draws the pictures, on the first worker."""
    if worker.rank == 0:
        guide = train_guide(plan, images(), worker.log, worker.device)
        save_finished(plan.file("guide.safetensors"), guide.state_dict() if guide else {})


def vae_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains the VAE, all workers together."""
    loop = partial(train_vae, images().pixels, plan.vae, plan.vae_training)
    if plan.vae.label_weight:
        loop = partial(loop, known=torch.from_numpy(known_of(plan, images())), guide=load_network(plan, "guide"))
    loop = partial(loop, rank=worker.rank, world=worker.world, wrap=worker.wrap)
    train_network(plan, worker, "vae", "vae", loop, vae_weights)


def train_network(
    plan: TrainingPlan,
    worker: Worker,
    name: str,
    what: str,
    loop: Callable[..., Iterator[Epoch]],
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Trains a network from its checkpoint on; the first worker writes it, and at the end its weights alone."""
    file = plan.file(f"{name}.safetensors")
    state = load_tensors(file) if storage.exists(file) else None
    epochs = partial(loop, state=state, device=worker.device, precision=plan.precision)
    if worker.rank:
        run_loop(epochs, what)
        return
    final = run_loop(epochs, what, worker.log, partial(save_tensors, file)) or state
    assert final is not None
    save_finished(file, weights(final))


def run_loop(
    loop: Callable[..., Iterator[Epoch]],
    what: str,
    log: Log = lambda line: None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor] | None:
    """Runs a loop with a line of progress and a checkpoint now and then; its final state, None without ``save``.

    None, too, where no epoch is left: images that can be read by now make more updates an epoch, and fewer epochs.
    """
    started = saved = time.monotonic()
    epoch = None
    losses: dict[int, float] = {}
    for epoch in loop(log=lambda line: log(f"{what}: {line}")):
        losses[epoch.number] = epoch.metrics["loss"]
        # A small data set takes hundreds of epochs, of which about twelve are reported.
        if epoch.number in (1, epoch.total) or epoch.number % math.ceil(epoch.total / 12) == 0:
            numbers = "  ".join(f"{name} {value:#.4g}" for name, value in epoch.metrics.items())
            log(f"{what}: epoch {epoch.number}/{epoch.total}  {numbers}  {minutes_since(started)}")
        if save is not None and epoch.number < epoch.total and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(epoch.state())
            saved = time.monotonic()
    unlearned = epoch is not None and epoch.total >= 6 and epoch.metrics.get("accuracy", 0) < LEARNED
    before = losses.get(epoch.total - epoch.total // 3) if epoch and unlearned else None
    if epoch and before is not None and (fall := (before - losses[epoch.total]) / abs(before)) > STILL_FALLING:
        log(f"{what}: the loss still fell by {fall:.1%} in the last third of the epochs: more of them would help")
    return epoch.state() if epoch and save is not None else None


def plan_predictor(plan: TrainingPlan, device: str | torch.device = "cpu") -> Predictor | None:
    """The plan's predictor, if any, which answers in the order of its classes; ValueError if it has changed since."""
    if plan.predictor is None:
        return None
    predictor = load_predictor(plan.predictor, str(device))
    if predictor.digest != plan.teachers["predictor"]:
        raise ValueError(f"predictor: expected that of the plan, found another in {predictor.name}: restore it")
    return predictor.ordered(plan.class_names)


def encode_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Encodes the training split, each worker some blocks of it, and asks the predictor where there is one."""
    vae, split = load_network(plan, "vae").to(worker.device), images()
    predictor = plan_predictor(plan, worker.device)
    listing = None if predictor is None else list_images(plan.dataset)
    starts = range(0, len(split.pixels), ENCODE_ROWS)
    audit = [] if plan.refit is None else list(audit_codes(read_audit(plan.refit), ENCODE_ROWS))
    for part in range(worker.rank, len(starts) + len(audit), worker.world):
        file = plan.file(f"codes-{plan.num_folds}", f"part-{part:05d}.safetensors")
        if storage.exists(file):
            continue
        if part >= len(starts):
            assert predictor is not None
            ids, z = audit[part - len(starts)]
            tensors = point_codes(predictor, vae, z)
        else:
            some = split.take(slice(starts[part], starts[part] + ENCODE_ROWS))
            mean, log_var = encode_pixels(vae, some.pixels)
            ids, tensors = some.ids, {"mean": mean, "log_var": log_var, "labels": some.labels}
            if predictor is not None:
                generator = generator_for(plan.ensemble_training.seed, "perturb", part)
                around = point_codes(predictor, vae, perturb(mean, generator))
                probs = original_probs(predictor, plan.dataset, listing, some, plan.preprocessing)
                tensors = join_states([{"mean": mean, "log_var": log_var, "probs": probs}, around])
                if lost := int(tensors["probs"].isnan().any(1).sum()):
                    worker.log(f"left out: {counted(lost, 'codes')} for which the predictor gives no probabilities")
                ids = ids * (1 + COPIES)
        folds = torch.tensor([fold_of(image_id, max(plan.num_folds, 1)) for image_id in ids])
        save_tensors(file, {**tensors, "folds": folds})
    worker.wait_for_all()
    if worker.rank == 0:
        storage.write_json(plan.file(f"codes-{plan.num_folds}", "count.json"), len(starts) + len(audit))
        worker.log(f"encoded {counted(len(split.pixels), 'images')}")


def load_codes(plan: TrainingPlan) -> tuple[Codes, Tensor]:
    """Codes of the labelled images, or those with a predictor's probabilities, and the fold of each."""
    directory = plan.file(f"codes-{plan.num_folds}")
    count = storage.read_json(storage.join(directory, "count.json"))
    parts = [load_tensors(storage.join(directory, f"part-{part:05d}.safetensors")) for part in range(count)]
    codes = join_states(parts)
    if plan.predictor is None:
        targets, known = codes["labels"], codes["labels"] >= 0
    else:
        targets, known = codes["probs"], ~codes["probs"].isnan().any(1)
    return Codes(codes["mean"], codes["log_var"], targets).take(known), codes["folds"][known]


def latent_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains this worker's members of the latent ensembles."""
    codes, folds = load_codes(plan)
    for left_out, kind in enumerate(plan.latent_kinds(), -1):  # no image is of fold -1
        some = codes.take(folds != left_out)
        loop = partial(train_latent_members, some, plan.ensemble, plan.ensemble_training, device=worker.device)
        train_stacks(plan, worker, kind, plan.ensemble.num_members, plan.ensemble.num_members, loop)


def image_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains this worker's members of the image ensemble."""
    labelled = images().labels >= 0
    pixels, labels = images().pixels[labelled], images().labels[labelled]
    configs = plan.image_ensemble, plan.vae, plan.image_training
    loop = partial(train_image_members, pixels, labels, *configs, device=worker.device, precision=plan.precision)
    # On a CPU the arithmetic dominates and a small working set is faster; a GPU needs many members to be busy.
    stack_size = 1 if torch.device(worker.device).type == "cpu" else 10
    train_stacks(plan, worker, "image", plan.image_members, stack_size, loop)


def judge_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains the held-out judge on the last worker; a cut one starts again."""
    if worker.rank == worker.world - 1:
        judge = trained_judge(plan, worker, images())
        save_finished(plan.file("judge.safetensors"), judge.state_dict() if judge else {})


def sharp_stage(plan: TrainingPlan, worker: Worker, images: Images) -> None:
    """Trains the sharp decoder, on the first worker."""
    if not worker.rank:
        vae, guide = (load_network(plan, name) for name in ("vae", "guide"))
        loop = partial(train_sharp, images().pixels, vae, plan.sharp_training, guide)
        train_network(plan, worker, "sharp", "sharp decoder", loop, partial(weights_of, part="decoder"))


def trained_judge(plan: TrainingPlan, worker: Worker, images: LabelledImages) -> JudgeNet | None:
    """A judge trained on its half of the labelled images; None where these lack a class."""
    half = torch.from_numpy(in_judges_half(images.ids)) & (images.labels >= 0)
    labels = images.labels[half].numpy()
    counts = np.bincount(labels, minlength=len(plan.class_names))
    if counts.min() == 0:
        missing = [name for name, count in zip(plan.class_names, counts) if not count]
        worker.log(f"no judge: its half of the images has none of class {', '.join(missing[:5])}")
        return None
    training = plan.judge_training or JudgeTraining.for_images(len(labels))
    net = seeded(lambda: build_judge(plan.vae.image_shape, len(plan.class_names)), training.seed, "judge", 0)
    given = images.pixels[half].numpy(), labels, training
    log_updates("judge", train_judge(net, *given, device=worker.device), worker.log)
    return net


def train_stacks(
    plan: TrainingPlan, worker: Worker, kind: str, count: int, stack_size: int, loop: Callable[..., Iterator[Epoch]]
) -> None:
    """Trains this worker's members of a kind, in stacks: those whose number modulo the world's size is its rank."""
    states: dict[int, dict[str, Tensor]] = {}
    for m in range(worker.rank, count, worker.world):
        file = plan.member_file(kind, m)
        states[m] = load_tensors(file) if storage.exists(file) else {}
    # Members of one stack continue from the same epoch.
    by_epoch: dict[int, list[int]] = {}
    for m, state in states.items():
        by_epoch.setdefault(int(state["epoch"]) if state else 0, []).append(m)
    by_epoch.pop(FINISHED, None)
    stacks = [group[i : i + stack_size] for group in by_epoch.values() for i in range(0, len(group), stack_size)]
    for members in stacks:

        def save(state: Mapping[str, Tensor], members: Sequence[int] = members) -> None:
            for m, member in zip(members, member_states(state, len(members))):
                save_tensors(plan.member_file(kind, m), member)

        one = f"member {members[0] + 1} of {count}"
        some = one if len(members) == 1 else f"{len(members)} of {count} members"
        log = worker.log if worker.rank == 0 or stack_size < count else (lambda line: None)
        resumed = {m: states[m] for m in members} if states[members[0]] else None
        final = run_loop(partial(loop, members, states=resumed), f"{kind} classifiers ({some})", log, save)
        finals = member_states(final, len(members)) if final else [states[m] for m in members]
        for m, state in zip(members, finals):
            save_finished(plan.member_file(kind, m), weights_of(state))
            states.pop(m, None)


def members_done(plan: TrainingPlan, kinds: Sequence[str], count: int) -> bool:
    """Whether the members of some kinds are trained."""
    return all(is_finished(plan.member_file(kind, m)) for kind in kinds for m in range(count))


def encoded(plan: TrainingPlan) -> bool:
    """Whether codes are there, or nobody needs them any more."""
    return storage.exists(plan.file(f"codes-{plan.num_folds}", "count.json")) or STAGES["latent"].done(plan)


def guided(plan: TrainingPlan) -> bool:
    """Whether a guide is there, or no training needs it."""
    needed = plan.vae.label_weight > 0 and not STAGES["vae"].done(plan)
    return not (needed or not STAGES["sharp"].done(plan)) or is_finished(plan.file("guide.safetensors"))


#: In the order in which they run.
STAGES = {
    "recipe": Stage(recipe_stage, lambda plan: with_recipe(plan) is not None),
    "guide": Stage(guide_stage, guided, new_guide),
    "vae": Stage(vae_stage, lambda plan: is_finished(plan.file("vae.safetensors")), lambda plan: VAE(plan.vae)),
    "encode": Stage(encode_stage, encoded),
    "latent": Stage(
        latent_stage, lambda plan: members_done(plan, plan.latent_kinds(), plan.ensemble.num_members), by_member=True
    ),
    "images": Stage(image_stage, lambda plan: members_done(plan, ["image"], plan.image_members), by_member=True),
    "judge": Stage(
        judge_stage,
        lambda plan: plan.judge_training is None or is_finished(plan.file("judge.safetensors")),
        lambda plan: build_judge(plan.vae.image_shape, len(plan.class_names)),
        by_member=True,  # the last worker trains it
    ),
    "sharp": Stage(
        sharp_stage,
        lambda plan: plan.decoder != "sharp" or is_finished(plan.file("sharp.safetensors")),
        lambda plan: Decoder(plan.vae),
    ),
}
#: All but the search for values that the plan leaves open.
TRAINED = tuple(name for name in STAGES if name != "recipe")


def load_network(plan: TrainingPlan, name: str) -> Any:
    """The network that a stage trained, in eval mode; None where it made none."""
    file, build = plan.file(f"{name}.safetensors"), STAGES[name].network
    weights = weights_of(load_tensors(file)) if storage.exists(file) else None
    if not weights:
        return None
    assert build is not None
    network = build(plan)
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval()


def is_finished(file: str) -> bool:
    """Whether a checkpoint is there and needs no more training."""
    return storage.exists(file) and int(load_tensors(file)["epoch"]) == FINISHED


def save_finished(file: str, weights: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint that needs no more training."""
    tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in weights.items()}
    save_tensors(file, {**tensors, "epoch": torch.tensor(FINISHED)})
