"""The nets that judge and are never judged: an image oracle, autoencoders for each class, an attribute net.

Knows their architectures, training and files. Does not know which method made an image, nor what is counted from the
nets' answers (``metrics.py``).

What keeps them independent of the classifiers under test: another architecture (pairs of 3x3 convolutions with max
pooling and global averaging, where the classifiers have three strided convolutions over the VAE's layers), another
seed, random shifts, turns and scales instead of adversarial steps, and only the training images for which
``in_judges_half`` is true. Classifiers that were trained on *all* training images have seen that half too; a judge has
never seen their weights, codes or gradients.

Shapes: B rows, C, H, W image, K classes, F features, A attributes.
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
from clarity.training.loops import mixed_precision

FORMAT = 1
JUDGES_JSON = "judges.json"


@dataclass(frozen=True)
class JudgeNetConfig:
    """The shape of a judging image classifier: the oracle, or the attribute net."""

    image_shape: tuple[int, int, int]
    num_outputs: int
    channels: tuple[int, ...] = (12, 24, 48)
    num_features: int = 64

    def __post_init__(self) -> None:
        _check_image_shape(self.image_shape)
        if self.num_outputs < 1 or not self.channels:
            raise ValueError(f"a judging net needs outputs and channels, got {self.num_outputs} and {self.channels}")


@dataclass(frozen=True)
class AutoEncoderConfig:
    """The shape of one autoencoder of IM1 and IM2: two strided convolutions, a narrow code, and the way back.

    The code is narrow on purpose: an autoencoder that can draw every class says nothing about one of them.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, int] = (16, 32)
    code_dim: int = 16

    def __post_init__(self) -> None:
        _check_image_shape(self.image_shape)


