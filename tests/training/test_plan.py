"""The plan of a training: its fields by short names, and the directories that it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_images

import clarity
from clarity import data
from clarity.training import cost
from clarity.training.cost import costs
from clarity.training.loops import IMAGE_TRAINING, VAETraining, num_epochs
from clarity.training.plan import plan_training, training_fields
from clarity.training.recipe import LEAST_LABELLED


def test_training_fields_may_be_written_short() -> None:
    found = training_fields({"vae_epochs": 6, "ensemble_batch_size": 9, "image_epochs": 2, "image_min_updates": 70})
    assert num_epochs(found["vae_training"], 100) == 6, "epochs alone are exactly so many"
    assert found["ensemble_training"].batch_size == 9
    assert (found["image_training"].epochs, found["image_training"].min_updates) == (2, 70)
    assert found["image_training"].learning_rate == IMAGE_TRAINING.learning_rate
    assert training_fields({"vae_training": VAETraining(), "vae_seed": 7})["vae_training"] == VAETraining(seed=7)


@pytest.mark.parametrize("name", ["epochs", "vae_epoch", "learning_rate"])
def test_unknown_fields_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: unknown; expected .*image_members, .*, or one of vae_epochs, "):
        clarity.train("digits", **{name: 6})


def test_a_model_inside_its_data_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/2.png")
    dataset = data.open_dataset("folder", tmp_path, "all")
    with pytest.raises(ValueError, match=r"out: expected a directory outside the data, got .*/model"):
        plan_training(str(tmp_path / "model"), dataset, None)


def test_a_plan_warns_of_held_out_images_that_are_trained_on(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")

    def planned(split: str, held_out: data.Dataset | None) -> dict[str, Any]:
        return plan_training(str(tmp_path / "m"), data.open_dataset("folder", tmp_path / "data", split), held_out).data

    held_out = data.open_dataset("folder", tmp_path / "data", "held-out")
    for split in ("all", "validation"):
        found = planned(split, held_out)
        assert found["remarks"][0].startswith("WARNING: 2 held-out images are also trained on")
        assert found["held_out_trained"] == 2
    write_images(tmp_path / "other", "val/a/1.png", "val/b/1.png")
    other = data.open_dataset("folder", tmp_path / "other", "validation")
    for split, measured in (("train", held_out), ("all", None), ("validation", other)):
        assert planned(split, measured)["held_out_trained"] == 0


def test_a_plan_refuses_images_that_no_memory_holds(tmp_path: Path) -> None:
    dataset = data.open_dataset("digits")
    said = r"image_size: expected at most 134217728 pixels in an update .*, got 3200000000 in 128 images of 5000"
    with pytest.raises(ValueError, match=said):
        plan_training(str(tmp_path), dataset, None, image_size=5000)
    assert plan_training(str(tmp_path), dataset, None, image_size=5000, vae_batch_size=5).vae.image_shape[1] == 5000


def test_costs_count_the_updates_of_every_network(tmp_path: Path) -> None:
    short = {"vae_epochs": 2, "ensemble_epochs": 3, "image_epochs": 1, "num_members": 2, "judge_updates": 5}
    network = {"vae_fields": {"latent_dim": 3, "channels": (4, 5)}, "hidden": (6,)}
    dataset = data.open_dataset("digits")
    plan = plan_training(str(tmp_path), dataset, None, num_folds=2, image_members=3, **network, **short)
    rows = plan.data["labelled"]
    found = {cost.part: cost for cost in costs(plan)}
    assert {part: (cost.networks, cost.updates) for part, cost in found.items()} == {
        "judge": (1, 5),
        "VAE": (1, 2 * (rows // 128)),
        "ensemble": (1, 3 * (rows // 256)),
        "ensembles of folds": (2, 3 * (rows // 256)),
        "image ensemble": (3, rows // 128),
    }
    assert all(0 < cost.seconds < 60 for cost in found.values())
    longer = plan_training(str(tmp_path), dataset, None, recipe="auto", **{**network, **short, "vae_epochs": 200})
    more = {cost.part: cost for cost in costs(longer)}
    assert more["VAE"].seconds > 10 * found["VAE"].seconds and {"search: VAEs", "search: ensembles"} <= set(more)
    # Three codes, as the dimension is given and the weights of the KL term and the labels are not: 3 x 3 steps and 5
    # further ones; the widths are given. The search trains a guide of its own.
    assert (more["search: VAEs"].networks, more["search: ensembles"].networks) == (3, 14)
    assert (more["search: VAEs"].updates, more["search: longer VAE"].updates) == (400, 800)
    assert more["search: guide"].updates == more["guide"].updates == 400 and "search: judge" not in more
    large = plan_training(str(tmp_path), dataset, None, recipe="auto", image_size=33, **network, **short)
    assert "search: judge" in {cost.part for cost in costs(large)}
    few = replace(longer, data={**longer.data, "labelled": LEAST_LABELLED - 1})
    assert {"search: VAEs", "search: ensembles"}.isdisjoint(cost.part for cost in costs(few))


def test_costs_are_timed_on_batches_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a smaller batch takes up to eight times as long, and several threads hide what a core has to do."""
    plan = plan_training(str(tmp_path), data.open_dataset("digits"), None, num_members=2, vae_batch_size=48)
    rows: dict[str, set[tuple[int, int]]] = {}
    for name in ("train_vae", "train_latent_members", "train_judge"):
        loop = getattr(cost, name)

        def recorded(first: Any, *args: Any, name: str = name, loop: Any = loop, **options: Any) -> Any:
            timed = args[0] if name == "train_judge" else first.mean if name == "train_latent_members" else first
            rows.setdefault(name, set()).add((len(timed), torch.get_num_threads()))
            return loop(first, *args, **options)

        monkeypatch.setattr(cost, name, recorded)
    cost.costs(plan)
    assert rows == {"train_vae": {(48, 1)}, "train_latent_members": {(256, 1)}, "train_judge": {(128, 1)}}
