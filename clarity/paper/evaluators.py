"""The networks that the comparison scores images with: a judge, autoencoders for each class, an attribute network.

Knows their training and files. Does not know which method made an image, nor the metrics (``metrics.py``).

Shapes: B rows, C, H, W image, K classes, A attributes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from clarity import storage
from clarity.judges import JudgeConfig, JudgeNet, build_judge, check_image_shape, in_batches, predict_probs
from clarity.training.judge import JudgeTraining, fit, train_judge

FORMAT = 1
JUDGES_JSON = "judges.json"


@dataclass(frozen=True)
class AutoEncoderConfig:
    """The shape of one autoencoder of IM1 and IM2: two strided convolutions, a narrow code, and the way back.

    The code is narrow on purpose: an autoencoder that can draw every class says nothing about one of them.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, int] = (16, 32)
    code_dim: int = 16

    def __post_init__(self) -> None:
        check_image_shape(self.image_shape)


class AutoEncoder(nn.Module):
    """Images in [0, 1] to images in [0, 1] through a narrow code."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        depth, height, width = config.image_shape
        first, second = config.channels
        self._sizes = ((math.ceil(height / 2), math.ceil(width / 2)), (math.ceil(height / 4), math.ceil(width / 4)))
        inner = second * self._sizes[1][0] * self._sizes[1][1]
        self.encoder = nn.Sequential(
            nn.Conv2d(depth, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(inner, config.code_dim),
        )
        self.expand = nn.Linear(config.code_dim, inner)
        self.up_first = nn.Conv2d(second, first, 3, padding=1)
        self.up_second = nn.Conv2d(first, depth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions (B, C, H, W) in [0, 1]."""
        second = self.config.channels[1]
        hidden = F.relu(self.expand(self.encoder(x))).view(-1, second, *self._sizes[1])
        hidden = F.relu(self.up_first(F.interpolate(hidden, size=self._sizes[0])))
        return torch.sigmoid(self.up_second(F.interpolate(hidden, size=self.config.image_shape[1:])))


