"""Learning from a predictor: codes with the probabilities that the user's own model gives to their images.

The ensemble then needs no labels. The predictor is asked about the training images, about decoded codes around them,
where a search moves, and in a refit about the counterfactual images of an audit. Does not know losses.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from clarity import schema, storage
from clarity.audit.read import Audit, read_audit
from clarity.data import Dataset, read_all
from clarity.images import Preprocessing
from clarity.model import FILES, Model, read_card
from clarity.predictor import Predictor
from clarity.rows import decode_rows, logits_rows, mean_probs
from clarity.tables import quantise
from clarity.training.evaluate import LabelledImages, encode_pixels
from clarity.vae import VAE

#: Perturbed codes of each training image.
COPIES = 2
#: Largest standard deviation of the perturbation, in those of the codes.
NOISE = 0.5
#: Held-out images on which agreement is measured at most, spread evenly.
MEASURED_IMAGES = 5_000
#: Two classes are not told apart if more than this share of the images of one is seen as the other once reconstructed.
MAX_CONFUSED = 0.1


def original_probs(
    predictor: Predictor, dataset: Dataset, listing: pa.Table, images: LabelledImages, preprocessing: Preprocessing
) -> Tensor:
    """Probabilities (N, K) of images as the predictor sees the original files, NaN where it gives none."""
    if (theirs := predictor.sees(preprocessing)) == preprocessing:
        return pixel_probs(predictor, images.pixels.numpy())
    rows = listing.take(pc.index_in(pa.array(images.ids, pa.string()), value_set=listing["image_id"]))
    pixels, ids, _, _ = read_all(dataset, rows, theirs)
    found = dict(zip(ids, pixel_probs(predictor, pixels)))
    missing = torch.full((len(predictor.class_names),), torch.nan)
    return torch.stack([found.get(image_id, missing) for image_id in images.ids])


def code_probs(predictor: Predictor, vae: VAE, z: Tensor) -> Tensor:
    """Probabilities (B, K) of the images of codes (B, D), decoded to 8 bits."""
    parts = [pixel_probs(predictor, quantise(decode_rows(vae, part))) for part in z.split(1024)]
    return torch.cat(parts)


def pixel_probs(predictor: Predictor, pixels: np.ndarray) -> Tensor:
    """Probabilities of images uint8, with as many threads as torch has."""
    return torch.from_numpy(predictor.predict(pixels, torch.get_num_threads()))


def perturb(z: Tensor, generator: torch.Generator, copies: int = COPIES) -> Tensor:
    """Codes (copies * B, D) around codes (B, D): a part of the way to another one, and noise of a random size."""
    repeated = z.repeat(copies, 1)
    other = z[torch.randint(len(z), (len(repeated),), generator=generator)]
    step, size = torch.rand((2, len(repeated), 1), generator=generator)
    noise = torch.randn(repeated.shape, generator=generator) * z.std(0, unbiased=False)
    return repeated + step * (other - repeated) + NOISE * size * noise


def point_codes(predictor: Predictor, vae: VAE, z: Tensor) -> dict[str, Tensor]:
    """Codes (B, D) with the probabilities of their decoded images, as fields of ``Codes``."""
    probs = code_probs(predictor, vae, z.to(vae.mean.weight.device))
    return {"mean": z, "log_var": torch.full_like(z, -torch.inf), "probs": probs}


def open_audit(uri: str, out: str, dataset: Dataset, listing: pa.Table, class_names: Sequence[str]) -> Audit:
    """The audit that a refit learns from: complete, of training images, and of the VAE in ``out``; else ValueError."""
    audit, name = read_audit(uri), storage.display(uri)
    if not audit.complete:
        raise ValueError(f"refit: expected a complete audit, found {name} cut: finish it first")
    if tuple(audit.class_names) != tuple(class_names):
        raise ValueError(f"refit: {name} is of the classes {', '.join(audit.class_names)}, not those of the predictor")
    known = set(listing["image_id"].to_pylist())
    found = audit.codes.to_table(columns=["image_id"])["image_id"].to_pylist()
    source = audit.plan.dataset["source"], audit.plan.dataset["split"]
    if source != (dataset.source, dataset.split) or not known.issuperset(found):
        raise ValueError(
            f"refit: expected an audit of the images to train on ({dataset.source}, split {dataset.split}), so that "
            f"the others stay unseen; {name} is of {source[0]}, split {source[1]}"
        )
    cards = read_card(out), read_card(storage.join(uri, "model"))
    sums = [None if card is None else card["files"][FILES["vae"]]["sha256"] for card in cards]
    if sums[0] is None or sums[0] != sums[1]:
        raise ValueError(
            f"refit: expected the model of {name} in {storage.display(out)}, found none or one with another VAE: name "
            "its directory as out"
        )
    return audit


def audit_codes(audit: Audit, rows: int) -> Iterator[tuple[list[str], Tensor]]:
    """Image ids and codes (B, D) of an audit's counterfactuals, ``rows`` at a time."""
    table = audit.counterfactuals.to_table(columns=["image_id", "z_cf"])
    for start in range(0, len(table), rows):
        part = table.slice(start, rows)
        yield part["image_id"].to_pylist(), torch.from_numpy(schema.matrix(part["z_cf"]).copy())


