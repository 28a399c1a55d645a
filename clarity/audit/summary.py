"""Figures of an audit, and their text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads

from clarity import storage
from clarity.audit.plan import Plan


def summarise(
    plan: Plan, commits: Mapping[int, Mapping[str, Any]], codes: pads.Dataset, counterfactuals: pads.Dataset
) -> dict[str, Any]:
    """Figures of an audit from its tables, read in one pass: counts, errors by reason, steps, slowest class pairs."""
    classes, most = len(plan.class_names), int(plan.config["max_steps"])
    histogram: np.ndarray = np.zeros((classes * classes, most + 1), np.int64)
    counts: Counter[str] = Counter()
    columns = ["source", "target", "steps", "status", "converged", "reencoded_class"]
    for batch in counterfactuals.to_batches(columns=columns):
        source, target, steps = (batch[name].to_numpy(zero_copy_only=False) for name in columns[:3])
        np.add.at(histogram, (source * classes + target, steps), 1)
        counts["pairs"] += len(batch)
        counts["converged"] += pc.sum(batch["converged"]).as_py() or 0
        counts["nonfinite"] += pc.sum(pc.not_equal(batch["status"], "ok")).as_py() or 0
        counts["reencoded"] += pc.sum(pc.equal(batch["reencoded_class"], batch["target"])).as_py() or 0
    reasons: Counter[str] = Counter()
    unknown = 0
    columns = ["status", "error", "label", "label_name", "source", "prediction"]
    predicted = "prediction" in codes.schema.names
    for batch in codes.to_batches(columns=columns if predicted else columns[:4]):
        counts["images"] += len(batch)
        reasons.update(reason for reason in batch["error"].to_pylist() if reason is not None)
        unknown += pc.sum(pc.and_(pc.is_null(batch["label"]), pc.is_valid(batch["label_name"]))).as_py() or 0
        if predicted:
            same = pc.equal(batch["prediction"], batch["source"])  # null where either is
            counts["predicted"] += len(same) - same.null_count
            counts["as_predicted"] += pc.sum(same).as_py() or 0
    seen = np.flatnonzero(histogram.sum(1))
    slowest = sorted(seen, key=lambda pair: -_mean_steps(histogram[pair]))[:5]
    total = histogram.sum(0)
    return {
        "images": counts["images"],
        "errors": dict(reasons.most_common(20)),
        "unread": sum(reasons.values()),
        "unknown_labels": unknown,
        "left_out": plan.dataset.get("left_out", {}),
        "predictions": {"images": counts["predicted"], "agree": counts["as_predicted"]} if predicted else None,
        "pairs": counts["pairs"],
        "converged": counts["converged"],
        "nonfinite": counts["nonfinite"],
        "reencoded_as_target": counts["reencoded"],
        "median_steps": int(np.searchsorted(total.cumsum(), total.sum() / 2)) if counts["pairs"] else None,
        "mean_steps": round(_mean_steps(total), 2) if counts["pairs"] else None,
        "slowest_class_pairs": [
            {
                "source": plan.class_names[pair // classes],
                "target": plan.class_names[pair % classes],
                "pairs": int(histogram[pair].sum()),
                "mean_steps": round(_mean_steps(histogram[pair]), 1),
            }
            for pair in slowest
        ],
        "engines": dict(Counter(commit["engine"] for commit in commits.values() if commit.get("engine"))),
        "seconds_by_stage": _seconds(commits.values()),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """A summary, for people."""

    def share(count: int) -> str:
        total = max(summary["pairs"], 1)
        percent = 100 * count / total
        return f"{count} ({percent if count == total else min(percent, 99.99):.2f} %)"  # all only where it is all

    slow = ", ".join(
        f"{pair['source']}->{pair['target']} {pair['mean_steps']:.0f}" for pair in summary["slowest_class_pairs"]
    )
    engines = ", ".join(f"{engine} ({count} shards)" for engine, count in summary["engines"].items())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary["seconds_by_stage"].items())
    predictions = []
    if given := summary.get("predictions"):
        agree = 100 * given["agree"] / max(given["images"], 1)
        predictions = [f"predicted  {given['images']}; the ensemble sees the same in {given['agree']} ({agree:.2f} %)"]
    lines = [
        f"images     {summary['images']}, {summary['unread']} unreadable, {summary['unknown_labels']} of unknown label",
        *(f"           {count} x {reason}" for reason, count in summary["errors"].items()),
        *(f"left out   {count} {reason}" for reason, count in summary.get("left_out", {}).items()),
        *predictions,
        f"pairs      {summary['pairs']}, {summary['nonfinite']} not finite",
        f"converged  {share(summary['converged'])}",
        f"re-encoded {share(summary['reencoded_as_target'])} as the target",
        f"steps      median {summary['median_steps']}, mean {summary['mean_steps']}; most: {slow}",
        f"speed      {summary['pairs_per_second']} pairs/s over {summary['seconds']} s",
        f"stages     {stages} (seconds, summed over the processes)",
        f"engine     {engines or 'none'}",
        f"verified   sums, keys, order, contents; {summary['redecoded']} pairs decoded again",
        *(f"PROBLEM    {problem}" for problem in summary["problems"]),
    ]
    return "\n".join(lines)


def describe_plan(plan: Plan, uri: str, measured: Mapping[str, Any], num_actors: int) -> str:
    """What a run would do, for people, from what ``explain.probe`` measured."""
    seconds = plan.num_images * measured["seconds_per_image"] / num_actors
    size = plan.num_images * measured["bytes_per_image"]
    lines = [
        f"images     {plan.num_images}",
        f"pairs      {plan.num_images * plan.pairs_per_image} at most",
        f"shards     {len(plan.shards)} of {plan.shards[0]['stop']} images",
        f"files      {len(plan.shards) * (3 + bool(plan.trace))}, {size / 1e6:.1f} MB in all",
        f"time       {seconds:.0f} s, at {measured['pairs_per_second']:.0f} pairs/s an actor ({measured['engine']})",
        f"audit      {storage.display(uri)}",
    ]
    return "\n".join(lines)


def _mean_steps(histogram: np.ndarray) -> float:
    return float((histogram * np.arange(len(histogram))).sum() / histogram.sum())


def _seconds(commits: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for commit in commits:
        seconds.update(commit.get("seconds", {}))
    return {stage: round(value, 3) for stage, value in seconds.items()}
