"""Linear heads on the frozen codes of a VAE, one for each attribute of a data set that takes two values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from sklearn.linear_model import LogisticRegression

from clarity.attributes import AttributeHeads, attribute_rows
from clarity.data import Dataset, list_images, read_all, with_attributes
from clarity.images import Preprocessing
from clarity.training.evaluate import accuracies, encode_pixels, evenly
from clarity.vae import VAE

#: Images that the heads are fitted to, and measured on, at most: spread evenly over the split.
MAX_IMAGES = 50_000
#: Directions of an attribute. Without the first one, the codes still tell most attributes.
DIRECTIONS = 2


def choose_attributes(dataset: Dataset, held_out: Dataset | None, names: Sequence[str]) -> tuple[str, ...]:
    """The attributes with these names, or with ("all",) every one that takes two values; else ValueError."""
    if not names:
        return ()
    listing = list_images(found := with_attributes(dataset, names))
    values = {name: pc.unique(listing[name]).drop_null() for name in found.attributes}
    binary = [name for name, of in values.items() if len(of) == 2]
    if other := [name for name in found.attributes if name not in binary and tuple(names) != ("all",)]:
        raise ValueError(
            f"attributes: expected a column of two values, found {len(values[other[0]])} in {other[0]!r}: leave it "
            "out, or make columns of 0 and 1 of it"
        )
    if not binary:
        raise ValueError("attributes: expected a column of two values, found none: leave them out")
    if held_out is not None:
        with_attributes(held_out, binary)
    return tuple(binary)


def fit_heads(
    vae: VAE, preprocessing: Preprocessing, dataset: Dataset, held_out: Dataset | None, attributes: Sequence[str]
) -> tuple[AttributeHeads, dict[str, Any]]:
    """Fit logistic regressions for each attribute to codes drawn from the posteriors of the training split.

    The second is fitted to the codes without their parts along the first (Ravfogel et al. 2020).

    Beside the heads returns for each attribute ``share`` of the training images where it is set, and on the held-out
    images ``accuracy`` and ``balanced_accuracy``, null where it is not known of any.
    """
    mean, log_var, values = encode_split(vae, preprocessing, dataset, attributes)
    noise = np.random.default_rng(0).standard_normal(mean.shape, np.float32)
    codes = mean + np.exp(log_var / 2) * noise
    heads = AttributeHeads(attributes, mean.shape[1], DIRECTIONS)
    figures: dict[str, Any] = {}
    highest = {}
    for a, name in enumerate(attributes):
        known = ~np.isnan(values[:, a])
        highest[name] = values[known, a].max()
        is_set = values[known, a] == highest[name]
        if is_set.all():
            raise ValueError(f"attributes: {name!r} has one value among the images that can be read: leave it out")
        left = codes[known]
        for layer in (heads.linear, *heads.further):
            fitted = LogisticRegression(max_iter=1000).fit(left, is_set)
            layer.weight.data[a] = torch.from_numpy(fitted.coef_[0]).float()
            if layer is heads.linear:
                layer.bias.data[a] = float(fitted.intercept_[0])
            direction = fitted.coef_[0] / np.linalg.norm(fitted.coef_[0])
            left = left - np.outer(left @ direction, direction)
        figures[name] = {"share": float(is_set.mean()), "accuracy": None, "balanced_accuracy": None}
    heads = heads.requires_grad_(False).eval()
    if held_out is None:
        return heads, figures
    mean, _, values = encode_split(vae, preprocessing, held_out, attributes)
    seen = attribute_rows(heads, torch.from_numpy(mean)) > 0.5
    for a, name in enumerate(attributes):
        known = ~np.isnan(values[:, a])
        if known.any():
            figures[name] |= accuracies(seen[known, a], values[known, a] == highest[name])
    return heads, figures


def encode_split(
    vae: VAE, preprocessing: Preprocessing, dataset: Dataset, attributes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior means and log-variances (N, D) of readable images, and their attributes (N, A), NaN where unknown."""
    listing = list_images(replace(dataset, attributes=tuple(attributes)))
    listing = listing.take(evenly(len(listing), MAX_IMAGES))
    pixels, ids, *_ = read_all(dataset, listing, preprocessing)
    mean, log_var = encode_pixels(vae, torch.from_numpy(pixels))
    rows = listing.take(pc.index_in(pa.array(ids, pa.string()), value_set=listing["image_id"]))
    columns = [rows[name].cast(pa.float64()).fill_null(np.nan).to_numpy() for name in attributes]
    return mean.numpy(), log_var.numpy(), np.stack(columns, 1)
