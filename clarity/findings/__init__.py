"""What an audit says, in words: checks over its tables that yield ranked findings.

Knows the columns of schema.py, DuckDB and statistics. Does not know where an audit lies, how a page looks, or torch.

Shapes: N images, P pairs of (image, target), C, H, W image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from clarity.audit.queries import connect
from clarity.report.text import listed, percent, plural


def _arrow(con: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None) -> pa.Table:
    return con.sql(sql, params=parameters or {}).to_arrow_table()


def _rows(con: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    return con.execute(sql, parameters or {}).fetchall()


# ------------------------------------------------------------------------------------------------------------------
# Facts: what the checks read, computed once.


@dataclass(frozen=True)
class Differences:
    """What counterfactuals change on average, over a sample of pairs: see mean_differences.

    ``mean`` (K, K, C, H, W) by [source, target], ``count`` (K, K); ``target_mean`` and ``target_std`` (K, C, H, W) over
    all pairs towards a target; ``tint_mean`` and ``tint_std`` (K, C) of the change averaged over a picture's pixels;
    ``still`` (K, C, H, W) is how much a pixel varies among the pictures before the change that are towards a target.
    """

    mean: np.ndarray
    count: np.ndarray
    target_mean: np.ndarray
    target_std: np.ndarray
    tint_mean: np.ndarray
    tint_std: np.ndarray


@dataclass(frozen=True)
class Facts:
    """The aggregates of one audit; every (K, K) array is indexed [source, target] and holds NaN where no pair is."""

    con: duckdb.DuckDBPyConnection
    class_names: tuple[str, ...]
    pairs: dict[str, np.ndarray]
    config: dict[str, Any]
    differences: Differences | None = None
    suspicion: pa.Table | None = None

    @property
    def num_pairs(self) -> int:
        """All requested pairs, those that failed included."""
        return int(np.nansum(self.pairs["pairs"]))

    def name(self, index: int) -> str:
        """Name of a class."""
        return self.class_names[index]

    def arrow(self, source: int, target: int) -> str:
        """How a class pair is written."""
        return f"{self.class_names[source]} → {self.class_names[target]}"


def gather(
    con: duckdb.DuckDBPyConnection,
    class_names: Sequence[str],
    config: dict[str, Any] | None = None,
    differences: Differences | None = None,
) -> Facts:
    """Computes what the checks need from a connection made by ``connect``.

    Args:
        con: with the views ``codes`` and ``counterfactuals``, and ``attributes`` where attributes were judged.
        class_names: K names.
        config: the search's min_target_prob and max_steps, for the sentences.
        differences: of ``mean_differences``; without them shortcuts are not looked for.
    """
    num_classes = len(class_names)
    table = _arrow(con, _PAIR_FIGURES)
    source, target = table["source"].to_numpy(), table["target"].to_numpy()
    pairs = {}
    for name in table.column_names[2:]:
        pairs[name] = np.full((num_classes, num_classes), np.nan)
        pairs[name][source, target] = table[name].to_numpy()
    return Facts(
        con=con,
        class_names=tuple(class_names),
        pairs=pairs,
        config=dict(config or {}),
        differences=differences,
        suspicion=_suspicion(con),
    )


_PAIR_FIGURES = """
SELECT source, target,
       count(*)::DOUBLE AS pairs,
       count(*) FILTER (converged)::DOUBLE AS converged,
       count(*) FILTER (converged) / count(*) AS strict_validity,
       count(*) FILTER (reencoded_class = target) / count(*) AS reencoded_agreement,
       median(steps) FILTER (converged) AS median_steps,
       median(distance_z_l1) FILTER (converged) AS median_distance,
       quantile_cont(distance_z_l1, 0.25) FILTER (converged) AS distance_q25,
       quantile_cont(distance_z_l1, 0.75) FILTER (converged) AS distance_q75,
       median(distance_x_l1) FILTER (converged) AS median_distance_x,
       median(epistemic_initial)::DOUBLE AS epistemic_initial,
       median(epistemic_final)::DOUBLE AS epistemic_final
