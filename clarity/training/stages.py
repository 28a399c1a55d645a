"""A whole training, cut into stages that any number of workers share, and ``train``, which runs them without a cluster.

Knows what a training directory holds: its plan, the checkpoints of each stage, and the model at its end. Does not know
losses and schedules, which are in ``clarity.training``, nor Ray.

Shapes: N images, C, H, W image, D latent, K classes, M members.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from clarity import storage
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.data import (
    Dataset,
    class_names_of,
    infer_preprocessing,
    label_indices,
    list_images,
    listing_fingerprint,
    open_dataset,
    read_all,
)
from clarity.ids import fold_of, split_of
from clarity.images import Preprocessing
from clarity.model import Model, load_model, load_tensors, read_card, save_model, save_tensors
from clarity.rows import decode_rows, encode_rows, logits_rows
from clarity.training.loops import (
    Codes,
    EnsembleTraining,
    Epoch,
    ImageTraining,
    VAETraining,
    join_states,
    member_states,
    mixed_precision,
    num_epochs,
    train_image_members,
    train_latent_members,
    train_vae,
    weights_of,
)
from clarity.vae import LOSSES, VAEConfig, build_vae, vae_config

#: The epoch of a checkpoint that needs no more training.
FINISHED = 1 << 40
#: Seconds of work that a killed run may lose.
CHECKPOINT_SECONDS = 15.0
STAGES = ("vae", "encode", "latent", "images")
_ENCODE_ROWS = 4096


@dataclass(frozen=True)
class Images:
    """A split in memory.

    Args:
        pixels: uint8 (N, C, H, W).
        ids: N image ids.
        labels: int64 (N,), -1 where there is none.
        errors: image id -> why it could not be read; not among the N.
    """

    pixels: Tensor
    ids: list[str]
    labels: Tensor
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is to be trained, on what, and where to: enough for any worker to do its share.

    ``vae`` and ``ensemble`` are the networks, ``..._training`` how they are trained; ``image_members`` and
    ``num_folds`` may be 0. ``data`` describes the images for model.json; its fingerprint tells data sets apart.
    ``precision``, like the device, may be another when a training is resumed.
    """

    out: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    vae: VAEConfig
    ensemble: EnsembleConfig
    vae_training: VAETraining = field(default_factory=VAETraining)
    ensemble_training: EnsembleTraining = field(default_factory=EnsembleTraining)
    image_training: ImageTraining = field(default_factory=ImageTraining)
    image_members: int = 0
    num_folds: int = 0
    dataset: Dataset | None = None
    held_out: Dataset | None = None
    data: dict[str, Any] = field(default_factory=dict)
    precision: str = "auto"

    def __post_init__(self) -> None:
        mixed_precision(self.precision, torch.device("cpu"))
        if self.image_members < 0:
            raise ValueError(f"image_members must be at least 0, got {self.image_members}")
        if self.num_folds < 0 or self.num_folds == 1:
            raise ValueError(f"num_folds must be 0 or at least 2, got {self.num_folds}")

    @property
    def image_ensemble(self) -> EnsembleConfig:
        """Config of the image ensemble."""
        return replace(self.ensemble, num_members=self.image_members)

    def describe(self) -> dict[str, Any]:
        """What determines the result, as JSON: equal descriptions make equal models."""

        def resolved(training: VAETraining | EnsembleTraining | ImageTraining, count: str) -> dict[str, Any]:
            fields = {**asdict(training), "epochs": num_epochs(training, self.data[count])}
            return {name: value for name, value in fields.items() if name != "min_updates"}

        description = {
            "data": self.data.get("fingerprint"),
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.to_json(),
            "vae": asdict(self.vae),
            "vae_training": resolved(self.vae_training, "images"),
            "ensemble": asdict(self.ensemble),
            "ensemble_training": resolved(self.ensemble_training, "labelled"),
            "image_members": self.image_members,
            "image_training": resolved(self.image_training, "labelled") if self.image_members else None,
            "num_folds": self.num_folds,
        }
        return json.loads(json.dumps(description))

    def file(self, *parts: str) -> str:
        """A place for intermediate results, deleted when the model is finished."""
        return storage.join(self.out, "_training", *parts)

    def fold_kind(self, fold: int) -> str:
        """The kind of members that leave a fold out; folds of another number are others."""
        return f"fold-{fold}-of-{self.num_folds}"

    def member_file(self, kind: str, member: int) -> str:
        """The checkpoint of one member; kind is latent, image, or a ``fold_kind``."""
        return self.file("members", f"{kind}-{member:03d}.safetensors")


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together; alone by default."""

    rank: int = 0
    world: int = 1
    device: str | torch.device = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    say: Callable[[str], None] = lambda line: None


def plan_training(
    out: str,
    dataset: Dataset,
    held_out: Dataset | None,
    *,
    architecture: str = "conv",
    vae_fields: Mapping[str, Any] | None = None,
    num_members: int = 50,
    hidden: Sequence[int] = (16, 16),
    image_size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    center_crop: int | None = None,
    **fields: Any,
) -> Plan:
    """Look at the data and fix what depends on it: classes, preprocessing, shapes.

    Args:
        out: the model directory to be.
        dataset: to train on.
        held_out: for the metrics, or None.
        architecture: a key of VAES.
        vae_fields: fields of VAEConfig that differ from the architecture's own; None means its own too.
        num_members: M of the latent ensemble.
        hidden: widths of the classifiers' hidden layers.
        image_size: side of the images in the model, or (height, width); None looks at the data.
        mode: of the images in the model, "L" or "RGB"; None looks at the data.
        center_crop: side of the centred square that is taken of larger images; None takes the source's own, or all.
        fields: of Plan.
    """
    listing = list_images(dataset)
    class_names = class_names_of(listing)
    preprocessing = infer_preprocessing(dataset, listing, image_size=image_size, mode=mode, center_crop=center_crop)
    vae = vae_config(architecture, preprocessing.image_shape, **(vae_fields or {}))
    data = {
        "source": dataset.source,
        "place": None if dataset.data is None else storage.display(dataset.data),
        "split": dataset.split,
        "fingerprint": listing_fingerprint(listing),
        "images": len(listing),
        "labelled": len(listing) - listing["label_name"].null_count,
        "per_class": {name: pc.sum(pc.equal(listing["label_name"], name)).as_py() for name in class_names},
        "held_out": None if held_out is None else held_out.split,
    }
    return Plan(
        out=out,
        class_names=class_names,
        preprocessing=preprocessing,
        vae=vae,
        ensemble=EnsembleConfig(len(class_names), vae.latent_dim, tuple(hidden), num_members),
        dataset=dataset,
        held_out=held_out,
        data=data,
        **fields,
    )


def begin(plan: Plan) -> bool:
    """Prepare the model directory; True when it already holds just this model.

    A finished model that lacks only the image ensemble, members of it, or the folds is taken apart, so that the stages
    find everything else done.

    Raises:
        ValueError: another model is there, finished or not; names what differs.
    """
    description = plan.describe()
    card = read_card(plan.out)
    if card is not None:
        found = card.get("plan") or {}
        if found == description:
            return True
        _refuse_another(plan, found, description, {"image_members", "image_training", "num_folds"})
        storage.write_json(plan.file("plan.json"), description)
        _take_apart(plan, found)
        return False
    if storage.exists(plan.file("plan.json")):
        extras = {"image_members", "image_training", "num_folds"}
        found = storage.read_json(plan.file("plan.json"))
        _refuse_another(
            plan, found, description, extras - {"image_training"} if found.get("image_training") else extras
        )
    storage.write_json(plan.file("plan.json"), description)
    return False


def _refuse_another(plan: Plan, found: Mapping[str, Any], wanted: Mapping[str, Any], may_differ: set[str]) -> None:
    different = [name for name in wanted if name not in may_differ and found.get(name) != wanted[name]]
    if different:
        details = "; ".join(f"{name} is {found.get(name)!r} there, {wanted[name]!r} here" for name in different)
        raise ValueError(
            f"{storage.display(plan.out)} holds another model: {details}. Give another --out, or delete that directory"
        )


def _take_apart(plan: Plan, found: Mapping[str, Any]) -> None:
    model = load_model(plan.out)
    parts: list[tuple[str, Any]] = [("latent", model.ensemble)]
    if model.image_ensemble is not None and found.get("image_training") == plan.describe()["image_training"]:
        parts.append(("image", model.image_ensemble))
    if len(model.folds) == plan.num_folds:
        parts += [(plan.fold_kind(number), fold) for number, fold in enumerate(model.folds)]
    _save_finished(plan.file("vae.safetensors"), model.vae.state_dict())
    for kind, ensemble in parts:
        members = ensemble.config.num_members
        for m, state in enumerate(member_states(ensemble.state_dict(), members)):
            _save_finished(plan.member_file(kind, m), state)


def load_images(plan: Plan, dataset: Dataset) -> Images:
    """Read a split into memory, with its labels as indices."""
    pixels, ids, names, errors = read_all(dataset, list_images(dataset), plan.preprocessing)
    labels = label_indices(pa.array(names, pa.string()), plan.class_names).fill_null(-1).to_numpy(zero_copy_only=False)
    return Images(torch.from_numpy(pixels), ids, torch.from_numpy(labels.astype(np.int64)), errors)


def run_stages(plan: Plan, stages: Iterable[str], worker: Worker, images: Images | None = None) -> None:
    """Do this worker's share of some stages; what an earlier run has finished is not done again.

    Args:
        plan: what to train.
        stages: some of STAGES, in their order.
        worker: who does it; all workers of the world run the same stages.
        images: the training split, read by the plan when not given.
    """
    if not storage.exists(plan.file("plan.json")):
        raise ValueError(
            f"the worker of rank {worker.rank} does not see {storage.display(plan.out)}: with several nodes, give an "
            "--out that every node sees: s3://..., or a shared mount"
        )
    todo = [stage for stage in stages if not stage_done(plan, stage)]
    if images is None and {"vae", "encode", "images"} & set(todo):
        assert plan.dataset is not None
        images = load_images(plan, plan.dataset)
    for stage in todo:
        if stage == "latent":
            _latent_stage(plan, worker)
        else:
            assert images is not None
            {"vae": _vae_stage, "encode": _encode_stage, "images": _image_stage}[stage](plan, worker, images)


def stage_done(plan: Plan, stage: str) -> bool:
    """Whether nothing of a stage is left to do."""
    if stage == "vae":
        return _finished(plan.file("vae.safetensors"))
    if stage == "encode":
        return storage.exists(plan.file(f"codes-{plan.num_folds}", "count.json")) or (
            stage_done(plan, "vae") and stage_done(plan, "latent")
        )
    kinds = [(plan.image_members, "image")] if stage == "images" else _latent_kinds(plan)
    return all(_finished(plan.member_file(kind, m)) for count, kind in kinds for m in range(count))


def _latent_kinds(plan: Plan) -> list[tuple[int, str]]:
    members = plan.ensemble.num_members
    return [(members, "latent"), *((members, plan.fold_kind(fold)) for fold in range(plan.num_folds))]


def _finished(file: str) -> bool:
    return storage.exists(file) and int(load_tensors(file)["epoch"]) == FINISHED


def _save_finished(file: str, weights: Mapping[str, Tensor]) -> None:
    tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in weights.items()}
    save_tensors(file, {**tensors, "epoch": torch.tensor(FINISHED)})


def _vae_stage(plan: Plan, worker: Worker, images: Images) -> None:
    file = plan.file("vae.safetensors")
    state = load_tensors(file) if storage.exists(file) else None
    started = saved = time.monotonic()
    epoch = None
    for epoch in train_vae(
        images.pixels,
        plan.vae,
        plan.vae_training,
        state=state,
        rank=worker.rank,
        world=worker.world,
        wrap=worker.wrap,
        device=worker.device,
        precision=plan.precision,
    ):
        if worker.rank == 0:
            if _said(epoch):
                worker.say(_line("vae", epoch, started))
            if epoch.number < epoch.total and time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_tensors(file, epoch.state())
                saved = time.monotonic()
    if worker.rank == 0:
        final = epoch.state() if epoch else state
        assert final is not None
        _save_finished(file, weights_of(final))
    _wait_for_all(worker)


def _wait_for_all(worker: Worker) -> None:
    if worker.world > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _encode_stage(plan: Plan, worker: Worker, images: Images) -> None:
    vae = build_vae(plan.vae)
    vae.load_state_dict(weights_of(load_tensors(plan.file("vae.safetensors"))))
    vae.to(worker.device).eval()
    starts = range(0, len(images.pixels), _ENCODE_ROWS)
    for part in range(worker.rank, len(starts), worker.world):
        rows = slice(starts[part], starts[part] + _ENCODE_ROWS)
        mean, log_var = encode_rows(vae, images.pixels[rows].to(worker.device).float() / 255)
        folds = torch.tensor([fold_of(image_id, max(plan.num_folds, 1)) for image_id in images.ids[rows]])
        tensors = {"mean": mean, "log_var": log_var, "labels": images.labels[rows], "folds": folds}
        save_tensors(plan.file(f"codes-{plan.num_folds}", f"part-{part:05d}.safetensors"), tensors)
    _wait_for_all(worker)
    if worker.rank == 0:
        storage.write_json(plan.file(f"codes-{plan.num_folds}", "count.json"), len(starts))
        worker.say(f"encoded {len(images.pixels)} images")
    _wait_for_all(worker)


def _load_codes(plan: Plan) -> tuple[Codes, Tensor]:
    """Codes of the labelled images, and the fold of each."""
    count = storage.read_json(plan.file(f"codes-{plan.num_folds}", "count.json"))
    codes = join_states(
        [load_tensors(plan.file(f"codes-{plan.num_folds}", f"part-{part:05d}.safetensors")) for part in range(count)]
    )
    labelled = codes["labels"] >= 0
    every = Codes(codes["mean"], codes["log_var"], codes["labels"])
    return every.take(labelled), codes["folds"][labelled]


def _latent_stage(plan: Plan, worker: Worker) -> None:
    codes, folds = _load_codes(plan)
    for count, kind in _latent_kinds(plan):
        known = codes if kind == "latent" else codes.take(folds != int(kind.split("-")[1]))

        def loop(members: Sequence[int], states: Any, known: Codes = known) -> Iterator[Epoch]:
            return train_latent_members(
                known, plan.ensemble, plan.ensemble_training, members, states=states, device=worker.device
            )

        _members_stage(plan, worker, kind, count, count, loop)


def _image_stage(plan: Plan, worker: Worker, images: Images) -> None:
    labelled = images.labels >= 0
    pixels, labels = images.pixels[labelled], images.labels[labelled]
    config = plan.image_ensemble

    def loop(members: Sequence[int], states: Any) -> Iterator[Epoch]:
        return train_image_members(
            pixels,
            labels,
            config,
            plan.vae,
            plan.image_training,
            members,
            states=states,
            device=worker.device,
            precision=plan.precision,
        )

    # On a CPU the arithmetic is what costs and a small working set is faster; a GPU wants all it can get at once.
    at_once = 1 if torch.device(worker.device).type == "cpu" else 10
    _members_stage(plan, worker, "image", plan.image_members, at_once, loop)


def _members_stage(
    plan: Plan,
    worker: Worker,
    kind: str,
    count: int,
    at_once: int,
    loop: Callable[[Sequence[int], Any], Iterator[Epoch]],
) -> None:
    """Train this worker's members: those whose number leaves its rank when divided by the world's size."""
    states: dict[int, dict[str, Tensor]] = {}
    for m in range(worker.rank, count, worker.world):
        file = plan.member_file(kind, m)
        states[m] = load_tensors(file) if storage.exists(file) else {}
    # Members of one stack go on from the same epoch.
    by_epoch: dict[int, list[int]] = {}
    for m, state in states.items():
        by_epoch.setdefault(int(state["epoch"]) if state else 0, []).append(m)
    by_epoch.pop(FINISHED, None)
    stacks = [group[i : i + at_once] for group in by_epoch.values() for i in range(0, len(group), at_once)]
    for members in stacks:
        started = saved = time.monotonic()
        epoch = None
        for epoch in loop(members, {m: states[m] for m in members} if states[members[0]] else None):
            if _said(epoch) and (worker.rank == 0 or at_once < count):
                some = f"{len(members)} of {count} members" if len(members) > 1 else f"member {members[0]} of {count}"
                worker.say(_line(f"{kind} classifiers ({some})", epoch, started))
            if epoch.number < epoch.total and time.monotonic() - saved > CHECKPOINT_SECONDS:
                for m, state in zip(members, member_states(epoch.state(), len(members))):
                    save_tensors(plan.member_file(kind, m), state)
                saved = time.monotonic()
        finals = member_states(epoch.state(), len(members)) if epoch else [states[m] for m in members]
        for m, state in zip(members, finals):
            _save_finished(plan.member_file(kind, m), weights_of(state))
            states.pop(m, None)


def _said(epoch: Epoch) -> bool:
    """Whether a line is printed after this epoch: a small data set is passed over hundreds of times."""
    return epoch.number in (1, epoch.total) or epoch.number % math.ceil(epoch.total / 12) == 0


def _line(what: str, epoch: Epoch, started: float) -> str:
    """What is said of an epoch, ending in the minutes and seconds since this process took the loop up."""
    numbers = "  ".join(f"{name} {value:#.4g}" for name, value in epoch.metrics.items())
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f"{what}: epoch {epoch.number}/{epoch.total}  {numbers}  {minutes}:{seconds:02d}"


def finish(plan: Plan, held_out: Images | None = None, say: Callable[[str], None] = lambda line: None) -> Model:
    """Put the trained parts together, measure them on the held-out split, and write the model directory.

    Args:
        plan: what was trained.
        held_out: the held-out split, read by the plan when not given.
        say: told what is being done.
    """
    vae = build_vae(plan.vae)
    vae.load_state_dict(weights_of(load_tensors(plan.file("vae.safetensors"))))
    folds = [_assemble(plan, plan.fold_kind(fold), LatentEnsemble(plan.ensemble)) for fold in range(plan.num_folds)]
    model = Model(
        vae=vae.requires_grad_(False).eval(),
        ensemble=_assemble(plan, "latent", LatentEnsemble(plan.ensemble)),
        class_names=plan.class_names,
        preprocessing=plan.preprocessing,
        image_ensemble=_assemble(plan, "image", ImageEnsemble(plan.image_ensemble, plan.vae))
        if plan.image_members
        else None,
        folds=tuple(folds),
    )
    if held_out is None and plan.held_out is not None:
        held_out = load_images(plan, plan.held_out)
    say(f"measuring on {len(held_out.ids) if held_out else 0} held-out images")
    metrics = evaluate(model, held_out) if held_out and len(held_out.ids) else {}
    if folds and storage.exists(plan.file(f"codes-{plan.num_folds}", "count.json")):
        metrics["out_of_fold"] = _out_of_fold(plan, folds)
    card = {"data": plan.data, "plan": plan.describe(), "precision": plan.precision, "metrics": metrics}
    save_model(model, plan.out, card=card)
    storage.delete_tree(plan.file())
    return model


def _assemble(plan: Plan, kind: str, network: Any) -> Any:
    states = [load_tensors(plan.member_file(kind, m)) for m in range(network.config.num_members)]
    network.load_state_dict(weights_of(join_states(states)))
    return network.requires_grad_(False).eval()


def _out_of_fold(plan: Plan, folds: Sequence[LatentEnsemble]) -> dict[str, float]:
    codes, fold = _load_codes(plan)
    hits = torch.zeros(len(codes), dtype=torch.bool)
    for number, ensemble in enumerate(folds):
        rows = fold == number
        hits[rows] = logits_rows(ensemble, codes.mean[rows]).softmax(-1).mean(0).argmax(-1) == codes.labels[rows]
    return {"accuracy": float(hits.double().mean())}


# ---- metrics of a model --------------------------------------------------------------------------------------------


def evaluate(model: Model, images: Images, noise_seed: int = 0) -> dict[str, Any]:
    """What model.json says of a model on images that it was not trained on.

    Returns:
        ``vae``: the parts of the evidence lower bound (nats, one sample from each posterior) and the mean absolute
        error of the reconstruction from the posterior mean; ``ensemble`` and, if there is one, ``image_ensemble``: see
        ``classification_metrics``, on the labelled images.
    """
    generator = torch.Generator().manual_seed(noise_seed)
    sums = torch.zeros(3, dtype=torch.float64)
    means = []
    for pixels in images.pixels.split(1024):
        x = pixels.float() / 255
        mean, log_var = encode_rows(model.vae, x.to(model.device))
        mean, log_var = mean.cpu(), log_var.cpu()
        means.append(mean)
        noise = torch.randn(mean.shape, generator=generator)
        sampled = decode_rows(model.vae, (mean + torch.exp(0.5 * log_var) * noise).to(model.device)).cpu()
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()
        error = (decode_rows(model.vae, mean.to(model.device)).cpu() - x).abs().sum()
        logits = torch.logit(sampled.double(), eps=1e-7)
        sums += torch.stack([LOSSES[model.vae.config.loss](logits, x.double()).sum(), kl.double(), error.double()])
    reconstruction, kl_mean, error_mean = (sums / len(images.pixels)).tolist()
    metrics: dict[str, Any] = {
        "images": len(images.pixels),
        "unreadable": len(images.errors),
        "vae": {
            "loss": reconstruction + model.vae.config.beta * kl_mean,
            "reconstruction": reconstruction,
            "kl": kl_mean,
            "absolute_error": error_mean / math.prod(model.image_shape),
        },
    }
    labelled = images.labels >= 0
    labels = images.labels[labelled]
    if len(labels):
        points = torch.cat(means)[labelled].to(model.device)
        logits = logits_rows(model.ensemble, points).cpu()
        metrics["ensemble"] = classification_metrics(logits, labels, model.class_names)
        if model.image_ensemble is not None:
            pixels = images.pixels[labelled].split(1024)
            parts = [logits_rows(model.image_ensemble, p.to(model.device).float() / 255).cpu() for p in pixels]
            metrics["image_ensemble"] = classification_metrics(torch.cat(parts, 1), labels, model.class_names)
    return metrics


def classification_metrics(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """How good an ensemble is.

    Args:
        logits: (M, B, K).
        labels: int64 (B,).
        class_names: K names.

    Returns:
        ``accuracy`` of the members' mean, ``balanced_accuracy`` (mean over the classes present), ``per_class`` accuracy
        by name, ``member_accuracy`` (M,), ``calibration_error`` (expected, 15 equal bins; Guo et al. 2017), ``nll`` in
        nats.
    """
    probs = logits.double().softmax(-1)
    member_hits = (probs.argmax(-1) == labels).double().mean(1)
    mean = probs.mean(0)
    top, predicted = mean.max(-1)
    hits = (predicted == labels).double()
    per_class = {
        name: float(hits[labels == k].mean()) for k, name in enumerate(class_names) if bool((labels == k).any())
    }
    bins = (top * 15).long().clamp_max(14)
    gaps = [(top[bins == b].mean() - hits[bins == b].mean()).abs() * (bins == b).double().mean() for b in bins.unique()]
    return {
        "accuracy": float(hits.mean()),
        "balanced_accuracy": sum(per_class.values()) / len(per_class),
        "per_class": per_class,
        "member_accuracy": member_hits.tolist(),
        "member_accuracy_mean": float(member_hits.mean()),
        "calibration_error": float(torch.stack(gaps).sum()),
        "nll": float(-mean[torch.arange(len(labels)), labels].clamp_min(1e-30).log().mean()),
    }


# ---- the door for notebooks ----------------------------------------------------------------------------------------


def train(
    dataset: str | Dataset | tuple[Any, Sequence[Any]] = "digits",
    out: storage.URI | None = None,
    *,
    data: storage.URI | None = None,
    held_out: Dataset | tuple[Any, Sequence[Any]] | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
    **fields: Any,
) -> Model:
    """Train a model without a cluster (``clarity.train``): the same loops, the same directory, one process.

    Args:
        dataset: the name of a source, a Dataset, or (images, labels): uint8 or floats in [0, 1], (N, C, H, W) or
            (N, H, W), with one label each.
        out: where to; None keeps the model in memory alone.
        data: place of a named source's data.
        held_out: for the metrics; by default the test split, or one in ten of the arrays.
        device: "auto" takes a GPU when there is one.
        say: told each epoch; ``print`` shows them.
        fields: as in ``plan_training``.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        place = str(out) if out is not None else scratch
        training_set: Images | None = None
        measured: Images | None = None
        if isinstance(dataset, tuple):
            training_set, measured, names = _from_arrays(dataset, held_out if isinstance(held_out, tuple) else None)
            plan = _plan_arrays(place, training_set, names, **fields)
        else:
            if isinstance(dataset, str):
                dataset = open_dataset(dataset, data, "train", unlabelled=True)
            if not isinstance(held_out, Dataset):
                held_out = replace(dataset, split="test", unlabelled=False)
            plan = plan_training(place, dataset, held_out, **fields)
        if begin(plan):
            return load_model(plan.out).to(device)
        run_stages(plan, STAGES, Worker(device=device, say=say), training_set)
        return finish(plan, measured, say).to(device)


