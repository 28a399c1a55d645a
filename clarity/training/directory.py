"""The model directory of a training: begin it, take a finished model up again, assemble and measure its parts."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from clarity import storage
from clarity.audit.plan import compared, flatten
from clarity.classifiers import ImageEnsemble, LatentEnsemble
from clarity.data import list_images
from clarity.model import Model, load_model, load_tensors, read_card, save_model
from clarity.report.text import counted
from clarity.rows import logits_rows
from clarity.training.attributes import fit_heads
from clarity.training.distil import MEASURED_IMAGES, fidelity, original_probs
from clarity.training.evaluate import BASELINE_IMAGES, evaluate, evenly
from clarity.training.loops import Log, join_states, member_states, num_updates, weights_of
from clarity.training.plan import EXTRAS, TEACHERS, TrainingPlan
from clarity.training.stages import (
    is_finished,
    load_codes,
    load_images,
    load_network,
    log_errors,
    plan_predictor,
    save_finished,
)


def begin(plan: TrainingPlan) -> bool:
    """Prepares the model directory; True when it already holds exactly this model; ValueError for another one.

    A finished model that lacks only EXTRAS is split into checkpoints again, so that the stages find the rest done. Of
    one that a predictor or a refit is to teach, all but the ensembles is kept.
    """
    require_same(plan)
    wanted, card, file = plan.describe(), read_card(plan.out), plan.file("plan.json")
    begun = storage.read_json(file) if storage.exists(file) else wanted
    found = described(plan)
    if card is not None and found == wanted:
        return True
    searched_by_another = card is None and found is None and not plan.recipe
    if searched_by_another or (card is not None and begun != wanted):
        storage.delete_tree(plan.file())
    elif begun["judge_updates"] != wanted["judge_updates"]:
        storage.delete(plan.file("judge.safetensors"))
    storage.write_json(file, wanted)
    if card is not None:
        restore_checkpoints(plan, found or {})
    return False


def described(plan: TrainingPlan) -> Mapping[str, Any] | None:
    """The description of the model in the plan's directory, finished or not; None where there is none."""
    card, file = read_card(plan.out), plan.file("plan.json")
    if card is not None:
        return card.get("plan") or {}
    return storage.read_json(file) if storage.exists(file) else None


def require_same(plan: TrainingPlan) -> dict[str, str] | None:
    """Raises ValueError where the directory holds another model, or one that began without the plan's search.

    Returns what may differ and does, by parameter: "3 there, 4 here"; None where no model is there. Values that a
    search has still to choose may differ.
    """
    found, wanted, finished = described(plan), plan.describe(), read_card(plan.out) is not None
    if found is None:
        return None
    may = set(EXTRAS)
    if not finished and found.get("image_training"):
        may -= {"image_training" if plan.image_members else "image_members"}
    if not finished and (plan.vae.label_weight or plan.decoder == "sharp"):
        may -= {"attributes"}  # which the guide learns
    if finished and not taught_alike(plan, found):
        may |= plan.teachers.keys() | {"ensemble_training"}
    names = dict.fromkeys([*wanted, *sorted(EXTRAS), *TEACHERS])
    there, here = (flatten({name: each.get(name) for name in names}) for each in (found, wanted))
    refused, changed = dict[str, str](), dict[str, str]()
    for name in there | here:
        if there.get(name) != here.get(name) and name.rpartition(".")[2] not in plan.searched:
            values = compared(there.get(name), here.get(name), "there", "here")
            if name.partition(".")[0] not in may:
                refused[parameter_of(name)] = "other images" if name == "data" else values
            elif name in there and name in here:
                changed[parameter_of(name)] = values
    if refused:
        unfinished = "" if finished else "the unfinished training of "
        said = f"{unfinished}another model: {'; '.join(f'{name}: {values}' for name, values in refused.items())}"
    elif plan.searched:
        said = f"an unfinished training that began without a search for {', '.join(plan.searched)}"
    else:
        return changed
    raise ValueError(f"out: {storage.display(plan.out)} holds {said}. Choose another directory, or delete that one")


def parameter_of(name: str) -> str:
    """The parameter that sets an entry of a plan's description, as vae_epochs does vae_training.epochs."""
    part, _, entry = name.partition(".")
    if part in ("vae", "ensemble") or entry == "seed":
        return entry
    return f"{part.removesuffix('training')}{entry}" if entry and part.endswith("_training") else name


def networks(plan: TrainingPlan) -> dict[str, bool]:
    """The networks that a plan asks for, and whether each is there, in the finished model or as a checkpoint."""
    found, wanted, (latent, *folds) = described(plan) or {}, plan.describe(), plan.latent_kinds()
    finished, file, same = read_card(plan.out) is not None, plan.file("plan.json"), taught_alike(plan, found)
    resumed = storage.exists(file) and storage.read_json(file) == wanted

    def alike(name: str) -> bool:
        return bool(found.get(name) == wanted.get(name))

    def members(kinds: Sequence[str], count: int) -> list[str]:
        return [plan.member_file(kind, m) for kind in kinds for m in range(count)]

    def one(name: str, asked: bool = True) -> list[str]:
        return [plan.file(f"{name}.safetensors")] if asked else []

    count, images = plan.ensemble.num_members, found.get("image_members", 0) >= plan.image_members
    # Of each, whether the model that was found has the one that is wanted, and its checkpoints.
    about = {
        "VAE": (True, one("vae")),
        "ensemble": (same, members([latent], count)),
        "ensembles of folds": (same and alike("num_folds"), members(folds, count)),
        "image ensemble": (images and alike("image_training"), members(["image"], plan.image_members)),
        "judge": (alike("judge_updates"), one("judge", plan.judge_training is not None)),
        "sharp decoder": (alike("sharp_training"), one("sharp", plan.decoder == "sharp")),
    }
    return {
        name: (known and finished) or ((known or resumed) and all(map(is_finished, files)))
        for name, (known, files) in about.items()
        if files
    }