FROM counterfactuals GROUP BY ALL ORDER BY source, target"""


# ------------------------------------------------------------------------------------------------------------------
# Findings: each check reads the facts and yields sentences with figures.


@dataclass(frozen=True)
class Finding:
    """One thing that an audit says: a sentence with its figures, how much it matters, and where to look.

    ``severity`` is in [0, 1]: from 0.7 on something is probably wrong, from 0.4 on it deserves a look, below it is a
    fact worth knowing. ``pairs`` are (source, target) indices, ``examples`` are (image_id, target); both most telling
    first.
    """

    kind: str
    severity: float
    title: str
    sentence: str
    pairs: tuple[tuple[int, int], ...] = ()
    examples: tuple[tuple[str, int], ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """The severity as a word: alert, look or fact."""
        return "alert" if self.severity >= 0.7 else "look" if self.severity >= 0.4 else "fact"


class Check(NamedTuple):
    """One check: what it looks for, and what is said when it finds nothing."""

    doc: str
    quiet: str
    run: Callable[[Facts], Iterator[Finding]]


def find(facts: Facts) -> tuple[list[Finding], list[tuple[str, str]]]:
    """Runs every check: the findings, most severe first, and (kind, sentence) for each check that found nothing."""
    ranked: list[tuple[float, int, Finding]] = []
    quiet = []
    for place, (kind, check) in enumerate(CHECKS.items()):
        found = list(check.run(facts))
        ranked += [(-finding.severity, place, finding) for finding in found]
        if not found and check.quiet:
            quiet.append((kind, check.quiet))
    ranked.sort(key=lambda entry: entry[:2])
    return [finding for _, _, finding in ranked], quiet


def _ranked(values: np.ndarray, descending: bool = True) -> list[tuple[int, int]]:
    """The (source, target) of every finite or infinite entry, largest first, ties in reading order."""
    keyed = np.where(np.isnan(values), -np.inf if descending else np.inf, values)
    order = np.argsort(-keyed if descending else keyed, axis=None, kind="stable")
    cells = [(int(i) // values.shape[1], int(i) % values.shape[1]) for i in order]
    return [cell for cell in cells if not math.isnan(values[cell])]


def _hardness(facts: Facts) -> np.ndarray:
    """Median latent distance with every pair that failed counted as infinitely far: NaN where fewer than five pairs."""
    hard = np.where(facts.pairs["strict_validity"] < 0.5, np.inf, facts.pairs["median_distance"])
    return np.where(facts.pairs["pairs"] >= 5, hard, np.nan)


def _check_unread(facts: Facts) -> Iterator[Finding]:
    rows = _rows(
        facts.con,
        "SELECT coalesce(error, status), count(*), min(image_id) FROM codes WHERE status <> 'ok' GROUP BY 1 "
        "ORDER BY 2 DESC, 1",
    )
    if rows:
        (images,) = _rows(facts.con, "SELECT count(*) FROM codes")[0]
        failed = sum(count for _, count, _ in rows)
        reasons = listed([f"“{reason}” ({count:,})" for reason, count, _ in rows[:3]])
        yield Finding(
            "unread",
            0.5 + 0.5 * min(1.0, 10 * failed / images),
            f"{plural(failed, 'image')} could not be read",
            f"{failed:,} of {plural(images, 'image')} ({percent(failed, images)}) were not explained: {reasons}"
            f"{' and other reasons' if len(rows) > 3 else ''}. First: {rows[0][2]}.",
            figures={"images": images, "failed": failed},
        )
    rows = _rows(
        facts.con, "SELECT status, count(*) FROM counterfactuals WHERE status <> 'ok' GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    if rows:
        broken = sum(count for _, count in rows)
        yield Finding(
            "unread",
            0.75,
            f"{plural(broken, 'search', 'searches')} met a number that is not finite",
            f"{broken:,} of {plural(facts.num_pairs, 'pair')} ({percent(broken, facts.num_pairs)}) ended with status "
            f"{listed([repr(status) for status, _ in rows])}: the model yields NaN or infinity there.",
            figures={"pairs": broken},
        )


def _check_unconverged(facts: Facts) -> Iterator[Finding]:
    failed = facts.pairs["pairs"] - facts.pairs["converged"]
    total = int(np.nansum(failed))
    if not total:
        return
    worst = _ranked(np.where(failed > 0, failed, np.nan))[:6]
    share = total / facts.num_pairs
    gamma, limit = facts.config.get("min_target_prob"), facts.config.get("max_steps")
    wanted = f"a target probability of {gamma:g}" if gamma is not None else "the wanted target probability"
    within = f" within {limit:,} steps" if limit is not None else ""
    parts = [f"{facts.arrow(*cell)} ({failed[cell]:,.0f} of {facts.pairs['pairs'][cell]:,.0f})" for cell in worst[:3]]
    where = f"most often {listed(parts)}" if (failed > 0).sum() > 3 else listed(parts)
    examples = _rows(
        facts.con,
        "SELECT image_id, target FROM counterfactuals WHERE NOT converged "
        "ORDER BY target_prob_final, image_id, target LIMIT 6",
    )
    yield Finding(
        "unconverged",
        min(0.95, 0.35 + 0.6 * min(1.0, share / 0.1) ** 0.5),
        f"{plural(total, 'pair')} did not converge",
        f"{total:,} of {plural(facts.num_pairs, 'pair')} ({percent(share)}) did not reach {wanted}{within}: {where}.",
        tuple(worst),
        tuple((image_id, target) for image_id, target in examples),
        {"pairs": total, "share": share},
    )


def _check_extremes(facts: Facts) -> Iterator[Finding]:
    hard = _hardness(facts)
    if np.isfinite(hard).sum() < 3:
        return
    usual = float(np.nanmedian(np.where(np.isinf(hard), np.nan, hard)))
    steps, distance = facts.pairs["median_steps"], facts.pairs["median_distance"]
    hardest, easiest = _ranked(hard)[:6], _ranked(hard, descending=False)[:6]
    first = hardest[0]
    if math.isinf(hard[first]):
        how = f"only {percent(facts.pairs['strict_validity'][first])} of its pairs converge"
        severity = 0.7
    else:
        how = (
            f"median latent distance {distance[first]:.1f} and {steps[first]:.0f} steps, "
            f"against {usual:.1f} over all pairs"
        )
        severity = 0.2 + 0.3 * min(1.0, max(0.0, hard[first] / usual - 1.5) / 1.5)
    yield Finding(
        "hardest",
        severity,
        f"Hardest: {facts.arrow(*first)}",
        f"{facts.arrow(*first)} asks for the largest change: {how}. "
        f"Next: {listed([facts.arrow(*cell) for cell in hardest[1:4]])}.",
        tuple(hardest),
        figures={"distance": float(hard[first]), "usual": usual},
    )
    first = easiest[0]
    yield Finding(
        "easiest",
        0.15,
        f"Easiest: {facts.arrow(*first)}",
        f"{facts.arrow(*first)} asks for the smallest change: median latent distance {distance[first]:.1f} and "
        f"{steps[first]:.0f} steps. Next: {listed([facts.arrow(*cell) for cell in easiest[1:4]])}.",
        tuple(easiest),
        figures={"distance": float(hard[first]), "usual": usual},
    )


def _check_asymmetries(facts: Facts) -> Iterator[Finding]:
    """One direction goes 1.4 times as far as the other, or fails more often by 20 points; beyond the medians' noise."""
    distance, validity, count = (facts.pairs[name] for name in ("median_distance", "strict_validity", "converged"))
    with np.errstate(invalid="ignore", divide="ignore"):
        # The half-width of a notch in a box plot: medians whose notches do not overlap differ at about 95 %.
        notch = 1.57 * (facts.pairs["distance_q75"] - facts.pairs["distance_q25"]) / np.sqrt(count)
        ratio = distance / distance.T
        apart = distance - distance.T > notch + notch.T
        far = (ratio >= 1.4) & apart & (np.minimum(count, count.T) >= 8)
        # Shares with one success and one failure added (Agresti and Caffo): their interval holds for few pairs too.
        pairs = facts.pairs["pairs"]
        shrunk = (count + 1) / (pairs + 2)
        noise = shrunk * (1 - shrunk) / (pairs + 2)
        fails = (validity.T - validity >= 0.2) & (shrunk.T - shrunk > 1.96 * np.sqrt(noise + noise.T))
        strength = np.where(fails, 10 + validity.T - validity, np.where(far, ratio, np.nan))
    cells = _ranked(strength)
    if not cells:
        return
    first = cells[0]
    back = first[::-1]
    if fails[first]:
        words = (
            f"{facts.arrow(*back)} converges in {percent(validity[back])} of its pairs, "
            f"{facts.arrow(*first)} in {percent(validity[first])}"
        )
    else:
        words = (
            f"{facts.arrow(*back)} is easy (median latent distance {distance[back]:.1f}), "
            f"{facts.arrow(*first)} is hard ({distance[first]:.1f}, {ratio[first]:.1f} times as far)"
        )
    others = (
        f" {plural(len(cells) - 1, 'other pair')} of classes likewise: {listed([facts.arrow(*c) for c in cells[1:4]])}."
        if cells[1:]
        else ""
    )
    yield Finding(
        "asymmetry",
        min(
            0.69,
            0.3 + 0.35 * min(1.0, (float(np.nan_to_num(ratio[first], nan=2.0)) - 1.4) / 1.2) + 0.2 * bool(fails[first]),
        ),
        f"One way is harder: {facts.arrow(*first)}",
        f"{words}.{others}",
        tuple(cell for c in cells[:4] for cell in (c, c[::-1])),
        figures={"ratio": float(ratio[first]), "directions": len(cells)},
    )