@dataclass
class Judges:
    """All networks of one data set, in evaluation mode.

    ``autoencoders`` holds K + 1 nets: one for each class in the order of ``class_names``, the last for all classes.
    ``attribute_net`` answers one logit for each of ``attributes``; it is None where a data set has none.
    ``card`` says how they were trained and how accurate they are.
    """

    class_names: tuple[str, ...]
    oracle: JudgeNet
    autoencoders: nn.ModuleList
    attributes: tuple[str, ...] = ()
    attribute_net: JudgeNet | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.oracle.config.image_shape

    @property
    def fingerprint(self) -> str:
        """Sha256 over all weights and names: rows are reused only with the same networks."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.attributes]).encode())
        for net in self.nets():
            for name, tensor in sorted(net.state_dict().items()):
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def nets(self) -> list[nn.Module]:
        """Every network."""
        return [self.oracle, self.autoencoders, *([self.attribute_net] if self.attribute_net is not None else [])]

    def eval(self) -> Judges:
        """Sets every network to evaluation mode and returns self."""
        for net in self.nets():
            net.eval()
        return self


def build_judges(
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    attributes: Sequence[str] = (),
    *,
    seed: int = JudgeTraining.seed,
) -> Judges:
    """Untrained judges of a data set; images above 32 pixels get one more block, wider nets and a longer code.

    Raises:
        ValueError: for fewer than two classes.
    """
    if len(class_names) < 2:
        raise ValueError(f"judges need at least two classes, got {list(class_names)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        oracle = build_judge(image_shape, len(class_names))
        code_dim = 64 if max(image_shape[1:]) > 32 else AutoEncoderConfig.code_dim
        autoencoders = nn.ModuleList(
            AutoEncoder(AutoEncoderConfig(image_shape, code_dim=code_dim)) for _ in range(len(class_names) + 1)
        )
        attribute_net = build_judge(image_shape, len(attributes)) if attributes else None
    return Judges(tuple(class_names), oracle, autoencoders, tuple(attributes), attribute_net).eval()


def train_judges(
    judges: Judges,
    images: np.ndarray,
    labels: np.ndarray,
    config: JudgeTraining | None = None,
    *,
    autoencoder_updates: int | None = None,
    attributes: np.ndarray | None = None,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    held_out_attributes: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
    """Train every judge and yield metrics about ten times for each network: {net, update, updates, loss, ...}.

    Args:
        judges: from ``build_judges``.
        images: (N, C, H, W) uint8, the judges' half of the training images.
        labels: (N,) class indices, negative where unknown: such images serve the attribute net alone.
        config: budget; ``JudgeTraining.for_images`` when None.
        autoencoder_updates: of each autoencoder; by default a third of the judge's, at least 200.
        attributes: (N, A) of 0, 1, and negative where unknown; needed when the judges have an attribute net.
        held_out: images and labels, whose accuracy closes the oracle's training and goes into the card.
        held_out_attributes: those of the same images; the accuracy on each of them goes into the card.

    Raises:
        ValueError: when a class has no image, or when shapes do not fit.
    """
    config = config or JudgeTraining.for_images(len(images))
    autoencoder_updates = autoencoder_updates or max(200, config.updates // 3)
    images, labels = np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)
    if images.dtype != np.uint8 or images.shape[1:] != judges.image_shape or len(labels) != len(images):
        raise ValueError(
            f"judges of {judges.image_shape} need uint8 images (N, {', '.join(map(str, judges.image_shape))}) and as "
            f"many labels, got {images.dtype} {images.shape} and {len(labels)} labels"
        )
    counts = np.bincount(labels[labels >= 0], minlength=len(judges.class_names))
    if len(counts) > len(judges.class_names) or (counts == 0).any():
        raise ValueError(f"every class needs training images for its judges, got counts {counts.tolist()}")
    if (judges.attribute_net is None) != (attributes is None):
        raise ValueError("attributes are given exactly when the judges have an attribute net")

    known = np.flatnonzero(labels >= 0)
    yield from train_judge(judges.oracle, images, labels, config, "oracle")
    if held_out is not None:
        accuracy = float((predict_probs(judges.oracle, held_out[0]).argmax(1) == held_out[1]).mean())
        judges.card["oracle_accuracy"] = accuracy
        yield {"net": "oracle", "update": config.updates, "updates": config.updates, "held_out_accuracy": accuracy}
    for k, net in enumerate(judges.autoencoders):
        name = f"autoencoder {judges.class_names[k] if k < len(judges.class_names) else 'all'}"
        rows = np.flatnonzero(labels == k) if k < len(judges.class_names) else known
        yield from fit(name, net, images, rows, autoencoder_updates, config, reconstruction_loss)
    if judges.attribute_net is not None and attributes is not None:
        loss = attribute_loss(torch.from_numpy(np.asarray(attributes, dtype=np.float32)))
        rows = np.arange(len(images))
        yield from fit("attributes", judges.attribute_net, images, rows, config.updates, config, loss, augment=True)
        if held_out is not None and held_out_attributes is not None:
            probs = predict_probs(judges.attribute_net, held_out[0], sigmoid=True)
            found = attribute_accuracies(judges.attributes, probs, held_out_attributes)
            judges.card["attribute_accuracy"] = found
            accuracies = [accuracy["accuracy"] for accuracy in found.values()]
            closing = {"net": "attributes", "update": config.updates, "updates": config.updates}
            yield {**closing, "held_out_accuracy": float(np.mean(accuracies))}
    judges.card |= {
        "training": asdict(config) | {"autoencoder_updates": autoencoder_updates},
        "num_images": len(images),
        "num_labelled": len(known),
    }


def attribute_accuracies(names: Sequence[str], probs: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """How well each attribute is seen, where it is known.

    Args:
        names: A names.
        probs: (B, A).
        truth: (B, A) of 0, 1, and negative where unknown.

    Returns:
        For each name that is known anywhere: ``accuracy``, ``balanced_accuracy`` (mean over the two answers, those that
        occur), and ``share``, how often it is set.
    """
    found = {}
    for a, name in enumerate(names):
        known = truth[:, a] >= 0
        if known.any():
            wanted = truth[known, a] > 0
            hits = (probs[known, a] > 0.5) == wanted
            sides = [hits[side].mean() for side in (wanted, ~wanted) if side.any()]
            figures = {"accuracy": hits.mean(), "balanced_accuracy": np.mean(sides), "share": wanted.mean()}
            found[name] = {key: float(value) for key, value in figures.items()}
    return found


def reconstruction_loss(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """Mean squared error of the images themselves."""
    return F.mse_loss(net(x).float(), x)


def attribute_loss(targets: Tensor) -> Any:
    """Binary cross-entropy of the attributes (N, A) that are known, as a loss for ``fit``."""

    def loss(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        wanted = targets[rows]
        return F.binary_cross_entropy_with_logits(net(x).float(), wanted.clamp(min=0), weight=(wanted >= 0).float())

    return loss


def reconstruct(autoencoders: nn.ModuleList, which: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Each image (B, C, H, W) rebuilt by the autoencoder that ``which`` (B,) names by its index; float32 in [0, 1]."""
    out = np.empty(images.shape, dtype=np.float32)
    for k in np.unique(which):
        rows = np.flatnonzero(which == k)
        out[rows] = in_batches(autoencoders[int(k)], images[rows], 1024)
    return out


