"""What checks read and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clarity.audit.summary import foreign_labels
from clarity.findings.differences import Differences
from clarity.findings.statistics import share_interval
from clarity.findings.suspicion import suspicious_labels
from clarity.findings.verdict import Verdict, verdict
from clarity.report.text import interval, listed

if TYPE_CHECKING:
    import duckdb

#: The smallest severity of what is probably wrong, and one of what is worth a look that is given in its stead.
MIN_ALERT, MAX_LOOK = 0.7, 0.65


@dataclass(frozen=True)
class Finding:
    """One thing that an audit shows."""

    kind: str  # the check
    severity: float  # in [0, 1]; from 0.7 probably wrong, from 0.4 worth a look, below a fact
    title: str  # a few words
    sentence: str  # the finding with its figures
    evidence: str  # what it rests on, and the chance that it is false
    pairs: tuple[tuple[int, int], ...] = ()  # (source, target) indices, most telling first
    examples: tuple[tuple[str, int], ...] = ()  # (image_id, target), most telling first
    figures: dict[str, Any] = field(default_factory=dict)  # the numbers of the sentence

    @property
    def level(self) -> str:
        """The severity as a word: alert, look or fact."""
        return "alert" if self.severity >= MIN_ALERT else "look" if self.severity >= 0.4 else "fact"


@dataclass(frozen=True)
class NotChecked:
    """A check that had nothing to look at, and why."""

    reason: str


#: What a check returns: what it found, nothing being an empty list, or why it did not look.
Outcome = Finding | list[Finding] | NotChecked


@dataclass(frozen=True)
class Facts:
    """The aggregates of one audit."""

    #: with the views of ``audit.queries.connect``, and ``attributes`` where these were measured
    con: duckdb.DuckDBPyConnection
    class_names: tuple[str, ...]  # K names
    #: the columns of ``class_pair_figures`` as (K, K) arrays by [source, target], NaN where there is no pair
    pairs: dict[str, np.ndarray]
    #: distinct images in the pairs; shares of pairs have intervals as if each image were one observation
    num_images: int
    thresholds: tuple[float, float]  # the smallest and the largest that a target probability had to exceed
    max_steps: int  # of the search
    #: what counterfactuals change; None without pictures, and shortcuts are not looked for
    differences: Differences | None
    suspicion: pa.Table  # of ``suspicious_labels``
    trained_on_labels: bool  # the ensemble may have been trained on the labels of these images
    verdict: Verdict  # on the model
    unreachable: list[int]  # the classes that it calls out of reach
    has_predictor: bool  # the user's own model is explained through the ensemble, so that source is its class
    judge_accuracy: float | None  # of the held-out judge, on reconstructions of real images
    keep: tuple[str, ...] = ()  # attributes that the search kept, in the order of their columns

    @property
    def explained(self) -> str:
        """The explained model, whose class the source of an image is."""
        return "your model" if self.has_predictor else "the ensemble"

    @property
    def num_pairs(self) -> int:
        """All requested pairs, those that failed included."""
        return int(np.nansum(self.pairs["pairs"]))

    def has_table(self, name: str) -> bool:
        """Whether there is a table or view of this name."""
        return (name,) in self.rows("SHOW TABLES")

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Runs a query."""
        return self.con.execute(sql, parameters or {}).fetchall()

    def examples(self, where: str, order: str) -> tuple[tuple[str, int], ...]:
        """Image and target of the first six pairs that satisfy a condition, in an order."""
        sql = f"SELECT image_id, target FROM counterfactuals WHERE {where} ORDER BY {order}, image_id, target LIMIT 6"
        return tuple((image_id, target) for image_id, target in self.rows(sql))

    def name(self, index: int) -> str:
        """Name of a class."""
        return self.class_names[index]

    def arrow(self, pair: tuple[int, int]) -> str:
        """How a class pair is written."""
        return f"{self.class_names[pair[0]]} → {self.class_names[pair[1]]}"

    def arrows(self, pairs: Sequence[tuple[int, int]]) -> str:
        """Some class pairs, or three of them."""
        return ("such as " if len(pairs) > 3 else "") + listed([self.arrow(pair) for pair in pairs[:3]])

    def in_images(self, part: float) -> tuple[float, int]:
        """A part of all pairs and their number, as if each image were one observation."""
        return part / self.num_pairs * self.num_images, self.num_images

    def interval_of_pairs(self, part: float) -> str:
        """The interval of a share of all pairs."""
        return for_others(*self.in_images(part))


def gather(
    con: duckdb.DuckDBPyConnection,
    class_names: Sequence[str],
    *,
    thresholds: tuple[float, float],
    max_steps: int,
    card: Mapping[str, Any] | None = None,
    differences: Differences | None = None,
    trained_on_labels: bool = False,
    keep: Sequence[str] = (),
    predictor: str | None = None,
) -> Facts:
    """Computes what the checks need.

    ``card`` is model.json, without whose figures the verdict is "not checked"; ``predictor`` the digest of the user's
    own model, if it is explained.
    """
    columns = con.execute("FROM class_pair_figures WHERE source IS NOT NULL").fetchnumpy()
    pairs = {}
    for name in columns.keys() - {"source", "source_name", "target", "target_name"}:
        pairs[name] = np.full((len(class_names),) * 2, np.nan)
        pairs[name][columns["source"], columns["target"]] = np.ma.filled(columns[name].astype(float), np.nan)
    ((num_images, asked),) = con.execute(
        "SELECT count(DISTINCT image_id), count(prediction_target_prob_initial) FROM counterfactuals"
    ).fetchall()
    card = card or {}
    evaluation = card.get("evaluation") or {}
    judge, names = evaluation.get("judge") or {}, list(evaluation.get("per_class", ()))
    found = verdict(card, foreign_labels(con) > 0, predictor)
    return Facts(
        con=con,
        class_names=tuple(class_names),
        pairs=pairs,
        num_images=num_images,
        thresholds=thresholds,
        max_steps=max_steps,
        differences=differences,
        suspicion=suspicious_labels(con),
        trained_on_labels=trained_on_labels,
        verdict=found,
        unreachable=[names.index(name) for name in found.unreachable],
        has_predictor=asked > 0,
        judge_accuracy=judge.get("accuracy_on_reconstructions"),
        keep=tuple(keep),
    )


def graded(severity: Callable[[float], float], part: float, whole: float) -> float:
    """The severity of a share; it is an alert only where it would be at the lower end of the share's interval, too."""
    lowest, found = share_interval(part, whole)[0], severity(part / whole)
    return found if severity(lowest) >= MIN_ALERT else min(found, MAX_LOOK)


def for_others(part: float, whole: float) -> str:
    """The 95 % interval of a share, for other images like those that were counted."""
    return f"for other images like these the 95 % interval is {interval(*share_interval(part, whole))}"


def ranked(values: np.ndarray) -> list[tuple[int, int]]:
    """The (source, target) of every entry but NaN, largest first, ties in reading order."""
    order = np.argsort(-values, axis=None, kind="stable").tolist()
    cells = [divmod(i, values.shape[1]) for i in order]
    return [cell for cell in cells if not np.isnan(values[cell])]
