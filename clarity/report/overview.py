"""The first screen of the page: what was explained, what is missing, the key figures, the findings with pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from clarity import storage
from clarity.findings.finding import Finding
from clarity.findings.statistics import share_interval
from clarity.report.embed import Embedded, text_of
from clarity.report.sample import Sample
from clarity.report.text import interval as bounds
from clarity.report.text import listed, percent, plural, probability
from clarity.report.tiles import Tiles
from clarity.report.view import View

#: Findings that are about images, so that the page links these and not class pairs.
ABOUT_IMAGES = ("labels", "predictions", "confirmed", "fooled")


def dataset_name(dataset: dict[str, Any]) -> str:
    """The source and the split; for a folder or Parquet files the name of the directory or file."""
    source, data, split = (str(dataset.get(name) or "") for name in ("source", "data", "split"))
    name = storage.name(data).rsplit(".", 1)[0] if source in ("folder", "parquet") and data else source
    return f"{name or 'images'}, {split}" if split else name or "images"


def headline(views: Sequence[View]) -> str:
    """The title of the page."""
    what = dataset_name(views[0].audit.plan.dataset)
    if len(views) > 1:
        return f"{what}: {listed([view.name for view in views])}"
    return f"{what}: what would each image need to be another class?"


def problem(view: View, named: bool) -> dict[str, Any] | None:
    """What is missing from an audit that is not complete; with its name where several are on the page."""
    plan, commits = view.audit.plan, view.audit.commits
    if view.audit.complete:
        return None
    pending = [shard for shard in range(len(plan.shards)) if shard not in commits]
    images = sum(plan.shards[shard]["stop"] - plan.shards[shard]["start"] for shard in pending)
    failures: list[str] = []
    for shard in pending:
        path = storage.join(view.audit.uri, "_failures", f"shard-{shard:05d}.json")
        if len(failures) < 3 and storage.exists(path):
            failures.append(f"shard {shard}: {storage.read_json(path).get('error', 'failed')}")
    text = (
        f"{len(pending):,} of {plural(len(plan.shards), 'shard')} are not committed, so "
        f"{plural(images, 'image')} of {plan.num_images:,} are absent from everything below. "
    )
    text += f"What failed: {'; '.join(failures)}. " if failures else "The run was interrupted or is still running. "
    text += "Repeat jobs/explain_all.py with the same flags to finish it; committed shards are not computed again."
    some = ", ".join(f"shard {shard}" for shard in pending[:8])
    return {
        "title": f"{view.name + ': this' if named else 'This'} audit is {'failed' if failures else 'unfinished'}.",
        "text": text,
        "missing": some + (f" and {len(pending) - 8:,} more" if len(pending) > 8 else ""),
    }


def interval(part: float, whole: float) -> str:
    """The 95 % interval of a share."""
    return bounds(*share_interval(part, whole))


def totals(view: View) -> dict[str, Any]:
    """Counts and medians over all rows of the audit."""
    (row,) = view.table(
        """
        SELECT * FROM (
            SELECT count(*) AS images, count(*) FILTER (status <> 'ok') AS failed,
                   count(label) FILTER (status = 'ok') AS labelled,
                   count(*) FILTER (status = 'ok' AND label = source) AS agree
            FROM codes
        ), (
            SELECT pairs, converged, nonfinite, reencoded_as_target AS survived, median_steps AS steps,
                   median_distance AS distance, epistemic_initial, epistemic_final
            FROM class_pair_figures WHERE source IS NULL
        ), (
            SELECT median(reencoded_target_prob) AS reencoded,
                   count(confirmed) AS checked, count(*) FILTER (confirmed) AS confirmed,
                   count(*) FILTER (rungs > 0) AS went_on,
                   count(judge_class) AS judged, count(*) FILTER (judge_class = target) AS judged_as_target
            FROM counterfactuals
        )
        """
    ).to_pylist()
    return row


def key_figures(total: dict[str, Any], num_images: int, explained: str) -> list[dict[str, str]]:
    """The figures of the first screen, each with a line that explains it.

    Shares of pairs have intervals as if the pairs of an image were one observation; ``num_images`` have pairs.
    """
    each = total["pairs"] / max(num_images, 1)
    failed, broken, lost = total["failed"], total["nonfinite"], total["pairs"] - total["converged"]
    others, after = total["labelled"] - total["agree"], total["epistemic_final"]
    distance = f"median latent distance {text_of(total['distance'])}" if total["converged"] else "nothing converged"
    before = f"median after; before {text_of(total['epistemic_initial'])}" if after else "a single classifier has none"
    figures = []
    if total["judged"]:
        agree, judged = total["judged_as_target"], total["judged"]
        note = f"{interval(agree / each, judged / each)}; by a held-out network"
        figures.append(("Judge sees the target", percent(agree, judged), note))
    if total["checked"]:
        note = (
            f"{interval(total['confirmed'] / each, total['checked'] / each)}; passed every check, {total['went_on']:,} "
        )
        note += "after a further search"
        figures.append(("Confirmed", percent(total["confirmed"], total["checked"]), note))
    figures += [
        ("Images", f"{total['images'] - failed:,}", f"{failed:,} could not be read" if failed else "all were read"),
        ("Counterfactuals", f"{total['pairs']:,}", f"{broken:,} not finite" if broken else "all finite"),
        (
            "Strict validity",
            percent(total["converged"], total["pairs"]),
            f"{interval(total['converged'] / each, num_images)}; {f'{lost:,} did not' if lost else 'all converged'}"
            if total["pairs"]
            else "no pairs yet",
        ),
        (
            "Re-encoded agreement",
            percent(total["survived"], total["pairs"]),
            f"{interval(total['survived'] / each, num_images)}; still the target once encoded again, with a median "
            f"probability of {text_of(total['reencoded'], probability)}"
            if total["pairs"]
            else "no pairs yet",
        ),
        ("Median steps", text_of(total["steps"]), distance),
        ("Epistemic, nats", text_of(after), before),
    ]
    if total["labelled"]:
        differ = f"{interval(total['agree'], total['labelled'])}; {others:,} {'is' if others == 1 else 'are'} not, by "
        differ += explained
        figures.append(("Classified as labelled", percent(total["agree"], total["labelled"]), differ))
    return [{"name": name, "value": value, "sub": sub} for name, value, sub in figures]


def plan_text(view: View) -> str:
    """The plan as JSON, without its long table of shards."""
    plan = view.audit.plan.to_json()
    plan["shards"] = f"{len(view.audit.plan.shards)} shards, {len(view.audit.commits)} committed"
    return json.dumps(plan, indent=2, ensure_ascii=False)


def told_findings(
    views: Sequence[View], embedded: Sequence[Embedded], images: dict[str, Any], sample: Sample, tiles: Tiles
) -> list[dict[str, Any]]:
    """The findings of all audits, most severe first, with pictures and links."""
    ranked = [(finding, i) for i, view in enumerate(views) for finding in view.findings]
    ranked.sort(key=lambda entry: -entry[0].severity)
    names = views[0].class_names
    return [
        {
            "kind": finding.kind,
            "level": finding.level,
            "title": finding.title,
            # A class pair stays on one line.
            "sentence": finding.sentence.replace(" → ", "\u00a0→\u00a0"),
            "basis": finding.evidence.replace(" → ", "\u00a0→\u00a0"),
            "audit": views[i].name,
            "evidence": evidence(finding, views[i], embedded[i], images, sample, tiles),
            "pairs": [
                {"source": s, "target": t, "text": f"{names[s]} → {names[t]}"}
                for s, t in (() if finding.kind == "labels" else finding.pairs[:6])
            ],
            "images": [image_id for image_id, _ in finding.examples[:6]] if finding.kind in ABOUT_IMAGES else [],
        }
        for finding, i in ranked
    ]


def evidence(
    finding: Finding, view: View, embedded: Embedded, images: dict[str, Any], sample: Sample, tiles: Tiles
) -> list[dict[str, Any]]:
    """Pictures beside a finding: its examples, else an example of each of its class pairs."""
    names, shown = view.class_names, []
    if finding.kind in ("shortcut", "region") and view.facts.differences is not None:
        target = finding.figures["target"]
        caption = f"mean change towards {names[target]}"
        tile = tiles.add_change(view.facts.differences.target_mean[target])
        picture = {"tile": tile, "alt": caption, "size": tiles.width_at(84), "signed": True}
        shown.append({"pictures": [picture], "caption": caption})
    examples = [example for example in finding.examples if example[1] >= 0][:4] or [
        (sample.examples[pair][0][0], pair[1]) for pair in finding.pairs[:3] if pair in sample.examples
    ]
    for image_id, target in examples:
        if (image := images.get(image_id)) is None:
            continue
        source = "?" if image["source"] is None else names[image["source"]]
        pictures = [(image["x"], f"image {image_id}")]
        caption = f"{image_id}: {source}"
        if (image_id, target) in embedded.tiles:
            pictures.append((embedded.tiles[image_id, target], f"its counterfactual, {names[target]}"))
            caption += f" → {names[target]}"
        if finding.kind == "labels":
            caption = f"{image_id}: labelled {names[target]}, classified as {source}"
        if any(tile >= 0 for tile, _ in pictures):
            size = tiles.width_at(46)
            drawn = [{"tile": tile, "alt": alt, "size": size, "signed": False} for tile, alt in pictures]
            shown.append({"pictures": drawn, "caption": caption})
    return shown
