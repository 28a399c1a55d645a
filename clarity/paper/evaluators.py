"""The networks that the comparison scores images with: a judge, autoencoders for each class, an attribute network."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clarity import storage
from clarity.judges import build_judge, in_batches, predict_probs
from clarity.model import load_tensors, save_tensors
from clarity.training.evaluate import accuracies
from clarity.training.judge import JudgeTraining, fit, train_judge

JUDGES_FILE, JUDGES_JSON = "judges.safetensors", "judges.json"


class AutoEncoder(nn.Module):
    """An autoencoder of IM1 and IM2, with a code too small to reconstruct classes that it was not trained on."""

    def __init__(self, image_shape: tuple[int, int, int], code_dim: int) -> None:
        super().__init__()
        depth, height, width = image_shape
        self._sizes = [(math.ceil(height / side), math.ceil(width / side)) for side in (4, 2, 1)]
        inner = 32 * self._sizes[0][0] * self._sizes[0][1]
        self.encoder = nn.Sequential(
            nn.Conv2d(depth, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(inner, code_dim),
        )
        self.expand = nn.Linear(code_dim, inner)
        self.up_first = nn.Conv2d(32, 16, 3, padding=1)
        self.up_second = nn.Conv2d(16, depth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to images in [0, 1]."""
        hidden = F.relu(self.expand(self.encoder(x))).view(-1, 32, *self._sizes[0])
        hidden = F.relu(self.up_first(F.interpolate(hidden, size=self._sizes[1])))
        return torch.sigmoid(self.up_second(F.interpolate(hidden, size=self._sizes[2])))


class Judges(nn.Module):
    """All networks of one data set; ``card`` says how they were trained and how accurate they are.

    ``autoencoders`` are one for each class and the last for all; ``attribute_net`` answers one logit for each of
    ``attributes``, and is None where a data set has none.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], class_names: Sequence[str], attributes: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.image_shape, self.class_names = tuple(image_shape), tuple(class_names)
        self.attributes = tuple(attributes)
        self.card: dict[str, Any] = {}
        self.code_dim = 64 if max(image_shape[1:]) > 32 else 16
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(JudgeTraining.seed)
            self.oracle = build_judge(image_shape, len(class_names))
            self.autoencoders = nn.ModuleList(
                AutoEncoder(image_shape, self.code_dim) for _ in range(len(class_names) + 1)
            )
            self.attribute_net = build_judge(image_shape, len(attributes)) if attributes else None
        self.eval()


def train_judges(
    judges: Judges,
    images: np.ndarray,
    labels: np.ndarray,
    attributes: np.ndarray,
    config: JudgeTraining | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains every judge and yields metrics about ten times for each network: {net, update, updates, loss}.

    Images (N, C, H, W) uint8 are the judges' half of the training images; those with a negative label serve the
    attribute net alone. Each autoencoder gets a third of the budget, but 200 updates. ``attributes`` (N, A) are 0, 1,
    and negative where unknown. ValueError: a class has no image.
    """
    config = config or JudgeTraining.for_images(len(images))
    counts = np.bincount(labels[labels >= 0], minlength=len(judges.class_names))
    if (counts == 0).any():
        raise ValueError(f"every class needs training images for its judges, got counts {counts.tolist()}")

    def squared_error(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        return F.mse_loss(net(x).float(), x)

    yield from train_judge(judges.oracle, images, labels, config, "oracle")
    known, shorter = np.flatnonzero(labels >= 0), replace(config, updates=max(200, config.updates // 3))
    groups = {name: np.flatnonzero(labels == k) for k, name in enumerate(judges.class_names)}
    for net, (name, rows) in zip(judges.autoencoders, [*groups.items(), ("all", known)]):
        yield from fit(f"autoencoder {name}", net, images, rows, shorter, squared_error)
    if judges.attribute_net is not None:
        yield from train_judge(judges.attribute_net, images, attributes, config, "attributes")
    judges.card |= {"training": asdict(config), "num_images": len(images), "num_labelled": len(known)}


def evaluate_judges(judges: Judges, images: np.ndarray, labels: np.ndarray, attributes: np.ndarray) -> None:
    """Puts the accuracies on held-out images, labels (N,) and attributes (N, A), where known, on the card."""
    known = labels >= 0
    seen = predict_probs(judges.oracle, images[known]).argmax(1)
    judges.card["oracle_accuracy"] = float((seen == labels[known]).mean())
    if judges.attribute_net is not None:
        probs = predict_probs(judges.attribute_net, images, sigmoid=True)
        judges.card["attribute_accuracy"] = attribute_accuracies(judges.attributes, probs, attributes)


def attribute_accuracies(names: Sequence[str], probs: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracies and share of each attribute; ``probs`` (B, A), ``truth`` (B, A) of 0, 1, negative where unknown."""
    found = {}
    for name, prob, wanted in zip(names, probs.T, truth.T):
        known = wanted >= 0
        if known.any():
            is_set = wanted[known] > 0
            found[name] = {**accuracies(prob[known] > 0.5, is_set), "share": float(is_set.mean())}
    return found


def reconstruct(autoencoders: nn.ModuleList, which: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Each image (B, C, H, W) rebuilt by the autoencoder that ``which`` (B,) names by its index; float32 in [0, 1]."""
    out = np.empty(images.shape, dtype=np.float32)
    for k in np.unique(which):
        rows = np.flatnonzero(which == k)
        out[rows] = in_batches(autoencoders[int(k)], images[rows])
    return out


def save_judges(judges: Judges, uri: str) -> None:
    """Writes the weights, and last the names and the card in JUDGES_JSON."""
    save_tensors(storage.join(uri, JUDGES_FILE), judges.state_dict())
    names = ("image_shape", "class_names", "attributes", "card")
    storage.write_json(storage.join(uri, JUDGES_JSON), {name: getattr(judges, name) for name in names})


def load_judges(uri: str) -> Judges:
    """Reads what ``save_judges`` wrote; ValueError where the directory holds no judges."""
    path = storage.join(uri, JUDGES_JSON)
    if not storage.exists(path):
        shown = storage.display(uri)
        raise ValueError(f"judges: expected {JUDGES_JSON} in {shown}, found none: left out, they are trained")
    content = storage.read_json(path)
    judges = Judges(tuple(content["image_shape"]), content["class_names"], content["attributes"])
    judges.load_state_dict(load_tensors(storage.join(uri, JUDGES_FILE)))
    judges.card = content["card"]
    return judges
