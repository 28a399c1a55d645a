"""Chooses what a page embeds of an audit of any size: examples of class pairs, images to look up.

The choice depends on the tables alone, so that a page is the same at each call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clarity import storage
from clarity.audit.queries import has_predictions, statement
from clarity.report.view import View

KINDS = ("closest", "median", "hardest", "failed")
#: Examples of each kind for each class pair, and pictures of the path to each: the most detailed choice first.
DETAIL = ((3, 5), (3, 3), (2, 3), (1, 3), (1, 0))
MAX_EXAMPLES = DETAIL[0][0]
#: Images to look up at most, and rows of the tables of suspicious labels and of disagreements.
MAX_IMAGES, LISTED = 240, 40


@dataclass(frozen=True)
class Sample:
    """What a page embeds.

    ``examples``: image_id and kind by class pair. ``lookup``: images shown with all their counterfactuals.
    ``disagreements``: rows where predictions and ensemble differ. ``frames``: pictures of the path of every embedded
    pair, by (image_id, target). ``num_pairs``: class pairs that have any example.
    """

    examples: dict[tuple[int, int], list[tuple[str, str]]]
    lookup: list[str]
    disagreements: list[dict[str, Any]]
    frames: dict[tuple[str, int], int]
    num_pairs: int

    @property
    def image_ids(self) -> list[str]:
        """Every image of which something is embedded."""
        return sorted({image_id for image_id, _ in self.frames} | set(self.lookup))


def choose(views: Sequence[View], budget: int, images: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Sample:
    """Chooses from the first audit, of at most ``budget`` pictures; ``pairs`` come first, ``images`` are looked up."""
    first = views[0]
    # Up to MAX_EXAMPLES of each kind for each class pair, by latent distance; failed ones by probability.
    ranked: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in first.records(statement("page_examples"), {"each": MAX_EXAMPLES, "kinds": list(KINDS)}):
        ranked.setdefault((row["source"], row["target"]), []).append(row)
    chosen, used = fitting_examples(views, ranked, int(budget * 0.8), pairs)
    lookup = choose_images(views, images, budget - used)
    disagreements = []
    if has_predictions(first.facts.con):  # in order of the ensemble's certainty
        theirs = "prediction_probs[prediction + 1]" if "prediction_probs" in first.audit.codes.schema.names else "NULL"
        sql = statement("page_disagreements").format(theirs=theirs)
        disagreements = first.records(sql, {"count": LISTED})
    frames = {(row["image_id"], row["target"]): row["frames"] for row in chosen}
    others = [example for view in views for finding in view.results.findings for example in finding.examples[:6]]
    others += [(row["image_id"], row["other"]) for row in disagreements]
    others += [(image_id, target) for image_id in lookup for target in range(len(first.class_names))]
    frames = dict.fromkeys(others, 0) | frames
    examples: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for row in chosen:
        examples.setdefault((row["source"], row["target"]), []).append((row["image_id"], row["kind"]))
    return Sample(examples, lookup, disagreements, frames, len(ranked))


def fitting_examples(
    views: Sequence[View],
    ranked: dict[tuple[int, int], list[dict[str, Any]]],
    room: int,
    pairs: Sequence[tuple[int, int]],
) -> tuple[list[dict[str, Any]], int]:
    """The examples that fit, with the frames of their paths, and how many pictures they are.

    Class pairs asked for come first, then those of findings, then the nearest. All get the most detailed choice that
    fits them all; where none does, as many as fit get the smallest.
    """
    reported = [pair for view in views for finding in view.results.findings for pair in finding.pairs]
    distance = np.nan_to_num(views[0].facts.pairs["median_distance"], nan=np.inf)
    near = sorted(ranked, key=lambda pair: (distance[pair], pair))
    order = [pair for pair in dict.fromkeys([*pairs, *reported[:24], *near]) if pair in ranked]
    chosen: list[dict[str, Any]] = []
    used = 0
    for count, frames in DETAIL:
        each = (3 + frames) * len(views)
        kept = {pair: [row for row in ranked[pair] if row["rank"] <= count] for pair in order}
        if sum(map(len, kept.values())) * each <= room:
            break
    for pair in order:
        if used + len(kept[pair]) * each <= room:
            used += len(kept[pair]) * each
            chosen += [{**row, "frames": frames} for row in kept[pair]]
    return chosen, used


def choose_images(views: Sequence[View], images: Sequence[str], room: int) -> list[str]:
    """Images embedded with all their counterfactuals: those asked for, of findings, then some of each class."""
    first = views[0]
    asked = list(dict.fromkeys(images))
    first.facts.con.register("asked", pa.table({"image_id": pa.array(asked, pa.string())}))
    if missing := first.facts.rows("SELECT image_id FROM asked ANTI JOIN codes USING (image_id) ORDER BY 1"):
        some = ", ".join(row[0] for row in first.facts.rows("SELECT image_id FROM codes ORDER BY 1 LIMIT 5"))
        uri = storage.display(first.audit.uri)
        raise ValueError(f"images: no image {missing[0][0]!r} in {uri}; its ids look like {some}")
    number = max(len(asked), min(MAX_IMAGES, room // (2 + (len(first.class_names) - 1) * len(views))))
    reported = [example[0] for view in views for finding in view.results.findings for example in finding.examples[:6]]
    spread = first.facts.rows(statement("page_images"), {"each": max(1, math.ceil(number / len(first.class_names)))})
    chosen = dict.fromkeys([*asked, *reported, *(row[0] for row in spread)])
    return list(chosen)[:number]