#: Share of the usual distance to the nearest class, below which an image is on the edge.
EDGE = 0.6


def _check_edge(facts: Facts) -> Iterator[Finding]:
    """Images whose nearest counterfactual is less than EDGE of the usual nearest distance away."""
    nearest = """
        WITH nearest AS (
            SELECT image_id, source, target, steps, distance_z_l1 AS distance FROM counterfactuals WHERE converged
            QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY distance_z_l1, target) = 1
        ), usual AS (SELECT median(distance) AS usual, count(*) AS images FROM nearest)
    """
    rows = _rows(
        facts.con,
        nearest
        + "SELECT image_id, source, target, steps, distance, usual, images, count(*) OVER () FROM nearest, usual "
        "WHERE distance < $edge * usual ORDER BY distance, image_id LIMIT 12",
        {"edge": EDGE},
    )
    if not rows:
        return
    image_id, source, target, steps, _, usual, images, count = rows[0]
    cells = _rows(
        facts.con,
        nearest + "SELECT least(source, target), greatest(source, target), count(*) FROM nearest, usual "
        "WHERE distance < $edge * usual GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT 4",
        {"edge": EDGE},
    )
    between = listed([f"{facts.name(a)} / {facts.name(b)} ({number:,})" for a, b, number in cells[:3]])
    between = f"most between {between}" if len(cells) > 3 else f"between {between}"
    share = count / images
    yield Finding(
        "edge",
        0.3 + 0.25 * min(1.0, share / 0.05),
        f"{plural(count, 'image')} on the edge",
        f"{plural(count, 'image')} ({percent(share)}) {'sits' if count == 1 else 'sit'} on the edge: another class is "
        f"less than {percent(EDGE)} of the usual distance away ({usual:.1f} is the median to the nearest class), "
        f"{between}. Closest: {image_id}, seen as {facts.name(source)}, is {facts.name(target)} after "
        f"{plural(steps, 'step')}.",
        tuple((a, b) for a, b, _ in cells),
        tuple((row[0], row[2]) for row in rows),
        {"images": count, "share": share, "usual": usual},
    )


