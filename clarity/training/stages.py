"""The stages of a training, resumable and shared by any number of workers.

Knows which files each stage reads and writes. Does not know losses and schedules (``loops``), nor Ray.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from clarity import storage
from clarity.audit.read import read_audit
from clarity.classifiers import ImageEnsemble, LatentEnsemble
from clarity.data import Dataset, label_indices, list_images, read_all
from clarity.ids import fold_of, in_judges_half
from clarity.judges import JudgeNet, build_judge
from clarity.model import Model, load_tensors, save_model, save_tensors
from clarity.predictor import Predictor
from clarity.rows import encode_rows, logits_rows
from clarity.training.attributes import fit_heads
from clarity.training.distil import (
    COPIES,
    MEASURED_IMAGES,
    audit_codes,
    fidelity,
    load_same,
    original_probs,
    perturb,
    relabel,
    single_codes,
)
from clarity.training.evaluate import BASELINE_IMAGES, LabelledImages, evaluate, evaluation
from clarity.training.judge import train_judge
from clarity.training.loops import (
    Codes,
    Epoch,
    join_states,
    member_states,
    seeded,
    train_image_members,
    train_latent_members,
    train_vae,
    weights_of,
)
from clarity.training.optimiser import generator_for
from clarity.training.plan import FINISHED, TrainingPlan, is_finished, save_finished
from clarity.training.recipe import IMAGES, search_recipe, with_recipe
from clarity.vae import VAE

#: Seconds of work that a killed run may lose.
CHECKPOINT_SECONDS = 15.0
#: Fall of the loss in the last third of the epochs above which a training was too short; MNIST's VAE falls by 3 %, the
#: ensemble by 5 %. The last epochs alone tell nothing: their learning rate is nearly zero.
STILL_FALLING = 0.1
STAGES = ("vae", "encode", "latent", "images", "judge")
ENCODE_ROWS = 4096


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together; a single one by default.

    Args:
        rank: of this process.
        world: number of processes.
        device: to train on.
        wrap: makes a module data-parallel.
        log: receives lines about the progress.
    """

    rank: int = 0
    world: int = 1
    device: str | torch.device = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    log: Callable[[str], None] = lambda line: None

    def wait_for_all(self) -> None:
        """Returns when all workers have arrived here."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()


def load_images(
    plan: TrainingPlan, dataset: Dataset, limit: int | None = None, labelled: bool = True
) -> LabelledImages:
    """Reads a split into memory, or at most ``limit`` of its (labelled) images, with labels as indices."""
    listing = list_images(dataset)
    if limit is not None:
        if labelled:
            listing = listing.filter(pc.is_valid(listing["label_name"]))
        listing = listing.take(evenly(len(listing), limit))
    pixels, ids, names, errors = read_all(dataset, listing, plan.preprocessing)
    labels = label_indices(pa.array(names, pa.string()), plan.class_names).fill_null(-1).to_numpy(zero_copy_only=False)
    return LabelledImages(torch.from_numpy(pixels), ids, torch.from_numpy(labels.astype(np.int64)), errors)


def evenly(count: int, limit: int) -> np.ndarray:
    """Indices of at most ``limit`` of ``count`` rows, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int))