@dataclass(frozen=True)
class JudgeTraining:
    """How judges are trained: Adam under a one-cycle schedule up to ``learning_rate``.

    ``updates`` of ``batch_size`` rows are what the oracle and the attribute net get, each autoencoder gets
    ``autoencoder_updates``; ``precision`` is one of training.PRECISIONS. The defaults are for MNIST's 30,000 (99.4
    % on its test images; eight minutes on one core); ``for_images`` is less where there are fewer (99.0 % on the
    digits' from 2,250 images, in one minute).
    """

    updates: int = 2400
    autoencoder_updates: int = 800
    batch_size: int = 128
    learning_rate: float = 0.005
    weight_decay: float = 1e-4
    shift: float = 0.08
    turn: float = 0.17
    scale: float = 0.1
    seed: int = 90210
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.updates < 1 or self.autoencoder_updates < 1 or self.batch_size < 2:
            raise ValueError(f"judges need updates of at least 1 and batches of at least 2, got {self}")
        mixed_precision(self.precision, torch.device("cpu"))

    @classmethod
    def for_images(cls, count: int) -> JudgeTraining:
        """The budget for ``count`` images: ten times over all of them, within bounds."""
        epochs = 10 * count // cls.batch_size
        return cls(updates=min(cls.updates, max(400, epochs)), autoencoder_updates=min(800, max(200, epochs // 3)))


class JudgeNet(nn.Module):
    """Pairs of 3x3 convolutions with BatchNorm and ReLU, max pooling, a global average, F features, the outputs."""

    def __init__(self, config: JudgeNetConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.image_shape[0]
        for channels in config.channels:
            for _ in range(2):
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Sequential(nn.Linear(before, config.num_features), nn.ReLU())
        self.head = nn.Linear(config.num_features, config.num_outputs)

    def features(self, x: Tensor) -> Tensor:
        """The (B, F) activations before the last layer: the space of implausibility and Frechet distances."""
        return self.project(self.trunk(x.contiguous(memory_format=torch.channels_last)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, outputs) of images in [0, 1]."""
        return self.head(self.features(x))


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
    """All judges of one data set, in evaluation mode.

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
        """Sha256 over all weights and names: a judged row is reused only under the same judges."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.attributes]).encode())
        for net in self._nets():
            for name, tensor in sorted(net.state_dict().items()):
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _nets(self) -> list[nn.Module]:
        return [self.oracle, self.autoencoders, *([self.attribute_net] if self.attribute_net is not None else [])]

    def eval(self) -> Judges:
        """Set every net to evaluation mode, and return self."""
        for net in self._nets():
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
    large = max(image_shape[1:]) > 32
    channels = (16, 32, 64, 96) if large else JudgeNetConfig.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        oracle = JudgeNet(JudgeNetConfig(image_shape, len(class_names), channels))
        shape = AutoEncoderConfig(image_shape, code_dim=64 if large else AutoEncoderConfig.code_dim)
        autoencoders = nn.ModuleList(AutoEncoder(shape) for _ in range(len(class_names) + 1))
        attribute_net = JudgeNet(JudgeNetConfig(image_shape, len(attributes), channels)) if attributes else None
    return Judges(tuple(class_names), oracle, autoencoders, tuple(attributes), attribute_net).eval()


def train_judges(
    judges: Judges,
    images: np.ndarray,
    labels: np.ndarray,
    config: JudgeTraining | None = None,
    *,
    attributes: np.ndarray | None = None,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    held_out_attributes: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
    """Train every judge in place and yield metrics about ten times a net: {net, update, updates, loss, ...}.

    Args:
        judges: from ``build_judges``.
        images: (N, C, H, W) uint8, the judges' half of the training images.
        labels: (N,) class indices, negative where unknown: such images serve the attribute net alone.
        config: budgets; ``JudgeTraining.for_images`` when None.
        attributes: (N, A) of 0, 1, and negative where unknown; needed when the judges have an attribute net.
        held_out: images and labels, whose accuracy closes the oracle's training and goes into the card.
        held_out_attributes: those of the same images; the accuracy on each of them goes into the card.

    Raises:
        ValueError: when a class has no image, or when shapes do not fit.
    """
    config = config or JudgeTraining.for_images(len(images))
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
    targets = torch.from_numpy(labels)
    yield from _fit("oracle", judges.oracle, images, known, config.updates, config, _class_loss(targets), augment=True)
    if held_out is not None:
        accuracy = float((predict_probs(judges.oracle, held_out[0]).argmax(1) == held_out[1]).mean())
        judges.card["oracle_accuracy"] = accuracy
        yield {"net": "oracle", "update": config.updates, "updates": config.updates, "held_out_accuracy": accuracy}
    for k, net in enumerate(judges.autoencoders):
        name = f"autoencoder {judges.class_names[k] if k < len(judges.class_names) else 'all'}"
        rows = np.flatnonzero(labels == k) if k < len(judges.class_names) else known
        yield from _fit(name, net, images, rows, config.autoencoder_updates, config, _reconstruction_loss)
    if judges.attribute_net is not None and attributes is not None:
        loss = _attribute_loss(torch.from_numpy(np.asarray(attributes, dtype=np.float32)))
        rows = np.arange(len(images))
        yield from _fit("attributes", judges.attribute_net, images, rows, config.updates, config, loss, augment=True)
        if held_out is not None and held_out_attributes is not None:
            probs = predict_probs(judges.attribute_net, held_out[0], sigmoid=True)
            found = attribute_accuracies(judges.attributes, probs, held_out_attributes)
            judges.card["attribute_accuracy"] = found
            accuracies = [accuracy["accuracy"] for accuracy in found.values()]
            closing = {"net": "attributes", "update": config.updates, "updates": config.updates}
            yield {**closing, "held_out_accuracy": float(np.mean(accuracies))}
    judges.card |= {
        "training": asdict(config),
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


def _class_loss(targets: Tensor) -> Any:
    return lambda net, x, rows: F.cross_entropy(net(x).float(), targets[rows])


def _reconstruction_loss(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    return F.mse_loss(net(x).float(), x)


def _attribute_loss(targets: Tensor) -> Any:
    def loss(net: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        wanted = targets[rows]
        return F.binary_cross_entropy_with_logits(net(x).float(), wanted.clamp(min=0), weight=(wanted >= 0).float())

    return loss


def _fit(
    name: str,
    net: nn.Module,
    images: np.ndarray,
    rows: np.ndarray,
    updates: int,
    config: JudgeTraining,
    loss_of: Any,
    *,
    augment: bool = False,
) -> Iterator[dict[str, Any]]:
    """Adam under a one-cycle schedule over ``rows`` in random order; a net's draws depend on its name alone."""
    generator = torch.Generator().manual_seed(
        config.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    )
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=updates + 1)
    pixels, order = torch.from_numpy(images), torch.empty(0, dtype=torch.int64)
    total, since, report = 0.0, 0, max(1, updates // 10)
    if isinstance(net, JudgeNet):  # half as fast again; the autoencoders lose by it
        net.to(memory_format=torch.channels_last)
    net.train()
    for update in range(1, updates + 1):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]])
        batch, order = order[: config.batch_size], order[config.batch_size :]
        x = pixels[batch].float() / 255
        if augment:
            x = _augment(x, config, generator)
        optimiser.zero_grad(set_to_none=True)
        with mixed_precision(config.precision, x.device):
            loss = loss_of(net, x, batch)
        loss.backward()
        optimiser.step()
        cycle.step()
        total, since = total + float(loss.detach()), since + 1
        if update % report == 0 or update == updates:
            yield {"net": name, "update": update, "updates": updates, "loss": total / since}
            total, since = 0.0, 0
    net.eval()


def _augment(x: Tensor, config: JudgeTraining, generator: torch.Generator) -> Tensor:
    """Each image shifted, turned and scaled on its own, its border continued outwards."""
    shift, turn, scale = (
        (torch.rand(len(x), 2, generator=generator) * 2 - 1) * size
        for size in (2 * config.shift, config.turn, config.scale)
    )
    cosine, sine, size = turn[:, 0].cos(), turn[:, 0].sin(), 1 + scale[:, 0]
    aspect = x.shape[2] / x.shape[3]
    theta = torch.stack(
        [
            torch.stack([cosine * size, -sine * size * aspect, shift[:, 0]], dim=1),
            torch.stack([sine * size / aspect, cosine * size, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def predict_probs(net: JudgeNet, images: np.ndarray, *, sigmoid: bool = False, batch_size: int = 512) -> np.ndarray:
    """Class probabilities (B, K) float32 of images (uint8 or float in [0, 1]); ``sigmoid`` for attributes (B, A)."""
    squash = torch.sigmoid if sigmoid else lambda logits: torch.softmax(logits, dim=1)
    return _in_batches(lambda x: squash(net(x)), images, batch_size)


def predict_features(net: JudgeNet, images: np.ndarray, *, batch_size: int = 512) -> np.ndarray:
    """Features (B, F) float32, see ``JudgeNet.features``."""
    return _in_batches(net.features, images, batch_size)


def probs_of_features(net: JudgeNet, features: np.ndarray) -> np.ndarray:
    """Class probabilities (B, K) from what ``predict_features`` gave, without a second look at the images."""
    with torch.inference_mode():
        return torch.softmax(net.head(torch.from_numpy(features)), dim=1).numpy()


def reconstruct(autoencoders: nn.ModuleList, which: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Each image (B, C, H, W) rebuilt by the autoencoder that ``which`` (B,) names by its index; float32 in [0, 1]."""
    out = np.empty(images.shape, dtype=np.float32)
    for k in np.unique(which):
        rows = np.flatnonzero(which == k)
        out[rows] = _in_batches(autoencoders[int(k)], images[rows], 1024)
    return out


def _in_batches(function: Any, images: np.ndarray, batch_size: int) -> np.ndarray:
    with torch.inference_mode():
        parts = [
            function(_to_float(images[start : start + batch_size])).float().numpy()
            for start in range(0, max(1, len(images)), batch_size)
        ]
    return np.concatenate(parts)


def _to_float(images: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(images))
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()


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
    place = storage.join(uri, JUDGES_JSON)
    if not storage.exists(place):
        raise ValueError(f"no judges at {storage.display(uri)}: expected {JUDGES_JSON} there")
    content = storage.read_json(place)
    if content.get("format") != FORMAT:
        raise ValueError(f"judges at {storage.display(uri)} have format {content.get('format')}, expected {FORMAT}")

    def tensors(name: str) -> dict[str, Tensor]:
        data = storage.read_bytes(storage.join(uri, f"{name}.safetensors"))
        if hashlib.sha256(data).hexdigest() != content["sha256"].get(name):
            raise ValueError(f"{name}.safetensors at {storage.display(uri)} is not the file that was saved there")
        return load_tensors(data)

    oracle = JudgeNet(_net_config(content["oracle"]))
    shape = content["autoencoder"]
    code = AutoEncoderConfig(tuple(shape["image_shape"]), tuple(shape["channels"]), shape["code_dim"])
    autoencoders = nn.ModuleList(AutoEncoder(code) for _ in range(len(content["class_names"]) + 1))
    oracle.load_state_dict(tensors("oracle"))
    autoencoders.load_state_dict(tensors("autoencoders"))
    attributes, attribute_net = tuple(content["attributes"]), None
    if attributes:
        attribute_net = JudgeNet(_net_config(content["oracle"] | {"num_outputs": len(attributes)}))
        attribute_net.load_state_dict(tensors("attribute_net"))
    return Judges(
        tuple(content["class_names"]), oracle, autoencoders, attributes, attribute_net, content["card"]
    ).eval()


def _net_config(content: dict[str, Any]) -> JudgeNetConfig:
    return JudgeNetConfig(
        tuple(content["image_shape"]), content["num_outputs"], tuple(content["channels"]), content["num_features"]
    )


def _check_image_shape(image_shape: tuple[int, int, int]) -> None:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"an image shape is (channels, height, width), got {image_shape}")