def _from_arrays(given: tuple[Any, Sequence[Any]], held_out: tuple[Any, Sequence[Any]] | None) -> Any:
    names = sorted(
        {str(label) for label in given[1]},
        key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name),
    )
    images = _arrays(*given, names)
    if held_out is not None:
        return images, _arrays(*held_out, names), names
    test = torch.tensor([split_of(image_id) == "test" for image_id in images.ids])
    return _rows(images, ~test), _rows(images, test), names


def _arrays(pixels: Any, labels: Sequence[Any], names: Sequence[str]) -> Images:
    pixels = np.asarray(pixels)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) != len(labels):
        raise ValueError(
            f"expected images (N, C, H, W) or (N, H, W) with C = 1 or 3 and N labels, got {pixels.shape} "
            f"and {len(labels)} labels"
        )
    if pixels.dtype != np.uint8:
        if not (np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"expected images of uint8, or floats in [0, 1], got {pixels.dtype}")
        pixels = np.round(pixels * 255).astype(np.uint8)
    index = {name: k for k, name in enumerate(names)}
    found = torch.tensor([index.get(str(label), -1) for label in labels])
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), [str(i) for i in range(len(pixels))], found)


def _rows(images: Images, keep: Tensor) -> Images:
    return Images(images.pixels[keep], [i for i, k in zip(images.ids, keep.tolist()) if k], images.labels[keep])


def _plan_arrays(
    out: str,
    images: Images,
    names: Sequence[str],
    *,
    architecture: str = "conv",
    vae_fields: Mapping[str, Any] | None = None,
    num_members: int = 50,
    hidden: Sequence[int] = (16, 16),
    **fields: Any,
) -> Plan:
    channels, height, width = images.pixels.shape[1:]
    vae = vae_config(architecture, (channels, height, width), **(vae_fields or {}))
    digest = hashlib.sha256(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()
    return Plan(
        out=out,
        class_names=tuple(names),
        preprocessing=Preprocessing("L" if channels == 1 else "RGB", height, width),
        vae=vae,
        ensemble=EnsembleConfig(len(names), vae.latent_dim, tuple(hidden), num_members),
        data={
            "source": "arrays",
            "fingerprint": digest,
            "images": len(images.ids),
            "labelled": int((images.labels >= 0).sum()),
        },
        **fields,
    )