def run_stages(plan: TrainingPlan, stages: Iterable[str], worker: Worker) -> None:
    """Does this worker's share of some stages; what an earlier run has finished is not done again.

    Args:
        plan: what to train.
        stages: some of STAGES, in their order; or "recipe" alone, which comes before a plan is begun.
        worker: who does it; all workers of the world run the same stages.
    """
    if list(stages) != ["recipe"] and not storage.exists(plan.file("plan.json")):
        raise ValueError(
            f"out: the worker of rank {worker.rank} does not see {storage.display(plan.out)}; with several nodes, "
            "choose a directory that every node sees: s3://..., or a shared mount"
        )
    todo = [stage for stage in stages if not stage_done(plan, stage)]
    if "recipe" in todo:
        if worker.rank == 0:
            some = load_images(plan, plan.dataset, IMAGES, labelled=plan.predictor is None)
            if (predictor := plan_predictor(plan, worker.device)) is not None:
                some = relabel(
                    some, original_probs(predictor, plan.dataset, list_images(plan.dataset), some, plan.preprocessing)
                )
            storage.write_json(plan.file("recipe.json"), search_recipe(plan, some, worker.device, worker.log))
        worker.wait_for_all()
        return
    images = load_images(plan, plan.dataset) if {"vae", "encode", "images", "judge"} & set(todo) else None
    if images is not None and worker.rank == 0:
        log_errors(images, worker.log)
    for stage in todo:
        if stage == "latent":
            train_latent_stage(plan, worker)
        else:
            assert images is not None
            run = {
                "vae": train_vae_stage,
                "encode": encode_stage,
                "images": train_image_stage,
                "judge": train_judge_stage,
            }[stage]
            run(plan, worker, images)


def log_errors(images: LabelledImages, log: Callable[[str], None]) -> None:
    """Logs how many images cannot be read, a line for each of the five most frequent reasons."""
    for reason, count in Counter(images.errors.values()).most_common(5):
        log(f"left out: {count} images that cannot be read: {reason}")


def stage_done(plan: TrainingPlan, stage: str) -> bool:
    """Whether nothing of a stage is left to do."""
    if stage == "vae":
        return is_finished(plan.file("vae.safetensors"))
    if stage == "recipe":
        return with_recipe(plan) is not None
    if stage == "judge":
        return plan.judge_training is None or storage.exists(plan.file("judge.safetensors"))
    if stage == "encode":
        return storage.exists(plan.file(f"codes-{plan.num_folds}", "count.json")) or (
            stage_done(plan, "vae") and stage_done(plan, "latent")
        )
    kinds = ["image"] if stage == "images" else plan.latent_kinds()
    count = plan.image_members if stage == "images" else plan.ensemble.num_members
    return all(is_finished(plan.member_file(kind, m)) for kind in kinds for m in range(count))


def train_vae_stage(plan: TrainingPlan, worker: Worker, images: LabelledImages) -> None:
    """Trains the VAE, all workers together."""
    file = plan.file("vae.safetensors")
    state = load_tensors(file) if storage.exists(file) else None
    epochs = train_vae(
        images.pixels,
        plan.vae,
        plan.vae_training,
        state=state,
        rank=worker.rank,
        world=worker.world,
        wrap=worker.wrap,
        device=worker.device,
        precision=plan.precision,
    )
    if worker.rank == 0:
        final = follow(epochs, "vae", worker.log, lambda state: save_tensors(file, state)) or state
        assert final is not None
        save_finished(file, weights_of(final))
    else:
        follow(epochs, "vae")
    worker.wait_for_all()


def follow(
    epochs: Iterator[Epoch],
    what: str,
    log: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor] | None:
    """Runs a loop to its end, with a line of progress and a checkpoint now and then.

    Returns:
        The final state, None when no epoch was left to do.
    """
    started = saved = time.monotonic()
    epoch = None
    losses: dict[int, float] = {}
    for epoch in epochs:
        losses[epoch.number] = epoch.metrics["loss"]
        # A small data set takes hundreds of epochs, of which about twelve are reported.
        if epoch.number in (1, epoch.total) or epoch.number % math.ceil(epoch.total / 12) == 0:
            numbers = "  ".join(f"{name} {value:#.4g}" for name, value in epoch.metrics.items())
            minutes, seconds = divmod(round(time.monotonic() - started), 60)
            log(f"{what}: epoch {epoch.number}/{epoch.total}  {numbers}  {minutes}:{seconds:02d}")
        if save is not None and epoch.number < epoch.total and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(epoch.state())
            saved = time.monotonic()
    if epoch and (fall := late_fall(losses, epoch.total)) > STILL_FALLING:
        log(f"{what}: the loss still fell by {fall:.1%} in the last third of the epochs: more of them would help")
    return epoch.state() if epoch and save is not None else None


