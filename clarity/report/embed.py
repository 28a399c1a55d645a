"""Decodes and encodes what the page's script shows of each audit: images, counterfactuals, paths and mean changes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clarity.images import decode_png
from clarity.report.sample import Sample
from clarity.report.text import number, probability
from clarity.report.tiles import Tiles
from clarity.report.view import View, classify, decode

#: What a row of ``rows`` holds, in order.
FIELDS = (
    *("target", "source", "status", "converged", "steps", "distance", "target_prob", "epistemic", "aleatoric"),
    *("reencoded", "reencoded_prob", "judge", "judge_prob", "predicted_prob", "confirmed", "rungs"),
    *("cf", "path", "path_prob", "path_text"),
)


@dataclass(frozen=True)
class Embedded:
    """What the page embeds of one audit.

    ``rows``: rows of FIELDS by image, the nearest converged first. ``tiles``: of the counterfactuals, by (image_id,
    target). ``change``: tiles of mean changes by source and target, or None.
    """

    rows: dict[str, list[list[Any]]]
    tiles: dict[tuple[str, int], int]
    reconstructions: dict[str, int]
    change: list[list[int]] | None


def change_of(row: dict[str, Any], name: str, write: Callable[[float | None], str] = number) -> str:
    """A quantity before and after the search, on one line."""
    return f"{write(row[name + '_initial'])}\u00a0→\u00a0{write(row[name + '_final'])}"


def read_picture(picture: bytes | None, view: View) -> np.ndarray | None:
    """A stored PNG as (C, H, W) uint8."""
    return None if picture is None else decode_png([picture], view.audit.plan.image_shape)[0]


def embed_images(views: Sequence[View], image_ids: Sequence[str], tiles: Tiles) -> dict[str, dict[str, Any]]:
    """What the page says of each image, by the first audit that holds it, with the ten most probable classes."""
    images: dict[str, dict[str, Any]] = {}
    for view in views:
        for code in codes_of(view, image_ids):
            if code["image_id"] not in images:
                probs = np.array(code["probs"] or [])
                likely = np.argsort(-probs, kind="stable")[:10].tolist()
                images[code["image_id"]] = {
                    **{name: code.get(name) for name in ("label", "label_name", "source", "error", "prediction")},
                    **{name: number(code[name]) for name in ("aleatoric", "epistemic", "reconstruction_l1")},
                    "prediction_prob": their_prob(code),
                    "probs": [[k, round(float(probs[k]), 4), probability(probs[k])] for k in likely],
                    "x": tiles.add(read_picture(code["x"], view)),
                }
    return images


def their_prob(code: dict[str, Any]) -> str | None:
    """The probability that the user's own model gives to the class that it predicts, where it is known."""
    seen, probs = code.get("prediction"), code.get("prediction_probs")
    return None if seen is None or probs is None else probability(probs[seen])


def codes_of(view: View, image_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ``codes`` in the order of their ids."""
    view.facts.con.register("wanted_images", pa.table({"image_id": pa.array(image_ids, pa.string())}))
    return view.records("SELECT * FROM codes SEMI JOIN wanted_images USING (image_id) ORDER BY image_id")


def embed_audit(view: View, sample: Sample, tiles: Tiles) -> Embedded:
    """Decodes what the audit does not store, and adds its pictures to the tiles."""
    keys = list(sample.frames)
    ids, targets = pa.array([key[0] for key in keys], pa.string()), pa.array([key[1] for key in keys], pa.int32())
    view.facts.con.register("wanted", pa.table({"image_id": ids, "target": targets}))
    rows = view.records(
        "SELECT * FROM counterfactuals SEMI JOIN wanted USING (image_id, target) "
        "ORDER BY image_id, converged DESC, distance_z_l1, target"
    )
    codes = {code["image_id"]: code["z"] for code in codes_of(view, sample.image_ids) if code["status"] == "ok"}
    reconstructions = {}
    if view.model is not None:
        decoded = decode(view.model, list(codes.values()))
        reconstructions = {image_id: tiles.add(picture) for image_id, picture in zip(codes, decoded)}
    paths = embed_paths(view, rows, codes, sample, tiles)
    pictures = counterfactual_tiles(view, rows, tiles)
    has_predictor = any(row["prediction_target_prob_final"] is not None for row in rows)
    by_image: dict[str, list[list[Any]]] = {}
    for row in rows:
        key = (row["image_id"], row["target"])
        by_image.setdefault(row["image_id"], []).append(
            [
                *(row[name] for name in ("target", "source", "status")),
                int(row["converged"]),
                f"{row['steps']:,}",
                number(row["distance_z_l1"]),
                change_of(row, "target_prob", probability),
                None if row["epistemic_final"] is None else change_of(row, "epistemic"),
                change_of(row, "aleatoric"),
                row["reencoded_class"],
                probability(row["reencoded_target_prob"]),
                row["judge_class"],
                probability(row["judge_target_prob"]),
                change_of(row, "prediction_target_prob", probability) if has_predictor else None,
                row["confirmed"],
                row["rungs"],
                pictures[key],
                *paths.get(key, ([], [], [])),
            ]
        )
    differences, change = view.facts.differences, None
    if differences is not None and len(differences.mean):
        change = [
            [tiles.add_change(mean) if count else -1 for mean, count in zip(means, counts)]
            for means, counts in zip(differences.mean, differences.count)
        ]
    return Embedded(by_image, pictures, reconstructions, change)


def counterfactual_tiles(view: View, rows: list[dict[str, Any]], tiles: Tiles) -> dict[tuple[str, int], int]:
    """The counterfactuals' pictures: stored ones, else decoded from their codes."""
    lacking = [row for row in rows if row["x_cf"] is None and row["z_cf"] is not None]
    decoded = {}
    if view.model is not None:
        pictures = decode(view.model, [row["z_cf"] for row in lacking])
        decoded = {(row["image_id"], row["target"]): picture for row, picture in zip(lacking, pictures)}
    found = {}
    for row in rows:
        key = (row["image_id"], row["target"])
        found[key] = tiles.add(decoded[key] if key in decoded else read_picture(row["x_cf"], view))
    return found


def embed_paths(
    view: View, rows: list[dict[str, Any]], codes: dict[str, list[float]], sample: Sample, tiles: Tiles
) -> dict[tuple[str, int], tuple[list[int], list[float | None], list[str]]]:
    """Tiles, target probabilities and their texts at equal steps of the segment from z to z_cf of each pair."""
    walks: dict[tuple[str, int], np.ndarray] = {}
    for row in rows:
        image_id, target = row["image_id"], row["target"]
        frames = sample.frames[image_id, target]
        if frames and row["z_cf"] is not None:
            z, z_cf = np.array(codes[image_id]), np.array(row["z_cf"])
            along = np.arange(1, frames + 1)[:, None] / (frames + 1)
            walks[image_id, target] = (z + along * (z_cf - z)).astype(np.float32)
    if not walks or view.model is None:
        return {}
    points = np.concatenate(list(walks.values()))
    pictures = decode(view.model, points)
    probs = classify(view, points, [image_id for (image_id, _), walk in walks.items() for _ in walk])
    paths, end = {}, 0
    for (image_id, target), walk in walks.items():
        start, end = end, end + len(walk)
        along = probs[start:end, target].tolist()
        paths[image_id, target] = (
            [tiles.add(picture) for picture in pictures[start:end]],
            [round(p, 3) if math.isfinite(p) else None for p in along],
            [probability(p) for p in along],
        )
    return paths