def save_judges(judges: Judges, uri: str) -> None:
    """Write ``oracle``, ``autoencoders`` and ``attribute_net`` as safetensors, and ``judges.json`` last."""
    nets = {"oracle": judges.oracle, "autoencoders": judges.autoencoders, "attribute_net": judges.attribute_net}
    sums = {}
    for name, net in nets.items():
        if net is not None:
            data = save_tensors({key: value.contiguous() for key, value in net.state_dict().items()})
            sums[name] = hashlib.sha256(data).hexdigest()
            storage.write_bytes(storage.join(uri, f"{name}.safetensors"), data)
    content = {
        "format": FORMAT,
        "class_names": judges.class_names,
        "attributes": judges.attributes,
        "oracle": asdict(judges.oracle.config),
        "autoencoder": asdict(judges.autoencoders[0].config),  # type: ignore[call-overload]
        "sha256": sums,
        "card": judges.card,
    }
    storage.write_json(storage.join(uri, JUDGES_JSON), content)


def load_judges(uri: str) -> Judges:
    """Read what ``save_judges`` wrote, in evaluation mode.

    Raises:
        ValueError: when the folder holds no judges, or when a file is not the one that was saved.
    """
    path = storage.join(uri, JUDGES_JSON)
    if not storage.exists(path):
        raise ValueError(f"no judges at {storage.display(uri)}: expected {JUDGES_JSON} there")
    content = storage.read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"judges at {storage.display(uri)} have format {content.get('format')}, expected {FORMAT}")

    def tensors(name: str) -> dict[str, Tensor]:
        data = storage.read_bytes(storage.join(uri, f"{name}.safetensors"))
        if hashlib.sha256(data).hexdigest() != content["sha256"].get(name):
            raise ValueError(f"{name}.safetensors at {storage.display(uri)} is not the file that was saved there")
        return load_tensors(data)

    oracle = JudgeNet(net_config(content["oracle"]))
    shape = content["autoencoder"]
    code = AutoEncoderConfig(tuple(shape["image_shape"]), tuple(shape["channels"]), shape["code_dim"])
    autoencoders = nn.ModuleList(AutoEncoder(code) for _ in range(len(content["class_names"]) + 1))
    oracle.load_state_dict(tensors("oracle"))
    autoencoders.load_state_dict(tensors("autoencoders"))
    attributes, attribute_net = tuple(content["attributes"]), None
    if attributes:
        attribute_net = JudgeNet(net_config(content["oracle"] | {"num_outputs": len(attributes)}))
        attribute_net.load_state_dict(tensors("attribute_net"))
    return Judges(
        tuple(content["class_names"]), oracle, autoencoders, attributes, attribute_net, content["card"]
    ).eval()


def net_config(content: dict[str, Any]) -> JudgeConfig:
    """The config that ``save_judges`` wrote."""
    return JudgeConfig(
        tuple(content["image_shape"]), content["num_outputs"], tuple(content["channels"]), content["num_features"]
    )
