"""The figures of an audit, and the text of summaries and plans for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as pads

from clarity import storage
from clarity.audit.plan import Plan
from clarity.audit.queries import connect, has_predictions, statement
from clarity.report.text import counted, percent, plural

if TYPE_CHECKING:
    import duckdb


def summarise(
    plan: Plan, commits: Mapping[int, Mapping[str, Any]], codes: pads.Dataset, counterfactuals: pads.Dataset
) -> dict[str, Any]:
    """Counts, errors by reason, steps, slowest class pairs, engines and seconds by stage."""
    con = connect(codes, counterfactuals)

    def rows(name: str) -> list[dict[str, Any]]:
        return con.sql(statement(name)).to_arrow_table().to_pylist()

    seconds: Counter[str] = Counter()
    for commit in commits.values():
        seconds.update(commit.get("seconds", {}))
    (pairs,), errors = rows("summary_pairs"), rows("summary_errors")
    return {
        "warnings": warnings(plan, commits, con),
        "committed": len(commits),
        "planned": len(plan.shards),
        **rows("summary_images")[0],
        "errors": {row["error"]: row["images"] for row in errors},
        "first_unread": {row["error"]: row["first"] for row in errors},
        "left_out": plan.dataset.get("left_out", {}),
        "notes": plan.dataset.get("notes", []),
        "predictions": rows("summary_predictions")[0] if has_predictions(con) else None,
        **pairs,
        "by_class": "min_target_probs" in plan.checks,
        "reencoded_target_prob": rows("summary_quantiles")[0] if pairs["pairs"] else None,
        "checks": rows("summary_checks")[0] if plan.requires_checks else None,
        "slowest_class_pairs": rows("summary_slowest"),
        "engines": dict(Counter(commit["engine"] for commit in commits.values() if commit.get("engine"))),
        "seconds_by_stage": {stage: round(value, 3) for stage, value in seconds.items()},
    }


def warnings(plan: Plan, commits: Mapping[int, Mapping[str, Any]], con: duckdb.DuckDBPyConnection) -> list[str]:
    """What makes the figures of an audit doubtful, the gravest first: a sentence each."""
    found = []
    if labelled := foreign_labels(con):
        found.append(describe_foreign_labels(labelled, plan))
    if clipped := sum(commit.get("clipped", 0) for commit in commits.values()):
        found.append(
            f"{plural(clipped, 'image holds', 'images hold')} values above the range of the images that the model was "
            "trained on."
        )
    return found


def foreign_labels(con: duckdb.DuckDBPyConnection) -> int:
    """How many labels the data has, if none of them is a class of the model; else 0."""
    labelled, known = con.execute(statement("summary_labels")).fetchall()[0]
    return 0 if known else int(labelled)


def describe_foreign_labels(labelled: int, plan: Plan) -> str:
    """The warning of data with so many labels, none of which is a class of the plan's model."""
    names = ", ".join(plan.class_names[:5]) + (" ..." if len(plan.class_names) > 5 else "")
    return (
        f"None of the {labelled} labels of the data is a class of the model ({names}): it was trained on "
        "another data set."
    )


def describe(summary: Mapping[str, Any]) -> str:
    """A summary as text."""
    model = summary.get("verdict", {"sentence": "not checked", "reasons": []})
    lines = [
        *(f"WARNING    {warning}" for warning in summary.get("warnings", [])),
        f"model      {model['sentence']}",
        *(f"           {reason}" for reason in model["reasons"][1:]),
        *(describe_rows(summary) if summary.get("committed", 1) else []),
        *(f"PROBLEM    {problem}" for problem in summary["problems"]),
    ]
    if summary.get("damaged"):
        lines.append(f"TAKEN BACK {counted(summary['damaged'], 'damaged shards')}; the same command repeats the work")
    if summary.get("committed", 0) < summary.get("planned", 0):
        lines.append(
            f"INCOMPLETE {summary['committed']} of {counted(summary['planned'], 'shards')}; the same command resumes"
        )
    return "\n".join(lines)


