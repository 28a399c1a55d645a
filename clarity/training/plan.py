"""What a training is to make, from which images, and the directory that it resumes in."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from clarity import storage
from clarity.classifiers import EnsembleConfig
from clarity.data import Dataset, class_names_of, infer_preprocessing, list_images, listing_fingerprint, require_outside
from clarity.data.review import review
from clarity.images import Preprocessing
from clarity.model import read_card
from clarity.predictor import load_predictor
from clarity.report.text import plural
from clarity.training.attributes import choose_attributes
from clarity.training.distil import COPIES, open_audit
from clarity.training.judge import JudgeTraining
from clarity.training.loops import IMAGE_TRAINING, EnsembleTraining, VAETraining, mixed_precision, num_epochs
from clarity.training.sharp import SHARP_TRAINING
from clarity.vae import VAEConfig, vae_config

#: The defaults of each training, by the prefix of its fields.
TRAININGS: dict[str, VAETraining | EnsembleTraining] = {
    "vae": VAETraining(),
    "ensemble": EnsembleTraining(),
    "image": IMAGE_TRAINING,
}
#: Where values come from that are not given.
RECIPES = ("auto", "paper")
#: Pixels in an update of the VAE at most, 128 images of 1,024 x 1,024: more would take above 50 GB.
MAX_UPDATE_PIXELS = 1 << 27
#: What draws the pictures that are written: the VAE's own decoder, or a sharper one on the same codes.
DECODERS = ("plain", "sharp")
#: Fields of a plan that are given as they are.
OPTIONS = ("attributes", "decoder", "image_members", "judge_updates", "num_folds", "precision")
#: Fields of a plan's description that may change between runs: what they add is trained, the rest is kept.
EXTRAS = {"image_members", "image_training", "num_folds", "judge_updates", "attributes", "sharp_training"}

#: Fields of a plan's description that say whom the ensembles learn from; absent where they learn from labels.
TEACHERS = ("predictor", "refit")


@dataclass(frozen=True)
class TrainingPlan:
    """What to train, on which images, and where to write it: all that a worker needs to do its share.

    ``vae`` and ``ensemble`` are the networks, ``..._training`` how they are trained; ``image_members``,
    ``num_folds`` and ``judge_updates`` may be 0, and None updates of the judge follow from the number of images.
    ``data`` describes the images for model.json; its fingerprint identifies the data set. ``searched`` names the values
    that ``training.recipe`` has still to choose, ``recipe`` is what it chose and why. ``precision``, like the device,
    may be another when a training is resumed. ``predictor`` is asked for the ensemble's targets, see ``distil``;
    ``refit`` is an audit to learn from as well; ``teachers`` holds the digests of both.
    """

    out: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    vae: VAEConfig
    ensemble: EnsembleConfig
    dataset: Dataset
    held_out: Dataset | None = None
    vae_training: VAETraining = field(default_factory=VAETraining)
    ensemble_training: EnsembleTraining = field(default_factory=EnsembleTraining)
    image_training: EnsembleTraining = IMAGE_TRAINING
    image_members: int = 0
    num_folds: int = 0
    judge_updates: int | None = None
    attributes: tuple[str, ...] = ()
    decoder: str = "plain"
    sharp_training: VAETraining = SHARP_TRAINING
    data: dict[str, Any] = field(default_factory=dict)
    searched: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    predictor: Any = None
    refit: str | None = None
    teachers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mixed_precision(self.precision, torch.device("cpu"))
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {self.decoder!r}")
        if self.image_members < 0:
            raise ValueError(f"image_members: expected at least 0, got {self.image_members}")
        if self.num_folds < 0 or self.num_folds == 1:
            raise ValueError(f"num_folds: expected 0 or at least 2, got {self.num_folds}")
        if self.judge_updates is not None and self.judge_updates < 0:
            raise ValueError(f"judge_updates: expected at least 0, got {self.judge_updates}")
        height, width = self.vae.image_shape[1:]
        if (pixels := self.vae_training.batch_size * height * width) > MAX_UPDATE_PIXELS:
            raise ValueError(
                f"image_size: expected at most {MAX_UPDATE_PIXELS} pixels in an update of the VAE, got {pixels} in "
                f"{self.vae_training.batch_size} images of {height} x {width}: choose a smaller size"
            )

    @property
    def image_ensemble(self) -> EnsembleConfig:
        """Config of the image ensemble."""
        return replace(self.ensemble, num_members=self.image_members)

    @property
    def judge_training(self) -> JudgeTraining | None:
        """How the judge is trained; None for no judge."""
        if self.judge_updates == 0:
            return None
        suggested = JudgeTraining.for_images(self.data.get("labelled", 0) // 2)
        return replace(suggested, updates=self.judge_updates or suggested.updates, precision=self.precision)

    def describe(self) -> dict[str, Any]:
        """What determines the result, as JSON: equal descriptions make equal models."""

        def resolved(training: VAETraining | EnsembleTraining, count: str) -> dict[str, Any]:
            fields = {**asdict(training), "epochs": num_epochs(training, self.data[count])}
            return {name: value for name, value in fields.items() if name != "min_updates"}

        description = {
            "data": self.data.get("fingerprint"),
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.to_json(),
            "vae": self.vae.to_json(),
            "vae_training": resolved(self.vae_training, "images"),
            "ensemble": asdict(self.ensemble),
            "ensemble_training": resolved(self.ensemble_training, "labelled" if self.predictor is None else "codes"),
            "image_members": self.image_members,
            "image_training": resolved(self.image_training, "labelled") if self.image_members else None,
            "num_folds": self.num_folds,
            "judge_updates": self.judge_training.updates if self.judge_training else 0,
            **self.teachers,
        }
        if self.attributes:
            description["attributes"] = list(self.attributes)
        if self.decoder == "sharp":
            description["sharp_training"] = resolved(self.sharp_training, "images")
        return json.loads(json.dumps(description))

    def file(self, *parts: str) -> str:
        """URI of an intermediate result; all of them are deleted when the model is finished."""
        return storage.join(self.out, "_training", *parts)

    def latent_kinds(self) -> list[str]:
        """Names of the latent ensembles: of all images, and without each of the folds, which depend on their number."""
        return ["latent", *(f"fold-{fold}-of-{self.num_folds}" for fold in range(self.num_folds))]

    def member_file(self, kind: str, member: int) -> str:
        """The checkpoint of one member; kind is "image" or one of ``latent_kinds``."""
        return self.file("members", f"{kind}-{member:03d}.safetensors")


def plan_training(
    out: str,
    dataset: Dataset,
    held_out: Dataset | None,
    *,
    architecture: str = "conv",
    vae_fields: Mapping[str, Any] | None = None,
    num_members: int = 50,
    hidden: Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    center_crop: int | None = None,
    recipe: str | None = None,
    predictor: Any = None,
    refit: str | None = None,
    **fields: Any,
) -> TrainingPlan:
    """Inspects the data and derives classes, preprocessing and shapes.

    Args:
        out: the model directory.
        dataset: to train on.
        held_out: for the metrics, or None.
        architecture: a key of VAES.
        vae_fields: fields of VAEConfig that differ from the architecture's own; None means its own too.
        num_members: M of the latent ensemble.
        hidden: widths of the classifiers' hidden layers; None takes the paper's, or what the recipe chooses.
        image_size: side of the images in the model, or (height, width); None looks at the data.
        mode: of the images in the model, "L" or "RGB"; None looks at the data.
        center_crop: side of the centred square that is taken of larger images; None takes the source's own, or all.
        recipe: where values come from that are not given: "paper", or "auto" for a search on the training split (see
            ``training.recipe``). By default the paper's for its own data sets and networks (digits, mnist, beta_vae),
            else auto.
        predictor: the user's own model, whose probabilities the ensemble learns: a .onnx file, module:function or a
            function, see ``load_predictor``. Its classes are the model's, and labels are not needed.
        refit: a complete audit of images to train on by the model in ``out`` with this predictor, which is asked about
            the audit's images, too.
        fields: of TrainingPlan; ``vae_epochs=6`` stands for that field of ``vae_training``, and so on.
    """
    require_outside(dataset, out)
    eps_given = bool({"ensemble_training", "ensemble_adversarial_eps"} & set(fields))
    fields = training_fields(fields)
    fields["attributes"] = choose_attributes(dataset, held_out, fields.get("attributes", ()))
    listing = list_images(dataset)
    if predictor is None and refit is not None:
        raise ValueError("refit: expected the predictor to ask about the audit's images, got none: name it")
    loaded = None if predictor is None else load_predictor(predictor)
    class_names = class_names_of(listing) if loaded is None else loaded.class_names
    preprocessing = infer_preprocessing(dataset, listing, image_size=image_size, mode=mode, center_crop=center_crop)
    if recipe is None:
        recipe = "paper" if dataset.source in ("digits", "mnist") or architecture != "conv" else "auto"
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    given = {name: value for name, value in (vae_fields or {}).items() if value is not None}
    searched: list[str] = []
    if recipe == "auto":
        searched = [name for name in ("latent_dim", "beta") if name not in given]
        if not eps_given:
            searched.append("adversarial_eps")
        if hidden is None:
            searched.append("hidden")
        if predictor is None and "label_weight" not in given:
            searched.append("label_weight")
    if architecture == "conv" and "channels" not in given:
        given["channels"] = channels_for(preprocessing.image_shape)
    vae = vae_config(architecture, preprocessing.image_shape, **given)
    data = describe_data(dataset, held_out, listing, class_names)
    teachers = {}
    if loaded is not None:
        teachers["predictor"] = loaded.digest
        data["codes"] = len(listing) * (1 + COPIES)
        if unknown := sorted(set(listing["label_name"].unique().drop_null().to_pylist()) - set(class_names)):
            labelled, data["labelled"] = data["labelled"], sum(data["per_class"].values())
            data["remarks"].insert(0, describe_unknown(unknown, labelled - data["labelled"], labelled, class_names))
        if fields.get("image_members") and not data["labelled"]:
            raise ValueError("image_members: expected images with labels, which an image ensemble needs; found none")
    if refit is not None:
        teachers["refit"] = open_audit(refit, out, dataset, listing, class_names).plan.fingerprint
    widths = EnsembleConfig.hidden if hidden is None else tuple(hidden)
    ensemble = EnsembleConfig(len(class_names), vae.latent_dim, widths, num_members)
    plan = TrainingPlan(
        out,
        class_names,
        preprocessing,
        vae,
        ensemble,
        dataset=dataset,
        held_out=held_out,
        data=data,
        searched=tuple(searched),
        predictor=predictor,
        refit=refit,
        teachers=teachers,
        **fields,
    )
    return keep_extras(plan)


def describe_unknown(unknown: Sequence[str], images: int, labelled: int, class_names: Sequence[str]) -> str:
    """The remark on labels that are no class of the predictor, of so many images among all that have a label."""
    some, known = (", ".join(names[:5]) + (" ..." if len(names) > 5 else "") for names in (unknown, class_names))
    if images == labelled:
        return f"WARNING: no label ({some}) is a class of the predictor ({known}): all count as none"
    return f"note: labels that are no class of the predictor ({some}; {plural(images, 'image')}) count as none"


def describe_data(
    dataset: Dataset, held_out: Dataset | None, listing: pa.Table, class_names: Sequence[str]
) -> dict[str, Any]:
    """What model.json says of the images."""
    measured = None if held_out is None else list_images(held_out)
    remarks, both = review(listing, measured), 0
    if measured is not None and held_out is not None and held_out.data == dataset.data:
        both = pc.sum(pc.is_in(measured["image_id"], listing["image_id"].combine_chunks())).as_py()
    if both:
        images = plural(both, "held-out image is", "held-out images are")
        remarks.insert(0, f"WARNING: {images} also trained on: figures measured on them are too good")
    return {
        "source": dataset.source,
        "uri": None if dataset.data is None else storage.display(dataset.data),
        "split": dataset.split,
        "fingerprint": listing_fingerprint(listing),
        "images": len(listing),
        "labelled": len(listing) - listing["label_name"].null_count,
        "per_class": {name: pc.sum(pc.equal(listing["label_name"], name)).as_py() for name in class_names},
        "held_out": None if held_out is None else held_out.split,
        "held_out_trained": both,
        "remarks": remarks,
    }


def keep_extras(plan: TrainingPlan) -> TrainingPlan:
    """The plan with what a finished model in its directory has beside the ensemble, where nothing else is asked for."""
    known = (read_card(plan.out) or {}).get("plan") or {}
    names = [name for name in ("image_members", "num_folds", "judge_updates") if known.get(name)]
    kept = {name: known[name] for name in names if getattr(plan, name) == getattr(TrainingPlan, name)}
    if "image_members" in kept:
        kept["image_training"] = EnsembleTraining(**known["image_training"], min_updates=0)
    if "sharp_training" in known:
        kept |= {"decoder": "sharp", "sharp_training": VAETraining(**known["sharp_training"], min_updates=0)}
    attributes = dict.fromkeys([*known.get("attributes", ()), *plan.attributes])
    return replace(plan, attributes=tuple(attributes), **kept)


def channels_for(image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Channels of a convolutional VAE: the paper's three stages up to 32 pixels, one more for each doubling."""
    stages = max(3, math.ceil(math.log2(max(image_shape[1:]) / 4)))
    return (32, 64, 128, 256, 256, 256, 256)[:stages]


def training_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TrainingPlan, with ``vae_epochs`` and the like put where they belong; ValueError for an unknown one."""
    found = dict(fields)
    for prefix, default in TRAININGS.items():
        names = [field.name for field in dataclass_fields(default)]
        given = {name: found.pop(f"{prefix}_{name}") for name in names if f"{prefix}_{name}" in found}
        if "epochs" in given:  # alone they are exactly so many, whatever min_updates is by default
            given = {"min_updates": 0, **given}
        if given:
            try:
                found[f"{prefix}_training"] = replace(found.get(f"{prefix}_training", default), **given)
            except ValueError as error:
                raise ValueError(f"{prefix}_{error}") from None
    if unknown := sorted(set(found) - {*OPTIONS, *(f"{prefix}_training" for prefix in TRAININGS)}):
        short = [f"{prefix}_{field.name}" for prefix, c in TRAININGS.items() for field in dataclass_fields(c)]
        raise ValueError(f"{unknown[0]}: unknown; expected {', '.join(OPTIONS)}, or one of {', '.join(short)}")
    return found