def _check_epistemic(facts: Facts) -> Iterator[Finding]:
    """Targets whose counterfactuals end with more epistemic uncertainty than 95 % of the images seen as them."""
    rows = _rows(
        facts.con,
        """
        WITH cloud AS (
            SELECT source AS target, quantile_cont(epistemic, 0.95) AS bound, median(epistemic) AS usual
            FROM codes WHERE status = 'ok' GROUP BY source
        ), rising AS (
            SELECT target, source, count(*) AS pairs, count(*) FILTER (epistemic_final > bound) AS beyond,
                   median(epistemic_final) AS final, any_value(usual) AS usual
            FROM counterfactuals JOIN cloud USING (target) WHERE epistemic_final IS NOT NULL GROUP BY ALL
        )
        SELECT target, sum(pairs)::DOUBLE, sum(beyond)::DOUBLE, median(final), any_value(usual),
               list(source ORDER BY beyond / pairs DESC, source)
        FROM rising GROUP BY target
        HAVING sum(pairs) >= 20 AND sum(beyond) > 0.25 * sum(pairs) ORDER BY sum(beyond) / sum(pairs) DESC, target
        """,
    )
    if not rows:
        return
    target, pairs, beyond, final, usual, _ = rows[0]
    names = listed([f"{facts.name(row[0])} ({percent(row[2], row[1])})" for row in rows[:4]])
    yield Finding(
        "epistemic",
        min(0.9, 0.45 + 0.5 * (beyond / pairs - 0.25) / 0.75),
        f"Explanations towards {facts.name(target)} leave the training cloud",
        f"{percent(beyond, pairs)} of the counterfactuals towards {facts.name(target)} end with more epistemic "
        f"uncertainty than 95 % of the images that the ensemble sees as {facts.name(target)} (median {final:.3g} "
        f"nats, the images' own {usual:.3g}). Targets concerned: {names}.",
        tuple((source, row[0]) for row in rows[:3] for source in row[5][:3]),
        figures={"share": beyond / pairs, "targets": len(rows)},
    )


def _check_reencoding(facts: Facts) -> Iterator[Finding]:
    """Pairs whose counterfactual, once decoded, quantised and encoded again, is no longer seen as its target."""
    agreement, pairs = facts.pairs["reencoded_agreement"], facts.pairs["pairs"]
    lost = (1 - agreement) * pairs
    share = float(np.nansum(lost) / max(1, facts.num_pairs))
    if share < 0.01:
        return
    enough = pairs >= min(5, np.nanmax(pairs))  # a small audit has no class pair of five
    cells = _ranked(np.where(enough & (lost >= 1), 1 - agreement, np.nan))[:6]
    parts = [f"{facts.arrow(*cell)} ({percent(1 - agreement[cell])})" for cell in cells[:3]]
    yield Finding(
        "reencoding",
        min(0.95, 0.35 + 0.6 * min(1.0, share / 0.2)),
        f"{percent(share)} of the counterfactuals do not survive re-encoding",
        f"Decoded, rounded to 8 bits and encoded again, {percent(share)} of the counterfactuals are no longer seen "
        "as their target" + (f"; most often {listed(parts)}." if parts else "."),
        tuple(cells),
        figures={"share": share},
    )


def _check_labels(facts: Facts) -> Iterator[Finding]:
    table = facts.suspicion
    if table is None or not table.num_rows:
        return
    suspicion = table["suspicion"].to_numpy()
    count = int((suspicion > 0.5).sum())
    if not count:
        return
    rows = table.slice(0, 12).to_pylist()
    first = rows[0]
    share = count / table.num_rows
    pairs = list(dict.fromkeys((row["source"], row["label"]) for row in rows if row["source"] != row["label"]))
    yield Finding(
        "labels",
        0.45 + 0.45 * min(1.0, share / 0.01),
        f"{plural(count, 'label')} {'looks' if count == 1 else 'look'} wrong",
        f"{plural(count, 'image')} of {table.num_rows:,} labelled ones ({percent(share)}) "
        f"{'carries' if count == 1 else 'carry'} a label that the explanations contradict. "
        f"First: {first['image_id']} is labelled {facts.name(first['label'])}; the ensemble sees "
        f"{facts.name(first['source'])} and gives the label a probability of {first['label_prob']:.2g}.",
        tuple(pairs[:6]),
        tuple((row["image_id"], row["label"]) for row in rows),
        {"images": count, "share": share},
    )