def taught_alike(plan: TrainingPlan, found: Mapping[str, Any]) -> bool:
    """Whether the ensembles of a described model learned from the same labels, predictor and audit as the plan's."""
    return all(found.get(name) == plan.teachers.get(name) for name in TEACHERS)


def restore_checkpoints(plan: TrainingPlan, found: Mapping[str, Any]) -> None:
    """Writes the parts of the finished model that the plan keeps as finished checkpoints."""
    model, wanted, same = load_model(plan.out), plan.describe(), taught_alike(plan, found)
    folds = model.folds if len(model.folds) == plan.num_folds else ()
    parts: list[tuple[str, Any]] = list(zip(plan.latent_kinds(), [model.ensemble, *folds])) if same else []
    if model.image_ensemble is not None and found.get("image_training") == wanted["image_training"]:
        parts.append(("image", model.image_ensemble))
    for kind, ensemble in parts:
        for m, state in enumerate(member_states(ensemble.state_dict(), ensemble.config.num_members)):
            save_finished(plan.member_file(kind, m), state)
    for name, training in (("vae", "vae_training"), ("judge", "judge_updates"), ("sharp", "sharp_training")):
        network = getattr(model, name)
        if network is not None and found.get(training) == wanted.get(training):
            save_finished(plan.file(f"{name}.safetensors"), network.state_dict())


def finish(plan: TrainingPlan, log: Log = lambda line: None) -> Model:
    """Assembles the trained parts, measures them on the held-out split, and writes the model directory."""
    ensemble, *folds = (assemble(plan, kind, LatentEnsemble(plan.ensemble)) for kind in plan.latent_kinds())
    image_ensemble = None
    if plan.image_members:
        image_ensemble = assemble(plan, "image", ImageEnsemble(plan.image_ensemble, plan.vae))
    model = Model(
        ensemble=ensemble,
        class_names=plan.class_names,
        preprocessing=plan.preprocessing,
        image_ensemble=image_ensemble,
        folds=tuple(folds),
        **{name: load_network(plan, name) for name in ("vae", "judge", "sharp")},
    )
    further: dict[str, Any] = {}
    if plan.attributes:
        log(f"fitting the heads of {counted(len(plan.attributes), 'attributes')}")
        given = plan.preprocessing, plan.dataset, plan.held_out, plan.attributes
        model.heads, further["attributes"] = fit_heads(model.vae, *given)
    measured: dict[str, Any] = {"metrics": {}}
    if plan.held_out is not None:
        held_out = load_images(plan, plan.held_out)
        log_errors(held_out, log)
        log(f"measuring on {counted(len(held_out.ids), 'held-out images')}")
        labelled = partial(load_images, plan, plan.dataset, BASELINE_IMAGES) if plan.data["labelled"] else None
        measured = evaluate(model, labelled, held_out)
    if folds and (found := measure_folds(plan, folds)):
        further["out_of_fold"] = found
    measured["metrics"] |= further
    if (predictor := plan_predictor(plan)) is not None:
        refit = None if plan.refit is None else storage.display(plan.refit)
        measured["predictor"] = {"name": predictor.name, "digest": predictor.digest, "refit": refit}
        if plan.held_out is not None and held_out.ids:
            some = held_out.take(evenly(len(held_out.ids), MEASURED_IMAGES))
            probs = original_probs(predictor, plan.held_out, list_images(plan.held_out), some, plan.preprocessing)
            measured["predictor"] |= fidelity(model, predictor, some, probs)
    updates = num_updates(plan.vae_training, plan.data["images"])
    card = {"data": plan.data, "plan": plan.describe(), "precision": plan.precision, "vae_updates": updates, **measured}
    save_model(model, plan.out, card=card | ({"recipe": plan.recipe} if plan.recipe else {}))
    storage.delete_tree(plan.file())
    return model


def measure_folds(plan: TrainingPlan, folds: Sequence[LatentEnsemble]) -> dict[str, float] | None:
    """Accuracy on the training split, each image by the ensemble that has not seen it; without codes, that known."""
    if not storage.exists(plan.file(f"codes-{plan.num_folds}", "count.json")):
        return (read_card(plan.out) or {}).get("metrics", {}).get("out_of_fold")
    codes, fold = load_codes(plan)
    hits = torch.zeros(len(codes), dtype=torch.bool)
    for number, ensemble in enumerate(folds):
        rows = fold == number
        hits[rows] = logits_rows(ensemble, codes.mean[rows]).softmax(-1).mean(0).argmax(-1) == codes.labels[rows]
    return {"accuracy": float(hits.double().mean())}


def assemble(plan: TrainingPlan, kind: str, network: Any) -> Any:
    """The network with the weights of all members of a kind, in eval mode."""
    states = [load_tensors(plan.member_file(kind, m)) for m in range(network.config.num_members)]
    network.load_state_dict(weights_of(join_states(states)))
    return network.requires_grad_(False).eval()
