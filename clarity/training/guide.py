"""The guide: an image classifier of classes and attributes, by which a decoder learns to show those of an image.

It is trained before the decoder, on images outside the judge's half; it is not kept, and evaluates nothing.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from clarity.data import list_images
from clarity.ids import in_judges_half
from clarity.judges import JudgeNet, build_judge
from clarity.training.evaluate import LabelledImages
from clarity.training.judge import JudgeTraining, log_updates, train_judge
from clarity.training.loops import Log, seeded
from clarity.training.plan import TrainingPlan


def new_guide(plan: TrainingPlan) -> JudgeNet:
    """An untrained guide: an output for each class and each attribute."""
    outputs = len(plan.class_names) + len(plan.attributes)
    return seeded(lambda: build_judge(plan.vae.image_shape, outputs), plan.sharp_training.seed, "guide", 0)


def train_guide(
    plan: TrainingPlan, images: LabelledImages, log: Log, device: str | torch.device = "cpu"
) -> JudgeNet | None:
    """A guide trained on the images outside the judge's half of which something is known; None where there is none."""
    split = images.take(np.flatnonzero(~in_judges_half(images.ids)))
    truth = known_of(plan, split)
    rows = np.flatnonzero((truth >= 0).any(1))
    if not len(rows):
        return None
    training = replace(JudgeTraining.for_images(len(rows)), precision=plan.precision)
    net = new_guide(plan)
    given = split.pixels.numpy()[rows], truth[rows], training, "guide", device
    log_updates("guide", train_judge(net, *given), log)
    return net.requires_grad_(False)


def known_of(plan: TrainingPlan, split: LabelledImages) -> np.ndarray:
    """Whether each image is of each class and has each attribute: (N, F) of 0 and 1, -1 where that is unknown."""
    labels = split.labels.numpy()[:, None]
    known = np.where(labels >= 0, labels == np.arange(len(plan.class_names)), -1)
    listing = list_images(replace(plan.dataset, attributes=plan.attributes))
    rows = pc.index_in(pa.array(split.ids), value_set=listing["image_id"])
    columns = [listing[name].cast(pa.float64()).fill_null(np.nan).to_numpy() for name in plan.attributes]
    values = [np.where(np.isnan(column), -1, column == np.nanmax(column))[rows] for column in columns]
    return np.stack([*known.T, *values], 1)