def _check_predictions(facts: Facts) -> Iterator[Finding]:
    """How often the explained ensemble agrees with the predictions that were handed in, where there are any."""
    columns = {row[0] for row in _rows(facts.con, "DESCRIBE codes")}
    if "prediction" not in columns:
        return
    rows = _rows(
        facts.con,
        "SELECT prediction, count(*), count(*) FILTER (prediction = source) FROM codes "
        "WHERE status = 'ok' AND prediction IS NOT NULL GROUP BY 1 "
        "ORDER BY count(*) FILTER (prediction = source) / count(*), 1",
    )
    total, same = sum(row[1] for row in rows), sum(row[2] for row in rows)
    if not total:
        return
    examples = _rows(
        facts.con,
        "SELECT image_id, prediction, source FROM codes WHERE status = 'ok' AND prediction <> source "
        "ORDER BY probs[source + 1] DESC, image_id LIMIT 12",
    )
    sentence = (
        f"On {same:,} of {plural(total, 'image')} ({percent(same, total)}) the ensemble sees the class that your model "
        "predicts; an explanation speaks for your model only there."
    )
    if same < total:
        worst = [f"{facts.name(row[0])} ({percent(row[2], row[1])})" for row in rows[:3] if row[2] < row[1]]
        sentence += f" Least agreement where it predicts {listed(worst)}."
        labelled, theirs, ours = _rows(
            facts.con,
            "SELECT count(*), count(*) FILTER (prediction = label), count(*) FILTER (source = label) FROM codes "
            "WHERE status = 'ok' AND prediction <> source AND label IS NOT NULL",
        )[0]
        if labelled:
            sentence += (
                f" Of {labelled:,} labelled images where the two differ, the label is your model's class in "
                f"{theirs:,}, the ensemble's in {ours:,}, neither in {labelled - theirs - ours:,}."
            )
    yield Finding(
        "predictions",
        0.3 + 0.6 * min(1.0, (1 - same / total) / 0.1),
        f"The explained ensemble agrees with your model on {percent(same, total)}",
        sentence,
        tuple(dict.fromkeys((source, prediction) for _, prediction, source in examples)),
        tuple((image_id, prediction) for image_id, prediction, _ in examples),
        {"agreement": same / total, "images": total},
    )


def _check_attributes(facts: Facts) -> Iterator[Finding]:
    """Attributes that move though nobody asked: the table ``attributes`` holds their probabilities before and after."""
    tables = {row[0] for row in _rows(facts.con, "SHOW TABLES")}
    if "attributes" not in tables:
        return
    rows = _rows(
        facts.con,
        """
        SELECT attribute, source, target, count(*)::DOUBLE,
               count(*) FILTER ((prob_initial > 0.5) <> (prob_final > 0.5))::DOUBLE, avg(prob_final - prob_initial)
        FROM attributes JOIN counterfactuals USING (image_id, target)
        WHERE converged GROUP BY ALL ORDER BY abs(avg(prob_final - prob_initial)) DESC, attribute, source, target
        """,
    )
    drifting = [row for row in rows if row[3] >= 8 and abs(row[5]) >= 0.1]
    if not drifting:
        return
    attribute, source, target, pairs, flipped, drift = drifting[0]
    names = list(dict.fromkeys(row[0] for row in drifting))
    others = f" Other attributes that drift: {listed(names[1:5])}." if names[1:] else ""
    yield Finding(
        "attributes",
        min(0.95, 0.4 + abs(drift)),
        f"“{attribute}” drifts",
        f"{facts.arrow(source, target)} should leave “{attribute}” alone, but moves its probability by {drift:+.2f} "
        f"on average and flips it in {percent(flipped, pairs)} of {plural(pairs, 'pair')}.{others}",
        tuple(dict.fromkeys((row[1], row[2]) for row in drifting))[:6],
        figures={"drift": drift, "attributes": len(names)},
    )


def _check_shortcuts(facts: Facts) -> Iterator[Finding]:
    if facts.differences is None:
        return
    for found in shortcuts(facts.differences):
        target = found["target"]
        if found["shape"] == "patch":
            top, bottom, left, right = found["box"]
            height, width = facts.differences.target_mean.shape[2:]
            where = _place((top + bottom) / 2 / height, (left + right) / 2 / width)
            sentence = (
                f"Counterfactuals towards {facts.name(target)} write the same mark whatever they start from: "
                f"{percent(found['concentration'])} of their mean change lies in {percent(found['area'])} of the "
                f"picture, {where} (rows {top}–{bottom - 1}, columns {left}–{right - 1}). The model may have learned "
                "a patch instead of the class."
            )
            title = f"Shortcut: a patch {where} stands for {facts.name(target)}"
        else:
            shift = ", ".join(f"{value:+.2f}" for value in found["tint"])
            sentence = (
                f"Counterfactuals towards {facts.name(target)} shift the whole picture by the same amount whatever "
                f"they start from ({'red, green, blue ' if len(found['tint']) == 3 else 'brightness '}{shift} of full "
                f"scale), which is {percent(found['concentration'])} of their mean change. The model may have learned "
                "a tint instead of the class."
            )
            title = f"Shortcut: a tint stands for {facts.name(target)}"
        sources = np.argsort(-np.nan_to_num(facts.pairs["pairs"][:, target]), kind="stable")
        cells = [(int(source), target) for source in sources if facts.pairs["pairs"][source, target] > 0]
        yield Finding("shortcut", 0.95, title, sentence, tuple(cells[:6]), figures=found)


