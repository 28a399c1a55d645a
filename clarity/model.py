"""The model directory: what is trained once and loaded everywhere.

Alone knows its file names: ``model.json``, written last, and safetensors files whose sums it holds. Loading executes
nothing, builds nothing before the shapes are known to agree, and says what is wrong when it cannot. Does not know how a
model is trained.

Shapes: C, H, W image; D latent; K classes; M members.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

import clarity
from clarity import storage
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.images import Preprocessing
from clarity.vae import VAE, VAEConfig

MODEL_FILE = "model.json"
VAE_FILE = "vae.safetensors"
ENSEMBLE_FILE = "ensemble.safetensors"
IMAGE_ENSEMBLE_FILE = "image_ensemble.safetensors"
FOLDS_FILE = "folds.safetensors"
WEIGHT_FILES = (VAE_FILE, ENSEMBLE_FILE, IMAGE_ENSEMBLE_FILE, FOLDS_FILE)
FORMAT = 1


@dataclass
class Model:
    """Everything that an explanation needs, in eval mode.

    Args:
        vae: images to codes and back.
        ensemble: classifies codes.
        class_names: K names, in the order of the logits.
        preprocessing: from an image file to the VAE's pixels.
        image_ensemble: classifies images; only the image-space methods need it.
        folds: ensembles on parts of the training split; fold f has not seen the images with ``fold_of(id, F) == f``.
        card: what model.json says: data, training, metrics, versions, sums.
        fingerprint: changes when anything that determines Clarity's results does (not with image_ensemble or folds).
    """

    vae: VAE
    ensemble: LatentEnsemble
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    image_ensemble: ImageEnsemble | None = None
    folds: tuple[LatentEnsemble, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def to(self, device: str | torch.device) -> Model:
        """The model, itself, moved to a device."""
        for network in (self.vae, self.ensemble, self.image_ensemble, *self.folds):
            if network is not None:
                network.to(device)
        return self

    @property
    def latent_dim(self) -> int:
        """D."""
        return self.vae.config.latent_dim

    @property
    def num_classes(self) -> int:
        """K."""
        return self.ensemble.config.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.vae.config.image_shape

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vae.mean.weight.device


# ---- writing -------------------------------------------------------------------------------------------------------


def save_model(model: Model, uri: storage.URI, *, card: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a model directory, ``model.json`` last, so that a directory with one is whole.

    Args:
        model: what to write.
        uri: local directory or s3://.
        card: what else model.json says, such as data, training and metrics; by default what the model's card says.

    Returns:
        The card as written.
    """
    weights = {VAE_FILE: _state(model.vae), ENSEMBLE_FILE: _state(model.ensemble)}
    if model.image_ensemble is not None:
        weights[IMAGE_ENSEMBLE_FILE] = _state(model.image_ensemble)
    if model.folds:
        weights[FOLDS_FILE] = {
            f"{fold}.{name}": tensor for fold, part in enumerate(model.folds) for name, tensor in _state(part).items()
        }
    files = {}
    for name, tensors in weights.items():
        data = safetensors.torch.save(tensors)
        storage.write_bytes(storage.join(uri, name), data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    head: dict[str, Any] = {
        "format": FORMAT,
        "vae": asdict(model.vae.config),
        "ensemble": asdict(model.ensemble.config),
        "image_ensemble": None if model.image_ensemble is None else asdict(model.image_ensemble.config),
        "folds": len(model.folds),
        "class_names": list(model.class_names),
        "preprocessing": model.preprocessing.to_json(),
        "files": files,
    }
    head["fingerprint"] = _fingerprint(head)
    rest = {name: value for name, value in (model.card if card is None else card).items() if name not in head}
    written = {**head, **rest, "versions": _versions()}
    storage.write_json(storage.join(uri, MODEL_FILE), written)
    model.card = written
    model.fingerprint = head["fingerprint"]
    return written


def save_tensors(uri: storage.URI, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, whole or not at all: the form of training checkpoints."""
    storage.write_bytes(uri, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def load_tensors(uri: storage.URI) -> dict[str, Tensor]:
    """Read a safetensors file; nothing in it is executed.

    Raises:
        ValueError: it is something else, or broken.
    """
    return _parse(storage.read_bytes(uri), storage.display(uri))


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _fingerprint(head: Mapping[str, Any]) -> str:
    parts = {name: head[name] for name in ("format", "vae", "ensemble", "class_names", "preprocessing")}
    parts["sums"] = [head["files"][name]["sha256"] for name in (VAE_FILE, ENSEMBLE_FILE)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {"clarity": clarity.__version__, "torch": torch.__version__, "python": platform.python_version()}


# ---- reading -------------------------------------------------------------------------------------------------------


def load_model(uri: storage.URI, device: str | torch.device = "cpu") -> Model:
    """Load a model directory (``clarity.load``).

    Raises:
        ValueError: there is none, or it is not whole: says which file, what was expected, what was found, what to do.
    """
    place = storage.display(uri)
    card = _read_card(uri)
    class_names = _take(card, "class_names", place, _names)
    vae_config = _take(card, "vae", place, lambda fields: VAEConfig(**fields))
    config = _take(card, "ensemble", place, lambda fields: EnsembleConfig(**fields))
    preprocessing = _take(card, "preprocessing", place, Preprocessing.from_json)
    image_config = _take(card, "image_ensemble", place, lambda fields: fields and EnsembleConfig(**fields))
    num_folds = _take(card, "folds", place, _count)
    files = _take(card, "files", place, _files)
    if preprocessing.image_shape != vae_config.image_shape:
        raise ValueError(
            f"{place}/{MODEL_FILE}: preprocessing makes images of shape {preprocessing.image_shape}, "
            f"the VAE takes {vae_config.image_shape}; {_REMEDY}"
        )
    for name, ensemble_config in (("ensemble", config), ("image_ensemble", image_config)):
        if ensemble_config and ensemble_config.num_classes != len(class_names):
            raise ValueError(
                f"{place}/{MODEL_FILE}: class_names has {len(class_names)} classes, "
                f"{name} has {ensemble_config.num_classes}; {_REMEDY}"
            )
    if config.latent_dim != vae_config.latent_dim:
        raise ValueError(
            f"{place}/{MODEL_FILE}: latent_dim of the VAE is {vae_config.latent_dim}, "
            f"of the ensemble {config.latent_dim}; {_REMEDY}"
        )
    model = Model(
        vae=_load(uri, VAE_FILE, files, lambda: VAE(vae_config)),
        ensemble=_load(uri, ENSEMBLE_FILE, files, lambda: LatentEnsemble(config)),
        class_names=class_names,
        preprocessing=preprocessing,
        image_ensemble=_load(uri, IMAGE_ENSEMBLE_FILE, files, lambda: ImageEnsemble(image_config, vae_config))
        if image_config
        else None,
        folds=tuple(_load(uri, FOLDS_FILE, files, lambda: _Folds(config, num_folds))) if num_folds else (),
        card=card,
        fingerprint=_fingerprint(card),
    )
    return model.to(device)


def read_card(uri: storage.URI) -> dict[str, Any] | None:
    """What model.json says, or None where no finished model is."""
    return _read_card(uri) if storage.exists(storage.join(uri, MODEL_FILE)) else None


_REMEDY = "copy the model directory again, or train it again"
T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)


def _read_card(uri: storage.URI) -> dict[str, Any]:
    file = storage.join(uri, MODEL_FILE)
    if not storage.exists(file):
        raise ValueError(
            f"no model at {storage.display(uri)}: it has no {MODEL_FILE}, which training writes last; "
            "finish the training there with jobs/train.py, or name another directory"
        )
    card = storage.read_json(file)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise ValueError(
            f"{storage.display(file)}: expected a model of format {FORMAT}, found {found!r}; "
            "train it again with this version of clarity"
        )
    return card


def _take(card: dict[str, Any], name: str, place: str, parse: Callable[[Any], Any]) -> Any:
    if name not in card:
        raise ValueError(f"{place}/{MODEL_FILE} lacks {name!r}; {_REMEDY}")
    try:
        return parse(card[name])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{place}/{MODEL_FILE}: {name} is not usable: {error}; {_REMEDY}") from None


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected a list of names, found {value!r}")
    if len(set(value)) != len(value):
        raise ValueError("a name stands there twice")
    return tuple(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1000:
        raise ValueError(f"expected a count from 0 to 1000, found {value!r}")
    return value


def _files(value: Any) -> dict[str, str]:
    for name, entry in value.items():
        # The names are known, so a path that leads elsewhere is never opened.
        if name not in WEIGHT_FILES:
            raise ValueError(f"{name!r} is none of the files of a model ({', '.join(WEIGHT_FILES)})")
        if not isinstance(entry["sha256"], str):
            raise ValueError(f"the sum of {name} is no text")
    return {name: entry["sha256"] for name, entry in value.items()}


class _Folds(nn.ModuleList):
    """The ensembles of all folds, as one file holds them."""

    def __init__(self, config: EnsembleConfig, num_folds: int) -> None:
        super().__init__(LatentEnsemble(config) for _ in range(num_folds))

    def __iter__(self) -> Iterator[LatentEnsemble]:
        return super().__iter__()  # type: ignore[return-value]


def _load(uri: storage.URI, name: str, files: Mapping[str, str], build: Callable[[], N]) -> N:
    file = storage.join(uri, name)
    place = storage.display(file)
    if name not in files:
        raise ValueError(f"{storage.display(uri)}/{MODEL_FILE} names no {name}; {_REMEDY}")
    if not storage.exists(file):
        raise ValueError(f"{place} is missing; {_REMEDY}")
    data = storage.read_bytes(file)
    _refuse_pickle(data, place)
    found = hashlib.sha256(data).hexdigest()
    if found != files[name]:
        raise ValueError(f"{place} has changed: its sha256 is {found}, {MODEL_FILE} says {files[name]}; {_REMEDY}")
    tensors = _parse(data, place)
    with torch.device("meta"):
        network = build()
    expected = network.state_dict()
    if tensors.keys() != expected.keys():
        names = ", ".join(sorted(tensors.keys() ^ expected.keys())[:5])
        raise ValueError(f"{place} does not hold the tensors that {MODEL_FILE} describes: {names}; {_REMEDY}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            raise ValueError(
                f"{place}: by {MODEL_FILE}, {key} is {expected[key].dtype} of shape {tuple(expected[key].shape)}; "
                f"found {tensor.dtype} of shape {tuple(tensor.shape)}; {_REMEDY}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{place}: {key} holds a NaN or an infinity; train the model again")
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()


def _refuse_pickle(data: bytes, place: str) -> None:
    if data[:2] == b"PK" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise ValueError(
            f"{place} is a pickle, which can run any code when it is opened; clarity opens safetensors only: "
            "export the weights with safetensors.torch.save_file, or train the model again"
        )


def _parse(data: bytes, place: str) -> dict[str, Tensor]:
    _refuse_pickle(data, place)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the library's own error type says little and is not public
        raise ValueError(f"{place} is no readable safetensors file ({error}); {_REMEDY}") from None