def late_fall(losses: Mapping[int, float], total: int) -> float:
    """By which share the loss fell in the last third of the epochs; 0 where that cannot be told."""
    before = losses.get(total - total // 3)
    return 0.0 if total < 6 or before is None else (before - losses[total]) / abs(before)


def plan_predictor(plan: TrainingPlan, device: str | torch.device = "cpu") -> Predictor | None:
    """The predictor of the plan, if it has one."""
    if plan.predictor is None:
        return None
    return load_same(plan.predictor, plan.asked["predictor"], plan.class_names, device)


def encode_stage(plan: TrainingPlan, worker: Worker, images: LabelledImages) -> None:
    """Encodes the training split, each worker some blocks of it, and asks the predictor where there is one."""
    vae = VAE(plan.vae)
    vae.load_state_dict(weights_of(load_tensors(plan.file("vae.safetensors"))))
    vae.to(worker.device).eval()
    predictor = plan_predictor(plan, worker.device)
    listing = None if predictor is None else list_images(plan.dataset)
    starts = range(0, len(images.pixels), ENCODE_ROWS)
    audit = [] if plan.refit is None else list(audit_codes(read_audit(plan.refit), ENCODE_ROWS))
    for part in range(worker.rank, len(starts) + len(audit), worker.world):
        file = plan.file(f"codes-{plan.num_folds}", f"part-{part:05d}.safetensors")
        if storage.exists(file):
            continue
        if part >= len(starts):
            assert predictor is not None
            ids, z = audit[part - len(starts)]
            tensors = single_codes(predictor, vae, z)
        else:
            some = images.take(slice(starts[part], starts[part] + ENCODE_ROWS))
            mean, log_var = encode_rows(vae, some.pixels.to(worker.device).float() / 255)
            ids, tensors = some.ids, {"mean": mean, "log_var": log_var, "labels": some.labels}
            if predictor is not None:
                generator = generator_for(plan.ensemble_training.seed, "perturb", part)
                around = single_codes(predictor, vae, perturb(mean.cpu(), generator))
                probs = original_probs(predictor, plan.dataset, listing, some, plan.preprocessing)
                tensors = join_states([{"mean": mean.cpu(), "log_var": log_var.cpu(), "probs": probs}, around])
                ids = ids * (1 + COPIES)
        folds = torch.tensor([fold_of(image_id, max(plan.num_folds, 1)) for image_id in ids])
        save_tensors(file, {**tensors, "folds": folds})
    worker.wait_for_all()
    if worker.rank == 0:
        storage.write_json(plan.file(f"codes-{plan.num_folds}", "count.json"), len(starts) + len(audit))
        worker.log(f"encoded {len(images.pixels)} images")
    worker.wait_for_all()


def load_codes(plan: TrainingPlan) -> tuple[Codes, Tensor]:
    """Codes of the labelled images, or those with a predictor's probabilities, and the fold of each."""
    directory = plan.file(f"codes-{plan.num_folds}")
    count = storage.read_json(storage.join(directory, "count.json"))
    parts = [load_tensors(storage.join(directory, f"part-{part:05d}.safetensors")) for part in range(count)]
    codes = join_states(parts)
    if plan.predictor is not None:
        known = ~codes["probs"].isnan().any(1)
        found = Codes(codes["mean"], codes["log_var"], codes["probs"].argmax(1), codes["probs"])
    else:
        known = codes["labels"] >= 0
        found = Codes(codes["mean"], codes["log_var"], codes["labels"])
    return found.take(known), codes["folds"][known]


def train_latent_stage(plan: TrainingPlan, worker: Worker) -> None:
    """Trains this worker's members of the latent ensembles."""
    codes, folds = load_codes(plan)
    for kind in plan.latent_kinds():
        known = codes if kind == "latent" else codes.take(folds != int(kind.split("-")[1]))

        def loop(members: Sequence[int], states: Any, known: Codes = known) -> Iterator[Epoch]:
            return train_latent_members(
                known, plan.ensemble, plan.ensemble_training, members, states=states, device=worker.device
            )

        train_members_stage(plan, worker, kind, plan.ensemble.num_members, plan.ensemble.num_members, loop)


def train_image_stage(plan: TrainingPlan, worker: Worker, images: LabelledImages) -> None:
    """Trains this worker's members of the image ensemble."""
    labelled = images.labels >= 0
    pixels, labels = images.pixels[labelled], images.labels[labelled]

    def loop(members: Sequence[int], states: Any) -> Iterator[Epoch]:
        return train_image_members(
            pixels,
            labels,
            plan.image_ensemble,
            plan.vae,
            plan.image_training,
            members,
            states=states,
            device=worker.device,
            precision=plan.precision,
        )

    # On a CPU the arithmetic dominates and a small working set is faster; a GPU needs many members to be busy.
    stack_size = 1 if torch.device(worker.device).type == "cpu" else 10
    train_members_stage(plan, worker, "image", plan.image_members, stack_size, loop)


def train_judge_stage(plan: TrainingPlan, worker: Worker, images: LabelledImages) -> None:
    """Trains the held-out judge on its half of the labelled images, on the last worker; a cut one starts again."""
    if worker.rank != worker.world - 1 or plan.judge_training is None:
        return
    half = torch.from_numpy(in_judges_half(images.ids)) & (images.labels >= 0)
    pixels, labels = images.pixels[half].numpy(), images.labels[half].numpy()
    counts = np.bincount(labels, minlength=len(plan.class_names))
    if counts.min() == 0:
        missing = [name for name, count in zip(plan.class_names, counts) if not count]
        worker.log(f"no judge: its half of the images has none of class {', '.join(missing[:5])}")
        save_tensors(plan.file("judge.safetensors"), {"epoch": torch.tensor(FINISHED)})
        return
    net = seeded(lambda: build_judge(plan.vae.image_shape, len(plan.class_names)), plan.judge_training.seed, "judge", 0)
    started = time.monotonic()
    for report in train_judge(net, pixels, labels, plan.judge_training):
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        worker.log(
            f"judge: update {report['update']}/{report['updates']}  loss {report['loss']:#.4g}  {minutes}:{seconds:02d}"
        )
    save_finished(plan.file("judge.safetensors"), net.state_dict())


def train_members_stage(
    plan: TrainingPlan,
    worker: Worker,
    kind: str,
    count: int,
    stack_size: int,
    loop: Callable[[Sequence[int], Any], Iterator[Epoch]],
) -> None:
    """Trains this worker's members of a kind: those whose number modulo the world's size is its rank."""
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

        some = f"{len(members)} of {count} members" if len(members) > 1 else f"member {members[0]} of {count}"
        log = worker.log if worker.rank == 0 or stack_size < count else (lambda line: None)
        epochs = loop(members, {m: states[m] for m in members} if states[members[0]] else None)
        final = follow(epochs, f"{kind} classifiers ({some})", log, save)
        finals = member_states(final, len(members)) if final else [states[m] for m in members]
        for m, state in zip(members, finals):
            save_finished(plan.member_file(kind, m), weights_of(state))
            states.pop(m, None)


def finish(plan: TrainingPlan, log: Callable[[str], None] = lambda line: None) -> Model:
    """Assembles the trained parts, measures them on the held-out split, and writes the model directory."""
    vae = VAE(plan.vae)
    vae.load_state_dict(weights_of(load_tensors(plan.file("vae.safetensors"))))
    folds = [assemble(plan, plan.fold_kind(fold), LatentEnsemble(plan.ensemble)) for fold in range(plan.num_folds)]
    image_ensemble = None
    if plan.image_members:
        image_ensemble = assemble(plan, "image", ImageEnsemble(plan.image_ensemble, plan.vae))
    model = Model(
        vae=vae.requires_grad_(False).eval(),
        ensemble=assemble(plan, "latent", LatentEnsemble(plan.ensemble)),
        class_names=plan.class_names,
        preprocessing=plan.preprocessing,
        image_ensemble=image_ensemble,
        folds=tuple(folds),
        judge=assemble_judge(plan),
    )
    heads_metrics: dict[str, Any] = {}
    if plan.attributes:
        log(f"fitting the heads of {len(plan.attributes)} attributes")
        model.heads, heads_metrics = fit_heads(vae, plan.preprocessing, plan.dataset, plan.held_out, plan.attributes)
    held_out = None if plan.held_out is None else load_images(plan, plan.held_out)
    if held_out is not None:
        log_errors(held_out, log)
    log(f"measuring on {len(held_out.ids) if held_out else 0} held-out images")
    metrics = evaluate(model, held_out) if held_out and len(held_out.ids) else {}
    if heads_metrics:
        metrics["attributes"] = heads_metrics
    verdict: dict[str, Any] = {}
    if held_out and plan.data["labelled"] and bool((held_out.labels >= 0).any()):
        verdict = evaluation(model, load_images(plan, plan.dataset, BASELINE_IMAGES), held_out)
    if folds and storage.exists(plan.file(f"codes-{plan.num_folds}", "count.json")):
        metrics["out_of_fold"] = {"accuracy": out_of_fold_accuracy(plan, folds)}
    if (predictor := plan_predictor(plan)) is not None:
        refit = None if plan.refit is None else storage.display(plan.refit)
        verdict["predictor"] = {"name": predictor.name, "digest": predictor.digest, "refit": refit}
        if held_out is not None and plan.held_out is not None:
            some = held_out.take(evenly(len(held_out.ids), MEASURED_IMAGES))
            probs = original_probs(predictor, plan.held_out, list_images(plan.held_out), some, plan.preprocessing)
            verdict["predictor"] |= fidelity(model, predictor, some, probs)
    card = {
        "data": plan.data,
        "plan": plan.describe(),
        "precision": plan.precision,
        "metrics": metrics,
        **({"recipe": plan.recipe} if plan.recipe else {}),
        **verdict,
    }
    save_model(model, plan.out, card=card)
    storage.delete_tree(plan.file())
    return model


def assemble(plan: TrainingPlan, kind: str, network: Any) -> Any:
    """The network with the weights of all members of a kind, in eval mode."""
    states = [load_tensors(plan.member_file(kind, m)) for m in range(network.config.num_members)]
    network.load_state_dict(weights_of(join_states(states)))
    return network.requires_grad_(False).eval()


def assemble_judge(plan: TrainingPlan) -> JudgeNet | None:
    """The trained judge in eval mode, or None."""
    if plan.judge_training is None:
        return None
    weights = weights_of(load_tensors(plan.file("judge.safetensors")))
    if not weights:
        return None
    net = build_judge(plan.vae.image_shape, len(plan.class_names))
    net.load_state_dict(weights)
    return net.requires_grad_(False).eval()


def out_of_fold_accuracy(plan: TrainingPlan, folds: Sequence[LatentEnsemble]) -> float:
    """Accuracy on the training split, each image classified by the ensemble that has not seen it."""
    codes, fold = load_codes(plan)
    hits = torch.zeros(len(codes), dtype=torch.bool)
    for number, ensemble in enumerate(folds):
        rows = fold == number
        hits[rows] = logits_rows(ensemble, codes.mean[rows]).softmax(-1).mean(0).argmax(-1) == codes.labels[rows]
    return float(hits.double().mean())