def _place(vertical: float, horizontal: float) -> str:
    """Where in a picture, in words."""
    rows = "top" if vertical < 1 / 3 else "bottom" if vertical > 2 / 3 else ""
    columns = "left" if horizontal < 1 / 3 else "right" if horizontal > 2 / 3 else ""
    if not rows and not columns:
        return "in the middle"
    return f"at the {'-'.join(part for part in (rows, columns) if part)}"


#: Every check, in the order in which equally severe findings are told.
CHECKS: dict[str, Check] = {
    "unread": Check(
        "images and searches that failed, by reason",
        "Every image was read and every search stayed finite.",
        _check_unread,
    ),
    "shortcut": Check(
        "a patch or a tint that every counterfactual towards a class writes",
        "No patch and no tint is written by every counterfactual towards a class.",
        _check_shortcuts,
    ),
    "labels": Check(
        "labels that the explanations contradict", "No label is contradicted by the explanations.", _check_labels
    ),
    "predictions": Check("agreement with the predictions that were handed in", "", _check_predictions),
    "epistemic": Check(
        "targets whose explanations leave the training cloud",
        "No target's explanations leave the training cloud: epistemic uncertainty stays within that of the images.",
        _check_epistemic,
    ),
    "reencoding": Check(
        "counterfactuals that are no longer their target after decoding and encoding",
        "99 % or more of the counterfactuals are still their target after decoding, rounding to 8 bits and encoding.",
        _check_reencoding,
    ),
    "attributes": Check("attributes that move though nobody asked", "", _check_attributes),
    "unconverged": Check("pairs that did not converge", "Every pair converged.", _check_unconverged),
    "asymmetry": Check(
        "class pairs that are easy one way and hard the other",
        "No class pair is much harder one way than the other.",
        _check_asymmetries,
    ),
    "edge": Check(
        "images close to another class",
        f"No image is closer to another class than {percent(EDGE)} of the usual distance.",
        _check_edge,
    ),
    "hardest": Check("the class pairs that ask for the largest and the smallest change", "", _check_extremes),
}


# ------------------------------------------------------------------------------------------------------------------
# Shortcuts: what every counterfactual towards a class writes.


def mean_differences(
    before: np.ndarray, after: np.ndarray, source: np.ndarray, target: np.ndarray, num_classes: int
) -> Differences:
    """What counterfactuals change on average, by class pair and by target.

    Args:
        before: (P, C, H, W) in [0, 1], what each search started from (the reconstruction), a sample of the pairs.
        after: (P, C, H, W) in [0, 1], the counterfactuals.
        source: (P,).
        target: (P,).
        num_classes: K. Maps by class pair are kept up to 32 classes, ``mean`` is empty above.
    """
    change = after - before
    shape = change.shape[1:]
    mean = (
        np.zeros((num_classes, num_classes, *shape), np.float32)
        if num_classes <= 32
        else np.zeros((0, 0, *shape), np.float32)
    )
    count = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(count, (source, target), 1)
    target_mean, target_std = np.zeros((2, num_classes, *shape), np.float32)
    tint_mean, tint_std = np.zeros((2, num_classes, shape[0]), np.float32)
    for wanted in range(num_classes):
        rows = np.flatnonzero(target == wanted)
        if not len(rows):
            continue
        if len(mean):
            for start in np.unique(source[rows]):
                mean[start, wanted] = change[rows[source[rows] == start]].mean(0)
        target_mean[wanted], target_std[wanted] = change[rows].mean(0), change[rows].std(0)
        tint = change[rows].mean((2, 3))
        tint_mean[wanted], tint_std[wanted] = tint.mean(0), tint.std(0)
    return Differences(mean, count, target_mean, target_std, tint_mean, tint_std)