def fidelity(model: Model, predictor: Predictor, images: LabelledImages, probs: Tensor) -> dict[str, Any]:
    """How closely the ensemble, and the VAE's reconstructions, agree with the predictor on held-out images.

    ``probs`` (N, K) is what the predictor says of their original files; images with NaN are left out. ``codes``,
    ``reconstructions`` and ``perturbed`` hold "agreement", how often both name the same class, and "kl", the mean of
    KL(predictor, ensemble) in nats, of the predictor on the original, the reconstruction, and a decoded, perturbed
    code; ``reconstructing`` the same for what the VAE alone changes. ``confused``: [class, other, share] where more
    than MAX_CONFUSED of the images of a class are seen as the other one once they are reconstructed. ``labelled``: of
    how many images the predictor sees the label ("correct"), among those with a label of its classes ("images").
    """
    known = ~probs.isnan().any(1)
    probs, pixels, labels = probs[known], images.pixels[known], images.labels[known]
    z, _ = encode_pixels(model.vae, pixels)
    around = perturb(z, torch.Generator().manual_seed(0), copies=1)
    codes = z.to(model.device), around.to(model.device)
    reconstructed, perturbed = (code_probs(predictor, model.vae, part) for part in codes)
    of_code, of_perturbed = (torch.from_numpy(mean_probs(logits_rows(model.ensemble, part))) for part in codes)
    names, answered, confused = model.class_names, ~reconstructed.isnan().any(1), []
    before, after = probs.argmax(1)[answered], reconstructed.argmax(1)[answered]
    for k in before.unique().tolist():
        shares = torch.bincount(after[before == k], minlength=len(names)).double() / (before == k).sum()
        confused += [
            [names[k], names[other], float(share)]
            for other, share in enumerate(shares)
            if other != k and share > MAX_CONFUSED
        ]
    return {
        "images": len(z),
        "labelled": {"correct": int((probs.argmax(1) == labels).sum()), "images": int((labels >= 0).sum())},
        "codes": agreement(probs, of_code),
        "reconstructions": agreement(reconstructed, of_code),
        "perturbed": agreement(perturbed, of_perturbed),
        "reconstructing": agreement(probs, reconstructed),
        "confused": sorted(confused, key=lambda entry: -entry[2]),
    }


def agreement(p: Tensor, q: Tensor) -> dict[str, float]:
    """How often the likeliest classes are the same, and the mean KL(p, q) in nats, of probabilities (B, K).

    Rows with NaN, which the predictor did not answer, are left out.
    """
    known = ~(p + q).isnan().any(1)
    p, q = p[known].double(), q[known].double()
    terms = torch.xlogy(p, p) - torch.xlogy(p, q.clamp_min(1e-12))
    return {"agreement": float((p.argmax(1) == q.argmax(1)).double().mean()), "kl": float(terms.sum(1).mean())}
