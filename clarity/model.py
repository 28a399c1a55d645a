"""The model directory: what is trained once and loaded everywhere.

Alone knows its file names: ``model.json``, written last, and safetensors files with their checksums in it. Loading
executes nothing, builds nothing before the shapes are known to agree, and says what is wrong when it cannot.
"""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import clarity
from clarity import storage
from clarity.attributes import AttributeHeads
from clarity.classifiers import EnsembleConfig, ImageEnsemble, LatentEnsemble
from clarity.images import Preprocessing
from clarity.judges import JudgeConfig, JudgeNet
from clarity.report.text import counted
from clarity.vae import VAE, Decoder, VAEConfig

MODEL_FILE = "model.json"
#: Weight files, by the field of Model whose network each holds.
FILES = {name: f"{name}.safetensors" for name in ("vae", "ensemble", "image_ensemble", "folds", "judge", "sharp")}
FILES["heads"] = "attributes.safetensors"
FORMAT = 1
REMEDY = "copy the model directory again, or train it again"


@dataclass(repr=False)
class Model:
    """Everything that an explanation needs, in eval mode."""

    vae: VAE  # images to codes and back
    ensemble: LatentEnsemble  # classifies codes
    class_names: tuple[str, ...]  # K names, in the order of the logits
    preprocessing: Preprocessing  # from an image file to the VAE's pixels
    image_ensemble: ImageEnsemble | None = None  # classifies images; only the image-space methods need it
    #: ensembles on parts of the training split; fold f has not seen the images with ``fold_of(id, F) == f``
    folds: tuple[LatentEnsemble, ...] = ()
    judge: JudgeNet | None = None  # held-out image classifier, which tells what class counterfactual images show
    #: a second decoder, which draws every picture that is written; None where the VAE's own does
    sharp: Decoder | None = None
    #: attributes of images as linear heads on codes; the search can keep them as they are
    heads: AttributeHeads | None = None
    #: what model.json says: data, training, metrics, versions, checksums
    card: dict[str, Any] = field(default_factory=dict)
    #: changes with anything that determines Clarity's results (not with image_ensemble, folds, judge, heads)
    fingerprint: str = ""

    def __repr__(self) -> str:
        names = ", ".join(self.class_names[:12]) + (", ..." if self.num_classes > 12 else "")
        shape = " x ".join(map(str, self.image_shape))
        extras = [f"{len(self.folds)} folds"] if self.folds else []
        if self.image_ensemble is not None:
            extras.append(f"image ensemble of {self.image_ensemble.config.num_members}")
        accuracy = self.card.get("metrics", {}).get("ensemble", {}).get("accuracy")
        if accuracy is not None:
            extras.append(f"held-out accuracy {accuracy:.1%}")
        sharp = "" if self.sharp is None else ", sharp decoder"
        lines = [
            f"Clarity model {self.fingerprint[:12] or '(not saved)'} on {self.device}",
            f"  images    {shape}, {self.num_classes} classes: {names}",
            f"  VAE       {self.vae.config.architecture}, {self.latent_dim} latent dimensions{sharp}",
            f"  ensemble  {', '.join([counted(self.ensemble.config.num_members, 'members'), *extras])}",
        ]
        return "\n".join(lines)

    def to(self, device: str | torch.device) -> "Model":
        """Move the model's own networks to a device; returns the model."""
        for network in self.networks().values():
            network.to(device)
        return self

    @property
    def decoder(self) -> VAE | Decoder:
        """What draws the pictures that are written and judged."""
        return self.vae if self.sharp is None else self.sharp

    def networks(self) -> dict[str, nn.Module]:
        """The networks that there are, by field."""
        fields = vars(self) | {"folds": nn.ModuleList(self.folds) if self.folds else None}
        return {name: fields[name] for name in FILES if fields[name] is not None}

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