def shortcuts(differences: Differences) -> list[dict[str, Any]]:
    """The targets towards which every counterfactual writes the same small patch or the same tint.

    Returns a dict for each: ``target``, ``shape`` (patch or tint), ``concentration`` (its share of the mean change's
    squared sum), and ``area`` and ``box`` (top, bottom, left, right; half open) of a patch or ``tint`` (C,).
    """
    found = []
    for target in np.flatnonzero(differences.count.sum(0) >= 20):
        mean, std = differences.target_mean[target], differences.target_std[target]
        energy = float((mean**2).sum())
        if energy == 0.0:
            continue
        height, width = mean.shape[1:]
        tint = differences.tint_mean[target]
        steady = np.abs(tint) >= 2 * differences.tint_std[target]
        uniform = float(height * width * (tint**2).sum()) / energy
        if steady[np.argmax(np.abs(tint))] and np.abs(tint).max() >= 0.04 and uniform >= 0.5:
            found.append(
                {"target": int(target), "shape": "tint", "concentration": uniform, "tint": [float(v) for v in tint]}
            )
            continue
        mark = ((np.abs(mean) >= 0.2) & (np.abs(mean) >= 2 * std)).any(0)
        area = float(mark.mean())
        concentration = float((mean**2).sum(0)[mark].sum()) / energy
        if mark.sum() >= 2 and area <= 0.12 and concentration >= 0.4:
            rows, columns = np.flatnonzero(mark.any(1)), np.flatnonzero(mark.any(0))
            box = [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1]
            found.append(
                {"target": int(target), "shape": "patch", "concentration": concentration, "area": area, "box": box}
            )
    return found


# ------------------------------------------------------------------------------------------------------------------
# Suspicious labels.


#: Nearest labelled images that vote on a label, and how many of a class stand for what is ordinary in it.
NEIGHBOURS = 20
ORDINARY = 500
#: At most so many images are asked about, and so many vote: a million images cost as much as sixty thousand.
MAX_ASKED = 20_000
MAX_VOTERS = 60_000


def label_suspicion(codes: Any, counterfactuals: Any) -> pa.Table:
    """Ranks the labelled images of an audit by how likely their label is wrong, the most suspicious first.

    Two witnesses testify: the ensemble's probabilities and the labels of the nearest codes; the product of the two is
    what is believed of an image. Where the label is not the class believed in most, the question is whether the image
    is an ordinary member of that class, as a wrong label would leave it, or an unusual one near the border, as an
    honest mistake is: the share of the class's own images that are believed more to be the label. Over all such images,
    that share is a mixture of a uniform distribution (wrong labels) and one that leans to zero (mistakes), with a
    weight for each class pair, so that labels which are often confused are found too.

    The ensemble should not have been trained on the labels that it judges: explain held-out images, or by folds.

    Args:
        codes: the table ``codes``, as an Arrow table or data set, a frame, or a list of Parquet paths.
        counterfactuals: the table ``counterfactuals``, likewise.

    Returns:
        image_id, label, source, suspicion in [0, 1], label_prob and source_prob, neighbours (share of the vote for the
        label, null where it was not asked), distance and steps of the counterfactual towards the label (null where the
        ensemble sees the label, or the search failed).
    """
    return _suspicion(connect(codes, counterfactuals))