def describe_rows(summary: Mapping[str, Any]) -> list[str]:
    """The lines on images and pairs, of which there are some."""
    slow = [f"{pair['source']}->{pair['target']} {pair['mean_steps']:.0f}" for pair in summary["slowest_class_pairs"]]
    engines = [f"{engine} ({counted(count, 'shards')})" for engine, count in summary["engines"].items()]
    stages = [f"{stage} {seconds:.1f}" for stage, seconds in summary["seconds_by_stage"].items()]
    lines = [
        f"images     {summary['images']}, {summary['unread']} unusable, {summary['unknown_labels']} of unknown label",
        *(f"           {reason}" for reason in reasons_unread(summary)),
        *about_data(summary),
    ]
    if given := summary.get("predictions"):
        agree = share(given["agree"], given["images"])
        lines.append(f"predicted  {given['images']}; the ensemble predicts the same for {agree}")
    lines += [
        f"pairs      {summary['pairs']}, {summary['nonfinite']} not finite",
        f"converged  {share(summary['converged'], summary['pairs'])}",
        *(f"           {line}" for line in unreached(summary).splitlines()),
        f"re-encoded {share(summary['reencoded_as_target'], summary['pairs'])} as the target",
    ]
    if given := summary.get("reencoded_target_prob"):
        lines[-1] += f"; its probability {given['median']:.3f} in the median, {given['p5']:.3f} at the 5th percentile"
    if judged := summary.get("judged"):
        lines.append(f"judge      sees the target in {share(summary['judged_as_target'], judged)}")
        if judge := summary.get("judge"):
            real, again = percent(judge["accuracy"]), percent(judge["accuracy_on_reconstructions"])
            lines[-1] += f"; right on {real} of held-out images, {again} of their reconstructions"
    if given := summary.get("checks"):
        rungs = f"{given['mean_rungs']:.2f} further searches a pair, {given['most_rungs']} at most"
        lines.append(f"confirmed  {share(given['confirmed'], given['pairs'])}; {rungs}")
    return [
        *lines,
        f"steps      median {summary['median_steps']}, mean {summary['mean_steps']}; most: {', '.join(slow)}",
        f"speed      {summary['pairs_per_second']} pairs/s over {summary['seconds']} s, start-up included",
        f"stages     {', '.join(stages)} (seconds, summed over the processes)",
        f"engine     {', '.join(engines) or 'none'}",
        f"verified   checksums, keys, order, contents; {counted(summary['redecoded'], 'pairs')} decoded again",
    ]


def describe_extent(plan: Plan) -> str:
    """How many images an audit is to explain, and of which split."""
    split = plan.dataset["split"]
    return f"{counted(plan.num_images, 'images')}{'' if split == 'all' else f' of split {split}'}"


def about_data(found: Mapping[str, Any]) -> list[str]:
    """What a listing left out and how it was read, as lines; of a summary, or of a plan's data set."""
    return [
        *(f"left out   {counted(count, reason)}" for reason, count in found.get("left_out", {}).items()),
        *(f"note       {note}" for note in found.get("notes", [])),
    ]


def reasons_unread(summary: Mapping[str, Any]) -> list[str]:
    """Why images were not read, as text: how many for each reason, and which is the first."""
    first, reasons = summary.get("first_unread", {}), []
    for reason, count in summary["errors"].items():
        example = f" ({first[reason]}{' and others' if count > 1 else ''})" if reason in first else ""
        reasons.append(f"{count} x {reason}{example}")
    return reasons


def require_readable(summary: Mapping[str, Any]) -> None:
    """Raise ValueError if none of an audit's images could be read."""
    if summary["images"] and summary["unread"] == summary["images"]:
        reasons = "; ".join(reasons_unread(summary)[:3])
        raise ValueError(f"data: expected images, got {summary['images']} of which none could be read: {reasons}")


def unreached(summary: Mapping[str, Any]) -> str:
    """Where more than a tenth of the searches did not converge, a line with the threshold to try; else no text."""
    reach, converged, pairs = (summary.get(name) for name in ("target_prob_p5", "converged", "pairs"))
    if not pairs or reach is None or converged >= 0.9 * pairs:
        return ""
    told = f"{share(pairs - converged, pairs)} of the searches did not converge; 95 % of the pairs reach {reach:.3f}"
    # Below one half another class may be as likely: no threshold to recommend.
    threshold = [f"{reach - 0.005:.2f}"] if reach > 0.505 else []
    remedies = ", or ".join(threshold if summary.get("by_class") else ["auto", *threshold])
    return f"{told}: try --min-target-prob {remedies}" if remedies else told


def share(count: int, total: int) -> str:
    """A count and its percentage, which is 100 only where it is all."""
    percent = 100 * count / max(total, 1)
    return f"{count} ({percent if count == total else min(percent, 99.99):.2f} %)"


def describe_plan(plan: Plan, uri: str, measured: Mapping[str, Any], num_actors: int) -> str:
    """What a run would do as text, from what ``probe`` measured."""
    seconds = plan.num_images * measured["seconds_per_image"] / max(1, num_actors)
    size = plan.num_images * measured["bytes_per_image"]
    lines = [
        f"explains   {describe_extent(plan)}",
        *about_data(plan.dataset),
        f"pairs      {plan.num_images * plan.pairs_per_image} at most",
        f"shards     {len(plan.shards)} of {counted(plan.shards[0]['stop'], 'images')}",
        f"files      {len(plan.shards) * (3 + bool(plan.trace))}, {size / 1e6:.1f} MB in all",
        f"time       {seconds:.0f} s, at {measured['pairs_per_second']:.0f} pairs/s an actor ({measured['engine']})",
        f"audit      {storage.display(uri)}",
    ]
    return "\n".join(lines)
