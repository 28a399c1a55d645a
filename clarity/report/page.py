"""The audit report: one self-contained HTML page from one audit or several side by side."""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import markupsafe

from clarity import __version__, storage
from clarity.audit.queries import load_queries, load_views
from clarity.audit.summary import warnings
from clarity.findings.finding import Finding
from clarity.findings.registry import CHECKS
from clarity.findings.verdict import Verdict
from clarity.report import overview, tables
from clarity.report.embed import FIELDS, Embedded, embed_audit, embed_images
from clarity.report.maps import pair_maps
from clarity.report.sample import MAX_EXAMPLES, Sample, choose
from clarity.report.text import counted, listed, percent, plural, probability, short_names, thresholds
from clarity.report.tiles import Tiles
from clarity.report.view import View, open_views


@dataclass(frozen=True)
class Report:
    """The written page: its URI, size in bytes, number of pictures, seconds; verdicts and findings on it."""

    uri: str
    size: int
    tiles: int
    seconds: float
    verdicts: list[Verdict]
    findings: list[Finding]
    complete: bool


def write_report(
    audits: Sequence[str],
    out: str | None = None,
    *,
    images: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    max_tiles: int = 10_000,
) -> Report:
    """Writes the page of one audit, or of several side by side, whose class names and image shape are the same.

    Args:
        audits: their URIs. The first one's sample is shown of all.
        out: URI of the page; report.html in the first audit by default.
        images: ids of images to embed besides the sample, each with its counterfactuals to every class.
        pairs: (source, target) class names whose examples are embedded first, where not all fit.
        max_tiles: pictures embedded at most; where 8,000,000 pixels are fewer, so many, but 2,000 at least.
    """
    start = time.perf_counter()
    if not audits:
        raise ValueError("audits: expected at least one directory or s3:// URI, got none")
    views = open_views(audits)
    first = views[0]
    tiles = Tiles(first.audit.plan.image_shape)
    budget = min(max_tiles, max(2_000, 8_000_000 // (tiles.height * tiles.width)))
    names = first.audit.class_names
    if unknown := [(name, pair) for pair in pairs for name in pair if name not in names]:
        name, pair = unknown[0]
        raise ValueError(f"pairs: unknown class {name!r} in {':'.join(pair)}; choose from {', '.join(names)}")
    sample = choose(views, budget, images, [(names.index(source), names.index(target)) for source, target in pairs])
    embedded = [embed_audit(view, sample, tiles) for view in views]
    html = render(views, sample, embedded, embed_images(views, sample.image_ids, tiles), tiles, budget)
    uri, data = out or storage.join(first.audit.uri, "report.html"), html.encode()
    storage.write_bytes(uri, data)
    return Report(
        uri=uri,
        size=len(data),
        tiles=len(tiles),
        seconds=time.perf_counter() - start,
        verdicts=[view.facts.verdict for view in views],
        findings=[finding for view in views for finding in view.results.findings],
        complete=all(view.audit.complete for view in views),
    )


def report_of(audit: str) -> str:
    """URI of the page of one audit, which is written where there is none."""
    uri = storage.join(audit, "report.html")
    return uri if storage.exists(uri) else write_report([audit]).uri


def render(
    views: Sequence[View],
    sample: Sample,
    embedded: Sequence[Embedded],
    images: dict[str, Any],
    tiles: Tiles,
    budget: int,
) -> str:
    """Fills the template."""
    first, several = views[0], len(views) > 1
    files = resources.files("clarity.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"plural": plural, "percent": percent, "probability": probability, "thresholds": thresholds}
    environment.filters |= {"display": storage.display, "unbroken": unbroken}
    template = environment.from_string((files / "report.html.j2").read_text("utf-8"))

    def named(texts: Callable[[View], Iterable[str]]) -> list[str]:
        """Texts of the audits, with the names of those that have one where not all have it."""
        said: dict[str, list[str]] = {}
        for view in views:
            for text in texts(view):
                said.setdefault(text, []).append(view.name)
        return [text if len(names) == len(views) else f"{listed(names)}: {text}" for text, names in said.items()]

    def plan_of(view: View) -> str:
        """The plan as JSON, without its long table of shards."""
        shards = f"{counted(len(view.audit.plan.shards), 'shards')}, {len(view.audit.commits)} committed"
        return json.dumps(view.audit.plan.to_json() | {"shards": shards}, indent=2, ensure_ascii=False)

    reported = [(finding, view, each) for view, each in zip(views, embedded) for finding in view.results.findings]
    findings = [
        (finding, view.name, overview.evidence(finding, view, each, images, sample, tiles))
        for finding, view, each in sorted(reported, key=lambda entry: -entry[0].severity)
    ]
    labels, predictions = tables.labels(first, images, tiles), tables.predictions(first)
    script = script_data(views, sample, embedded, images, tiles)
    data = json.dumps(script, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # so that no text in it ends its script element
    totals = [overview.totals(view) for view in views]
    key_figures = [
        overview.key_figures(total, view.facts.num_images, view.facts.explained) for view, total in zip(views, totals)
    ]
    title = overview.dataset_name(first.audit.plan.dataset)
    subject = listed([view.name for view in views]) if several else "what would each image need to be another class?"
    return template.render(
        findings=findings,
        about_images=overview.ABOUT_IMAGES,
        clear=named(lambda view: [text for _, text in view.results.clear]),
        not_checked=named(lambda view: [f"{CHECKS[kind].doc}: {why}." for kind, why in view.results.not_checked]),
        warnings=named(lambda view: warnings(view.audit.plan, view.audit.commits, view.facts.con)),
        labels=labels,
        predictions=predictions,
        names=first.class_names,
        images=images,
        tiles=embedded[0].tiles,
        version=__version__,
        title=title,
        headline=f"{title}: {subject}",
        first=first,
        total=totals[0],
        sample=sample,
        max_examples=MAX_EXAMPLES,
        num_tiles=len(tiles),
        max_tiles=budget + len(first.class_names) ** 2,
        problems=[problem for view in views if (problem := overview.problem(view, several))],
        audits=[
            {
                "name": view.name,
                "uri": view.audit.uri,
                "verdict": view.facts.verdict,
                "figures": figures,
                "plan": plan_of(view),
            }
            for view, figures in zip(views, key_figures)
        ],
        figure_names=list(dict.fromkeys(name for figures in key_figures for name in figures)),
        views_sql=views_sql(first.audit.uri),
        queries=[query for name, query in load_queries().items() if name != "predictions" or predictions],
        css=markupsafe.Markup((files / "report.css").read_text("utf-8")),
        js=markupsafe.Markup((files / "report.js").read_text("utf-8")),
        data=markupsafe.Markup(data),
        sheets=tiles.sheets(),
    )


def unbroken(text: str) -> markupsafe.Markup:
    """Text as HTML in which a class pair, a share and a flag each stay on one line."""
    escaped = re.sub(r" (?=→ )|(?<= →) |(?<=\d) (?=%)", "\u00a0", str(markupsafe.escape(text)))
    return markupsafe.Markup(re.sub(r"--[a-z-]+( auto)?", r"<code>\g<0></code>", escaped))


def script_data(
    views: Sequence[View], sample: Sample, embedded: Sequence[Embedded], images: dict[str, Any], tiles: Tiles
) -> dict[str, Any]:
    """What the page's script reads."""
    uris = " ".join(shlex.quote(storage.display(view.audit.uri)) for view in views)
    return {
        "names": list(views[0].class_names),
        "full_names": views[0].audit.class_names,
        "labels": short_names(views[0].class_names, 14),
        "maps": pair_maps(views),
        "fields": FIELDS,
        "has_predictor": views[0].facts.has_predictor,
        "audits": [
            {
                "name": view.name,
                "pairs": [[None if n != n else int(n) for n in line] for line in view.facts.pairs["pairs"].tolist()],
                "change": each.change,
                "reconstructions": each.reconstructions,
                "rows": each.rows,
            }
            for view, each in zip(views, embedded)
        ],
        "images": images,
        "lookup": sample.lookup,
        "examples": {f"{s}-{t}": examples for (s, t), examples in sorted(sample.examples.items())},
        "command": f"python jobs/report.py {uris}",
        "tile": tiles.layout(),
    }


def views_sql(uri: str) -> str:
    """SQL that makes the audit's tables known to DuckDB."""
    path = storage.display(uri).rstrip("/").replace("'", "''")
    tables = [f"CREATE VIEW {name} AS FROM '{path}/{name}/*.parquet';" for name in ("codes", "counterfactuals")]
    return "\n".join([*tables, *(load_views()[name].strip() for name in ("class_pair_figures", "ensemble"))])