def _suspicion(con: duckdb.DuckDBPyConnection) -> pa.Table:
    table = _arrow(
        con,
        """
        SELECT image_id, label, source, probs, z, distance_z_l1 AS distance, steps
        FROM codes LEFT JOIN (
            SELECT image_id, target AS label, distance_z_l1, steps FROM counterfactuals WHERE converged
        ) USING (image_id, label)
        WHERE status = 'ok' AND label IS NOT NULL ORDER BY image_id
        """,
    )
    label, source = table["label"].to_numpy(), table["source"].to_numpy()
    rows = np.arange(len(label))
    if len(label):
        probs, z = _matrix(table["probs"]).astype(np.float64), _matrix(table["z"])
        belief, voted, ordinary = _beliefs(probs, z, label, source)
        suspicion = _suspicions(belief, label, ordinary)
        label_prob, source_prob = probs[rows, label], probs[rows, source]
    else:
        suspicion, label_prob, source_prob, voted = np.zeros((4, 0))
    ranked = pa.table(
        {
            "image_id": table["image_id"],
            "label": table["label"],
            "source": table["source"],
            "suspicion": suspicion,
            "label_prob": label_prob,
            "source_prob": source_prob,
            "neighbours": pa.array(voted, mask=np.isnan(voted)),
            "distance": table["distance"],
            "steps": table["steps"],
        }
    )
    return ranked.take(pa.array(np.argsort(-suspicion, kind="stable")))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of one length as (N, ...); DuckDB hands on what it reads from Parquet as lists of any length."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _beliefs(
    probs: np.ndarray, z: np.ndarray, label: np.ndarray, source: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (N, K) by both witnesses; the vote (N,) for each label, NaN where nobody was asked; who compares.

    Asked about are the images whose label the ensemble doubts, and of each class ORDINARY others to compare with.
    """
    rows, num_classes = np.arange(len(label)), probs.shape[1]
    # Not in the order of the ids, which may follow the classes.
    lot = np.random.default_rng(0).permutation(len(label))
    doubt = np.where(label == source, probs[rows, label], probs[rows, label] - 1)
    turn = np.empty(len(label), np.int64)
    order = lot[np.argsort(label[lot], kind="stable")]
    starts = np.searchsorted(label[order], np.arange(num_classes))
    turn[order] = rows - starts[label[order]]
    few = turn < max(NEIGHBOURS, min(ORDINARY, MAX_ASKED // (2 * num_classes)))
    asked = np.flatnonzero(few)
    rest = np.flatnonzero(~few & (doubt < 0.95))
    rest = rest[np.argsort(doubt[rest], kind="stable")][: max(0, MAX_ASKED - len(asked))]
    asked = np.sort(np.concatenate([asked, rest]))
    voters = np.sort(lot[:MAX_VOTERS])
    vote = _votes(z, label, asked, voters, num_classes)
    belief = probs.copy()
    belief[asked] *= vote + 0.5 / NEIGHBOURS
    voted = np.full(len(label), np.nan)
    voted[asked] = vote[np.arange(len(asked)), label[asked]]
    return belief / belief.sum(1, keepdims=True), voted, few


def _votes(z: np.ndarray, label: np.ndarray, asked: np.ndarray, voters: np.ndarray, num_classes: int) -> np.ndarray:
    """Shares (B, K) of the labels of the voters nearest to each asked image but itself; nearer ones weigh more."""
    count = min(NEIGHBOURS, len(voters) - 1)
    votes = np.zeros((len(asked), num_classes))
    if count < 1:
        return votes
    others = z[voters]
    norms = (others**2).sum(1)
    block = max(1, 8_000_000 // len(voters))
    for start in range(0, len(asked), block):
        mine = asked[start : start + block]
        squared = norms - 2 * (z[mine] @ others.T)
        place = np.searchsorted(voters, mine).clip(max=len(voters) - 1)
        known = voters[place] == mine
        squared[np.flatnonzero(known), place[known]] = np.inf
        nearest = np.argpartition(squared, count - 1, 1)[:, :count]
        far = np.take_along_axis(squared, nearest, 1) + (z[mine] ** 2).sum(1, keepdims=True)
        weight = np.exp(-far.clip(0) / np.maximum(np.median(far.clip(0), 1, keepdims=True), 1e-12))
        lines = np.repeat(np.arange(start, start + len(mine)), count)
        np.add.at(votes, (lines, label[voters[nearest]].ravel()), weight.ravel())
    return votes / np.maximum(votes.sum(1, keepdims=True), 1e-300)


def _suspicions(belief: np.ndarray, label: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """How likely each label is wrong (N,), from what is believed of each image (N, K); ``compared`` (N,): by whom."""
    rows, num_classes = np.arange(len(label)), belief.shape[1]
    log = np.log(belief + 1e-12)
    seen = log.argmax(1)
    rival = log.copy()
    rival[rows, label] = -np.inf
    against = rival.max(1) - log[rows, label]
    evidence = np.full(len(label), -12.0)
    doubted = np.flatnonzero(seen != label)
    if len(doubted):
        ordinary = np.array([0.5] * len(doubted))
        for pair in np.unique(seen[doubted] * num_classes + label[doubted]):
            other, given = divmod(int(pair), num_classes)
            mine = np.flatnonzero((seen[doubted] == other) & (label[doubted] == given))
            own = np.sort(-log[compared & (seen == other) & (label == other), given])
            below = np.searchsorted(own, -log[doubted[mine], given])
            ordinary[mine] = (below + 0.5) / (len(own) + 1)
        wrong = _mixture(ordinary, seen[doubted] * num_classes + label[doubted], num_classes**2)
        evidence[doubted] = np.log(wrong + 1e-5) - np.log(1 - wrong + 1e-5)
        # Of two equally ordinary images, the one whose label is believed less.
        evidence += 0.25 * (against - np.median(against[doubted]))
    return 1 / (1 + np.exp(-evidence))


def _mixture(ordinary: np.ndarray, pair: np.ndarray, num_pairs: int) -> np.ndarray:
    """Probabilities (B,) that values in (0, 1) are drawn uniformly rather than from a Beta(a, 4), by EM.

    The uniform share is each class pair's own, drawn towards that of all, at least one in twenty, as by five more
    images; a is fitted.
    """
    low, high = np.log(ordinary), np.log1p(-ordinary)
    counts = np.bincount(pair, minlength=num_pairs)
    share = np.full(num_pairs, 0.3)
    a, wrong = 0.3, np.full(len(ordinary), 0.3)
    for _ in range(100):
        # Beta(a, 4): its density vanishes at one, so that what is most ordinary is never a mistake.
        norm = math.log(a * (a + 1) * (a + 2) * (a + 3) / 6)
        mistake = np.exp(norm + (a - 1) * low + 3 * high)
        wrong = share[pair] / (share[pair] + (1 - share[pair]) * mistake)
        share = (np.bincount(pair, wrong, minlength=num_pairs) + 5 * max(wrong.mean(), 0.05)) / (counts + 5)
        weight = float((1 - wrong).sum())
        if weight < 1e-9:
            break
        # E[log u] = digamma(a) - digamma(a + 4) = -sum of 1 / (a + i), solved for a by halving.
        mean = float(((1 - wrong) * low).sum()) / weight
        smallest, largest = 1e-3, 1.0
        for _ in range(30):
            a = (smallest + largest) / 2
            if -sum(1 / (a + i) for i in range(4)) < mean:
                smallest = a
            else:
                largest = a
    return wrong
