"""The first screen of the page: what was explained, what is missing, the key figures, the findings with pictures."""

from typing import Any

from clarity import storage
from clarity.audit.queries import statement
from clarity.findings.finding import Finding
from clarity.findings.statistics import share_interval
from clarity.report.embed import Embedded
from clarity.report.sample import Sample
from clarity.report.text import interval as bounds
from clarity.report.text import number, percent, plural, probability
from clarity.report.tiles import Tiles
from clarity.report.view import View

#: Findings that are about images, so that the page links these and not class pairs.
ABOUT_IMAGES = ("labels", "predictions", "confirmed", "fooled")


def dataset_name(dataset: dict[str, Any]) -> str:
    """The source and the split; for a folder or Parquet files the name of the directory or file."""
    source = dataset["source"]
    name = storage.name(dataset["data"]).rsplit(".", 1)[0] if source in ("folder", "parquet") else source
    return f"{name or 'images'}, {dataset['split']}"


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
    return view.records(statement("page_totals"))[0]


def key_figures(total: dict[str, Any], num_images: int, explained: str) -> dict[str, tuple[str, str]]:
    """The figures of the first screen: by name, the value, and a line that explains it."""
    pairs, failed, broken, after = (total[name] for name in ("pairs", "failed", "nonfinite", "epistemic_final"))
    each, lost, others = pairs / max(num_images, 1), pairs - total["converged"], total["labelled"] - total["agree"]

    def share_of_pairs(name: str, of: str, note: str) -> tuple[str, str]:
        part, whole = total[name], total[of]
        return percent(part, whole), f"{interval(part / each, whole / each)}; {note}" if whole else "no pairs yet"

    figures = {}
    # The findings count the pairs that converged alone.
    among = ", converged or not" if lost else ""
    if total["judged"]:
        note = f"by a held-out network{among}"
        figures["Judge sees the target"] = share_of_pairs("judged_as_target", "judged", note)
    if total["checked"]:
        note = f"passed every check, {total['went_on']:,} after a further search"
        figures["Confirmed"] = share_of_pairs("confirmed", "checked", note)
    survived = f"still seen as the target{among}; median probability {probability(total['reencoded'])}"
    distance = f"median latent distance {number(total['median_distance'])}{'; of those that converged' if lost else ''}"
    before = f"median, nats; before the search {number(total['epistemic_initial'])}"
    reached = f"{lost:,} did not reach" if lost else "all reached"
    unread = f"{failed:,} could not be used" if failed else "all were used"
    figures |= {
        "Images": (f"{total['images'] - failed:,}", unread),
        "Counterfactuals": (f"{pairs:,}", f"{broken:,} not finite" if broken else "all finite"),
        "Converged": share_of_pairs("converged", "pairs", f"{reached} the requested probability"),
        "Survived re-encoding": share_of_pairs("reencoded_as_target", "pairs", survived),
        "Median steps": (number(total["median_steps"]), distance if total["converged"] else "nothing converged"),
        "Ensemble's disagreement": (number(after), before if after else "a single classifier has none"),
    }
    if total["labelled"]:
        note = f"{interval(total['agree'], total['labelled'])}; by {explained}, {others:,} differently"
        figures["Classified as labelled"] = percent(total["agree"], total["labelled"]), note
    return figures


def evidence(
    finding: Finding, view: View, embedded: Embedded, images: dict[str, Any], sample: Sample, tiles: Tiles
) -> list[tuple[list[dict[str, Any]], str]]:
    """Pictures beside a finding with a caption: its examples, else an example of each of its class pairs."""
    names, shown = view.class_names, []
    if finding.kind in ("shortcut", "region") and view.facts.differences is not None:
        target = finding.figures["target"]
        caption = f"mean change towards {names[target]}"
        tile = tiles.add_change(view.facts.differences.target_mean[target])
        shown.append(([{"tile": tile, "alt": caption, "size": tiles.width_at(84), "signed": True}], caption))
    examples = list(finding.examples[:3]) or [
        (sample.examples[pair][0][0], pair[1]) for pair in finding.pairs[:3] if pair in sample.examples
    ]
    for image_id, target in examples:
        image = images[image_id]
        source = "?" if image["source"] is None else names[image["source"]]
        pictures = [(image["x"], f"image {image_id}")]
        caption = f"{image_id}: {source}"
        if (image_id, target) in embedded.tiles:
            pictures.append((embedded.tiles[image_id, target], f"its counterfactual, {names[target]}"))
            caption += f" → {names[target]}"
        if finding.kind == "labels":
            caption = f"{image_id}: labelled {names[target]}, classified as {source}"
        elif image["label_name"] is not None:
            caption += f", labelled {image['label_name']}"
        if any(tile >= 0 for tile, _ in pictures):
            drawn = [{"tile": tile, "alt": alt, "size": tiles.width_at(46), "signed": False} for tile, alt in pictures]
            shown.append((drawn, caption))
    return shown