def save_model(model: Model, uri: storage.URI, *, card: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a model directory and return its card; ``model.json`` comes last, so that a directory with one is complete.

    ``card`` holds further entries such as data, training and metrics; by default those of the model's card.
    """
    files = {}
    for name, network in model.networks().items():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
        content = safetensors.torch.save(tensors)
        storage.write_bytes(storage.join(uri, FILES[name]), content)
        files[FILES[name]] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    head: dict[str, Any] = {
        "format": FORMAT,
        "vae": model.vae.config.to_json(),
        "ensemble": asdict(model.ensemble.config),
        "image_ensemble": None if model.image_ensemble is None else asdict(model.image_ensemble.config),
        "folds": len(model.folds),
        "judge": None if model.judge is None else asdict(model.judge.config),
        "attributes": [] if model.heads is None else list(model.heads.names),
        "attribute_directions": 0 if model.heads is None else model.heads.num_directions,
        "class_names": list(model.class_names),
        "preprocessing": model.preprocessing.to_json(),
        "files": files,
    }
    head["fingerprint"] = fingerprint_of(head)
    rest = {name: value for name, value in (model.card if card is None else card).items() if name not in head}
    versions = {"clarity": clarity.__version__, "torch": torch.__version__, "python": platform.python_version()}
    model.card, model.fingerprint = {**head, **rest, "versions": versions}, head["fingerprint"]
    storage.write_json(storage.join(uri, MODEL_FILE), model.card)
    return model.card


def fingerprint_of(card: Mapping[str, Any]) -> str:
    """Digest of what determines Clarity's results."""
    parts = {name: card[name] for name in ("format", "vae", "ensemble", "class_names", "preprocessing")}
    files = card["files"]
    parts["sums"] = [files[name]["sha256"] for name in map(FILES.get, ("vae", "ensemble", "sharp")) if name in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_model(uri: storage.URI, device: str | torch.device = "cpu") -> Model:
    """Load a model directory (``clarity.load``); ValueError says which file, what was expected, and what to do."""
    path = f"{storage.display(uri)}/{MODEL_FILE}"
    if (card := read_card(uri)) is None:
        refuse_other(uri)
        raise ValueError(
            f"no model at {storage.display(uri)}: it has no {MODEL_FILE}, which training writes last; "
            "finish the training there, or name another directory"
        )

    def entry(name: str, parse: Callable[[Any], Any]) -> Any:
        if name not in card:
            raise ValueError(f"{path} lacks {name!r}; {REMEDY}")
        try:
            return parse(card[name])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {name} is not usable: {error}; {REMEDY}") from None

    class_names = entry("class_names", parse_names)
    vae_config = entry("vae", lambda fields: VAEConfig(**fields))
    config = entry("ensemble", lambda fields: EnsembleConfig(**fields))
    preprocessing = entry("preprocessing", Preprocessing.from_json)
    image_config = entry("image_ensemble", lambda fields: fields and EnsembleConfig(**fields))
    num_folds = entry("folds", parse_count)
    # Models of earlier versions have no such entries.
    attributes = entry("attributes", parse_names) if "attributes" in card else ()
    directions = entry("attribute_directions", parse_count) if "attribute_directions" in card else 1
    judge_config = entry("judge", lambda fields: fields and JudgeConfig(**fields)) if "judge" in card else None
    checksums = entry("files", parse_files)
    shape, classes = vae_config.image_shape, len(class_names)
    agree: list[tuple[Any, Any, str]] = [
        (preprocessing.image_shape, shape, "preprocessing makes images of shape {}, the VAE takes {}"),
        (classes, config.num_classes, "class_names has {} classes, ensemble has {}"),
        (vae_config.latent_dim, config.latent_dim, "latent_dim of the VAE is {}, of the ensemble {}"),
    ]
    build: dict[str, Callable[[], nn.Module]] = {
        "vae": lambda: VAE(vae_config),
        "ensemble": lambda: LatentEnsemble(config),
    }
    if image_config:
        agree.append((classes, image_config.num_classes, "class_names has {} classes, image_ensemble has {}"))
        build["image_ensemble"] = lambda: ImageEnsemble(image_config, vae_config)
    if judge_config:
        judged = judge_config.image_shape, judge_config.num_outputs
        agree.append((judged, (shape, classes), "the judge is for images and classes {}, the model for {}"))
        build["judge"] = lambda: JudgeNet(judge_config)
    if FILES["sharp"] in checksums:
        build["sharp"] = lambda: Decoder(vae_config)
    if attributes:
        build["heads"] = lambda: AttributeHeads(attributes, vae_config.latent_dim, directions)
    if num_folds:
        build["folds"] = lambda: nn.ModuleList(LatentEnsemble(config) for _ in range(num_folds))
    for found, expected, text in agree:
        if found != expected:
            raise ValueError(f"{path}: {text.format(found, expected)}; {REMEDY}")
    networks: dict[str, Any] = {name: load_network(uri, FILES[name], checksums, make) for name, make in build.items()}
    model = Model(
        class_names=class_names,
        preprocessing=preprocessing,
        card=card,
        fingerprint=fingerprint_of(card),
        **networks | {"folds": tuple(networks.get("folds", ()))},
    )
    return model.to(device)


def load_network(
    uri: storage.URI, name: str, checksums: Mapping[str, str], build: Callable[[], nn.Module]
) -> nn.Module:
    """One network of a model directory, its file checked before anything is built."""
    path = storage.display(storage.join(uri, name))
    if name not in checksums:
        raise ValueError(f"{storage.display(uri)}/{MODEL_FILE} names no {name}; {REMEDY}")
    if not storage.exists(storage.join(uri, name)):
        raise ValueError(f"{path} is missing; {REMEDY}")
    content = storage.read_bytes(storage.join(uri, name))
    found = hashlib.sha256(content).hexdigest()
    if found != checksums[name]:
        raise ValueError(f"{path} has changed: its sha256 is {found}, {MODEL_FILE} says {checksums[name]}; {REMEDY}")
    tensors = parse_tensors(content, path)
    with torch.device("meta"):
        network = build()
    expected = network.state_dict()
    if tensors.keys() != expected.keys():
        names = ", ".join(sorted(tensors.keys() ^ expected.keys())[:5])
        raise ValueError(f"{path} does not hold the tensors that {MODEL_FILE} describes: {names}; {REMEDY}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            raise ValueError(
                f"{path}: by {MODEL_FILE}, {key} is {expected[key].dtype} of shape {tuple(expected[key].shape)}; "
                f"found {tensor.dtype} of shape {tuple(tensor.shape)}; {REMEDY}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds a NaN or an infinity; train the model again")
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()


def read_card(uri: storage.URI) -> dict[str, Any] | None:
    """What model.json says, None where there is no complete model; ValueError for one of another format."""
    file = storage.join(uri, MODEL_FILE)
    if not storage.exists(file):
        return None
    card = storage.read_json(file)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise ValueError(
            f"{storage.display(file)}: expected a model of format {FORMAT}, found {found!r}; "
            "train it again with this version of clarity"
        )
    return card


def refuse_other(uri: storage.URI) -> None:
    """Raises ValueError where something else than a model is there: says what it is, and what would do."""
    path, name, inner = storage.display(uri), storage.name(uri), storage.join(uri, "model")
    if storage.exists(storage.join(inner, MODEL_FILE)):
        audit = storage.exists(storage.join(uri, "plan.json"))
        found = f"{'an audit' if audit else 'a directory that holds one'}: name {storage.display(inner)}"
    elif not storage.exists(uri) or storage.is_dir(uri):
        return
    elif re.search(r"(?i)\.(pt|pth|ckpt|pkl|pickle|bin|h5|keras|onnx)$", name):
        found = (
            "a network of your own: train a model of this data with jobs/train.py, and give your network's decisions "
            "as predictions, or itself as the predictor"
        )
    else:
        found = "a file: name the directory that training wrote"
    raise ValueError(f"model: expected a model directory, got {path}, {found}")


def parse_names(value: Any) -> tuple[str, ...]:
    """Names of a card: of its classes, or its attributes."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"expected a list of names, found {value!r}")
    if len(set(value)) != len(value):
        raise ValueError("a name stands there twice")
    return tuple(value)


def parse_count(value: Any) -> int:
    """A number of folds, or of directions, of a card."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1000:
        raise ValueError(f"expected a count from 0 to 1000, found {value!r}")
    return value


def parse_files(value: Any) -> dict[str, str]:
    """Checksums of a card's files; only known names, so that a path that leads elsewhere is never opened."""
    for name in value:
        if name not in FILES.values():
            raise ValueError(f"{name!r} is none of the files of a model ({', '.join(FILES.values())})")
    return {name: entry["sha256"] for name, entry in value.items()}


def save_tensors(uri: storage.URI, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically as one safetensors file: the form of training checkpoints."""
    storage.write_bytes(uri, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def load_tensors(uri: storage.URI) -> dict[str, Tensor]:
    """Read a safetensors file, of which nothing is executed; ValueError where it is none."""
    return parse_tensors(storage.read_bytes(uri), storage.display(uri))


def parse_tensors(content: bytes, path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError for anything else, such as a pickle, which would run code."""
    if content[:2] == b"PK" or (content[:1] == b"\x80" and content[8:9] != b"{"):
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened; clarity opens safetensors only: "
            "export the weights with safetensors.torch.save_file, or train the model again"
        )
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # the library's own error type is not public
        raise ValueError(f"{path} is no readable safetensors file ({error}); {REMEDY}") from None
