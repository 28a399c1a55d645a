"""The audit report: one self-contained page from one audit or several side by side.

Knows what a page holds, how many pictures it may embed and how they are packed. Does not know how a finding is reached
(findings.py) or how anything looks (report.html.j2, report.css, report.js beside this file).

Shapes: P pairs of (image, target), C, H, W image, D latent, K classes.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import duckdb
import jinja2
import markupsafe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

from clarity import __version__, findings, storage
from clarity.audit.queries import connect, load_queries, load_views
from clarity.audit.read import ATTRIBUTES_FILE, Audit, read_audit
from clarity.images import decode_png
from clarity.report.text import percent, plural, probability

if TYPE_CHECKING:
    from clarity.model import Model


@dataclass(frozen=True)
class Bounds:
    """How much of an audit a page embeds: the same for a thousand pairs and for a million.

    Args:
        pixels: all embedded pictures together, in pixels; what fits of them is chosen in a fixed order.
        min_tiles: pictures embedded even where they have more pixels than that.
        max_tiles: pictures embedded even where they have fewer.
        side: larger pictures are reduced to this side.
        examples: of each kind (closest, median, hardest, failed) for each class pair.
        path: decoded steps between the two codes of an example.
        sample: pairs behind the mean difference maps.
        listed: rows of the tables of suspicious labels, and of disagreements with the predictions handed in.
    """

    pixels: int = 8_000_000
    min_tiles: int = 2_000
    max_tiles: int = 10_000
    side: int = 96
    examples: int = 3
    path: int = 5
    sample: int = 4_500
    listed: int = 40


@dataclass(frozen=True)
class Report:
    """What was written: where, its size in bytes, how many pictures it embeds, and the seconds it took."""

    uri: str
    size: int
    tiles: int
    seconds: float
    findings: list[findings.Finding]
    complete: bool


def write_report(
    audits: Sequence[str],
    out: str | None = None,
    *,
    images: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    bounds: Bounds | None = None,
) -> Report:
    """Writes the page of one audit, or of several side by side.

    Args:
        audits: their URIs; several must share class names and image shape. The first one's sample is shown of all.
        out: where the page goes; report.html in the first audit by default.
        images: ids of images to embed besides the sample, each with its counterfactuals to every class.
        pairs: (source, target) class names whose examples are embedded first, where not all fit.
        bounds: how much is embedded.

    Raises:
        ValueError: for audits that cannot stand side by side, and unknown images or classes.
    """
    start = time.perf_counter()
    bounds = bounds or Bounds()
    if not audits:
        raise ValueError("expected at least one audit; give its directory or s3:// URI")
    views = [_open(uri, bounds) for uri in audits]
    _check_alike(views)
    names = views[0].class_names
    wanted_pairs = []
    for source, target in pairs:
        for name in (source, target):
            if name not in names:
                raise ValueError(
                    f"unknown class {name!r} in the pair {source}:{target}; choose from {', '.join(names)}"
                )
        wanted_pairs.append((names.index(source), names.index(target)))
    page = _Page(views, bounds, tuple(images), tuple(wanted_pairs))
    html = page.render()
    destination = out or storage.join(views[0].uri, "report.html")
    data = html.encode()
    storage.write_bytes(destination, data)
    return Report(
        uri=destination,
        size=len(data),
        tiles=len(page.tiles),
        seconds=time.perf_counter() - start,
        findings=[finding for view in views for finding in view.findings],
        complete=all(view.audit.complete for view in views),
    )


# ------------------------------------------------------------------------------------------------------------------
# One audit, opened: its tables, its model, its facts.


@dataclass
class _View:
    uri: str
    name: str
    audit: Audit
    con: duckdb.DuckDBPyConnection
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    method: str
    model: Model | None
    facts: findings.Facts
    findings: list[findings.Finding] = field(default_factory=list)
    quiet: list[tuple[str, str]] = field(default_factory=list)

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        return self.con.execute(sql, parameters or {}).fetchall()

    def table(self, sql: str, parameters: dict[str, Any] | None = None) -> pa.Table:
        return self.con.sql(sql, params=parameters or {}).to_arrow_table()

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 of codes (B, D)."""
        import torch

        from clarity.rows import decode_rows

        assert self.model is not None
        if not len(z):
            return np.zeros((0, *self.image_shape), np.float32)
        return decode_rows(self.model.vae, torch.from_numpy(np.ascontiguousarray(z, np.float32))).numpy()

    def probabilities(self, z: np.ndarray, image_ids: Sequence[str]) -> np.ndarray:
        """Mean class probabilities (B, K) at codes (B, D), by the ensemble that explained each of the images."""
        import torch

        from clarity.ids import fold_of
        from clarity.rows import logits_rows

        assert self.model is not None
        probs = np.zeros((len(z), len(self.class_names)), np.float32)
        num_folds = int(self.audit.plan.model.get("num_folds") or 0)
        ensembles = self.model.folds if num_folds else (self.model.ensemble,)
        part = np.array([fold_of(image_id, num_folds) if num_folds else 0 for image_id in image_ids], np.int64)
        for i, ensemble in enumerate(ensembles):
            if (part == i).any():
                logits = logits_rows(ensemble, torch.from_numpy(np.ascontiguousarray(z[part == i], np.float32)))
                probs[part == i] = torch.softmax(logits, -1).mean(0).numpy()
        return probs


def _open(uri: str, bounds: Bounds) -> _View:
    audit = read_audit(uri)
    judged = storage.join(uri, ATTRIBUTES_FILE)
    others = {"attributes": pq.read_table(io.BytesIO(storage.read_bytes(judged)))} if storage.exists(judged) else {}
    con = connect(audit.codes, audit.counterfactuals, **others)
    model = _load(uri)
    view = _View(
        uri=uri,
        name=storage.name(uri),
        audit=audit,
        con=con,
        class_names=tuple(audit.class_names),
        image_shape=audit.plan.image_shape,
        method=audit.plan.method,
        model=model,
        facts=None,  # type: ignore[arg-type]
    )
    view.facts = findings.gather(con, view.class_names, audit.plan.config, _differences(view, bounds))
    view.findings, view.quiet = findings.find(view.facts)
    return view


def _load(uri: str) -> Model | None:
    """The model copied into the audit; None where there is none, so that a page of tables alone still comes out."""
    place = storage.join(uri, "model")
    if not storage.exists(storage.join(place, "model.json")):
        return None
    from clarity.model import load_model

    return load_model(place)


def _check_alike(views: list[_View]) -> None:
    first = views[0]
    for other in views[1:]:
        for what in ("class_names", "image_shape"):
            if getattr(other, what) != getattr(first, what):
                raise ValueError(
                    f"audits side by side must share {what.replace('_', ' ')}: {storage.display(first.uri)} has "
                    f"{getattr(first, what)}, {storage.display(other.uri)} has {getattr(other, what)}; make two reports"
                )
    # Names under which they stand: the methods where these differ, else the directories, else a number besides.
    for names in ([view.method for view in views], [view.name for view in views]):
        if len(set(names)) == len(names) and all(names):
            break
    else:
        names = [f"{view.name} {i + 1}" for i, view in enumerate(views)]
    for view, name in zip(views, names):
        view.name = name


def _differences(view: _View, bounds: Bounds) -> findings.Differences | None:
    """Mean difference maps over a sample: as many pairs of each target, evenly over sources, by a hash of the id."""
    num_classes = len(view.class_names)
    table = view.table(
        """
        WITH turns AS (
            SELECT image_id, source, target, md5(image_id) AS lot,
                   row_number() OVER (PARTITION BY source, target ORDER BY md5(image_id), image_id) AS turn
            FROM counterfactuals WHERE converged
        ), chosen AS (
            SELECT image_id, target FROM turns WHERE turn <= $each
            QUALIFY row_number() OVER (PARTITION BY target ORDER BY turn, lot, image_id) <= $each
        )
        SELECT image_id, p.source, target, c.z, p.z_cf, c.x, p.x_cf
        FROM counterfactuals AS p SEMI JOIN chosen USING (image_id, target) JOIN codes AS c USING (image_id)
        ORDER BY source, target, image_id
        """,
        {"each": max(20, bounds.sample // num_classes)},
    )
    if not table.num_rows:
        return None
    before, after = _pictures(view, table, "z", "x"), _pictures(view, table, "z_cf", "x_cf")
    if before is None or after is None:
        return None
    return findings.mean_differences(before, after, table["source"].to_numpy(), table["target"].to_numpy(), num_classes)


def _pictures(view: _View, table: pa.Table, code: str, stored: str) -> np.ndarray | None:
    """The pictures (P, C, H, W) in [0, 1] of one side of the pairs; None where there are neither PNGs nor a model.

    What a search starts from is the reconstruction, so the code comes first there; its end may be a picture alone.
    """
    use_code = view.model is not None and (stored == "x" or table[stored].null_count > 0)
    if not use_code and table[stored].null_count:
        return None
    # An image is in many pairs: read once.
    distinct = table[code if use_code else stored].combine_chunks()
    keys = table["image_id"].combine_chunks().dictionary_encode() if stored == "x" else None
    if keys is not None:
        _, first, where = np.unique(keys.indices.to_numpy(), return_index=True, return_inverse=True)
        distinct = distinct.take(pa.array(first))
    if use_code:
        pictures = view.decode(np.array(distinct.to_pylist(), np.float32))
    else:
        pictures = decode_png(distinct, view.image_shape).astype(np.float32) / 255
    return pictures if keys is None else pictures[where]


# ------------------------------------------------------------------------------------------------------------------
# Pictures, packed: equal ones once, many in one sheet.


class _Tiles:
    """Pictures of one size, in sheets: equal pictures share a place. A place is an index, -1 for none."""

    def __init__(self, image_shape: tuple[int, int, int], side: int) -> None:
        channels, height, width = image_shape
        scale = min(1.0, side / max(height, width))
        self.channels, self.height, self.width = channels, max(1, round(height * scale)), max(1, round(width * scale))
        self.columns = max(1, 1024 // self.width)
        self.rows = max(1, 1024 // self.height)
        self._places: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, picture: np.ndarray | None) -> int:
        """Places a picture (C, H, W), uint8 or floats in [0, 1]."""
        if picture is None:
            return -1
        if picture.dtype != np.uint8:
            picture = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        if picture.shape[1:] != (self.height, self.width):
            mode = Image.fromarray(picture[0] if self.channels == 1 else picture.transpose(1, 2, 0))
            reduced = np.asarray(mode.resize((self.width, self.height), Image.Resampling.LANCZOS))
            picture = reduced[None] if self.channels == 1 else reduced.transpose(2, 0, 1)
        return self._places.setdefault(np.ascontiguousarray(picture).tobytes(), len(self._places))

    def sheets(self) -> list[str]:
        """Every sheet as a data URI. Small grey pictures are kept exactly; colour ones lose what an eye cannot see."""
        each = self.columns * self.rows
        pictures = list(self._places)
        sheets = []
        for first in range(0, len(pictures), each):
            part = pictures[first : first + each]
            lines = math.ceil(len(part) / self.columns)
            sheet = np.zeros((lines * self.columns, self.channels, self.height, self.width), np.uint8)
            sheet[: len(part)] = np.frombuffer(b"".join(part), np.uint8).reshape(len(part), *sheet.shape[1:])
            grid = sheet.reshape(lines, self.columns, *sheet.shape[1:]).transpose(0, 3, 1, 4, 2)
            grid = grid.reshape(lines * self.height, self.columns * self.width, self.channels)
            image = Image.fromarray(grid[:, :, 0] if self.channels == 1 else grid)
            buffer = io.BytesIO()
            kind = "webp" if features.check("webp") else "png"
            if kind == "webp":
                image.convert("RGB").save(buffer, "WEBP", lossless=self.channels == 1, quality=85, method=3)
            else:
                image.save(buffer, "PNG", optimize=True)
            sheets.append(f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode())
        return sheets


# ------------------------------------------------------------------------------------------------------------------
# The page.

#: The maps of class pairs: key, title, unit, what it says, whether its scale is a share.
MAPS = (
    (
        "strict_validity",
        "Strict validity",
        "share of pairs",
        "pairs whose target probability exceeded the wanted one",
        True,
    ),
    (
        "reencoded_agreement",
        "Re-encoded agreement",
        "share of pairs",
        "pairs still seen as their target after decoding, rounding to 8 bits and encoding",
        True,
    ),
    ("median_steps", "Steps", "updates, median of converged pairs", "how long the search took", False),
    (
        "median_distance",
        "Latent distance",
        "L1 between codes, median of converged pairs",
        "how far the code had to move",
        False,
    ),
    ("epistemic_initial", "Epistemic before", "nats, median", "what the members disagree about in the image", False),
    (
        "epistemic_final",
        "Epistemic after",
        "nats, median",
        "what the members disagree about in the counterfactual",
        False,
    ),
    ("pairs", "Pairs", "count", "how many pairs were asked for", False),
)

_ROW = """image_id, target, source, status, converged, steps, target_prob_initial, target_prob_final,
    predictive_initial, predictive_final, aleatoric_initial, aleatoric_final, epistemic_initial, epistemic_final,
    distance_z_l1, distance_x_l1, reencoded_class, reencoded_target_prob"""
_FIGURES = [name.strip() for name in _ROW.split(",")][2:]


class _Page:
    """Chooses what is embedded, decodes it, and fills the template."""

    def __init__(
        self, views: list[_View], bounds: Bounds, images: tuple[str, ...], pairs: tuple[tuple[int, int], ...]
    ) -> None:
        self.views = views
        self.bounds = bounds
        self.first = views[0]
        self.tiles = _Tiles(self.first.image_shape, bounds.side)
        fitting = bounds.pixels // (self.tiles.height * self.tiles.width)
        self.budget = max(bounds.min_tiles, min(bounds.max_tiles, fitting))
        self.codes: dict[str, dict[str, Any]] = {}
        self.asked_images = self._known(images)
        self.asked_pairs = pairs

    def _known(self, images: tuple[str, ...]) -> list[str]:
        if not images:
            return []
        self.first.con.register("asked", pa.table({"image_id": list(images)}))
        found = {row[0] for row in self.first.rows("SELECT image_id FROM codes SEMI JOIN asked USING (image_id)")}
        if missing := [image for image in images if image not in found]:
            some = ", ".join(row[0] for row in self.first.rows("SELECT image_id FROM codes ORDER BY 1 LIMIT 5"))
            raise ValueError(f"no image {missing[0]!r} in {storage.display(self.first.uri)}; its ids look like {some}")
        return list(dict.fromkeys(images))

    # -- what is embedded ------------------------------------------------------------------------------------------

    def choose_examples(self) -> tuple[list[dict[str, Any]], int, dict[str, int]]:
        """The examples of each class pair, how many frames their paths have, and how many class pairs have any."""
        table = self.first.table(
            """
            WITH ranked AS (
                SELECT image_id, source, target, converged, target_prob_final,
                       row_number() OVER near AS near, count(*) OVER (PARTITION BY source, target, converged) AS n
                FROM counterfactuals WHERE converged IS NOT NULL
                WINDOW near AS (PARTITION BY source, target, converged
                                ORDER BY CASE WHEN converged THEN distance_z_l1 ELSE target_prob_final END, image_id)
            )
            SELECT image_id, source, target, near, n,
                   CASE WHEN NOT converged THEN 'failed' WHEN near <= $each THEN 'closest'
                        WHEN near > n - $each THEN 'hardest' ELSE 'median' END AS kind,
                   CASE WHEN NOT converged OR near <= $each THEN near WHEN near > n - $each THEN n + 1 - near
                        ELSE abs(2 * near - n - 1) END AS place
            FROM ranked
            WHERE near <= $each OR (converged AND (near > n - $each OR abs(2 * near - n - 1) < $each + n % 2))
            ORDER BY source, target, kind, place, near
            """,
            {"each": self.bounds.examples},
        )
        by_pair: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            by_pair.setdefault((row["source"], row["target"]), []).append(row)
        told = [pair for view in self.views for finding in view.findings for pair in finding.pairs]
        distance = self.first.facts.pairs["median_distance"]
        near = sorted(by_pair, key=lambda pair: (np.nan_to_num(distance[pair], nan=np.inf), pair))
        priority = [pair for pair in dict.fromkeys([*self.asked_pairs, *told[:24], *near]) if pair in by_pair]
        kinds = {pair: Counter(row["kind"] for row in by_pair[pair]) for pair in priority}
        # The most generous treatment that fits all pairs; where none does, the first by priority get the smallest.
        room = int(self.budget * 0.8) // len(self.views)
        each, path = 1, 0
        for each, path in ((3, 5), (3, 3), (2, 3), (1, 3), (1, 0)):
            each, path = min(each, self.bounds.examples), min(path, self.bounds.path)
            tiles = sum(min(n, each) for counts in kinds.values() for n in counts.values()) * (3 + path)
            if tiles <= room:
                break
        chosen, used = [], 0
        for place, pair in enumerate(priority):
            special = place < len(self.asked_pairs) + 12
            count, frames = (self.bounds.examples, self.bounds.path) if special else (each, path)
            cost = sum(min(n, count) for n in kinds[pair].values()) * (3 + frames)
            if used + cost > room and not (special and used + cost <= self.budget):
                continue
            used += cost
            taken: Counter[str] = Counter()
            for row in by_pair[pair]:
                taken[row["kind"]] += 1
                if taken[row["kind"]] <= count:
                    chosen.append({**row, "frames": frames})
        order = {"closest": 0, "median": 1, "hardest": 2, "failed": 3}
        chosen.sort(key=lambda row: (row["source"], row["target"], order[row["kind"]], row["place"], row["near"]))
        shown = len({(row["source"], row["target"]) for row in chosen})
        return chosen, used, {"pairs": len(by_pair), "shown": shown}

    def choose_images(self, room: int) -> list[str]:
        """Images embedded with all their counterfactuals: those asked for, of findings, then some of each class."""
        cost = 2 + (len(self.first.class_names) - 1) * len(self.views)
        number = max(len(self.asked_images), min(240, room // cost))
        told = [example[0] for view in self.views for finding in view.findings for example in finding.examples[:6]]
        spread = self.first.rows(
            """
            SELECT image_id FROM codes WHERE status = 'ok'
            QUALIFY row_number() OVER (PARTITION BY source ORDER BY md5(image_id), image_id) <= $each
            ORDER BY row_number() OVER (PARTITION BY source ORDER BY md5(image_id), image_id), source, image_id
            """,
            {"each": max(1, math.ceil(number / len(self.first.class_names)))},
        )
        traced: list[str] = []
        if self.first.audit.traces is not None:
            self.first.con.register("traces", self.first.audit.traces)
            traced = [row[0] for row in self.first.rows("SELECT DISTINCT image_id FROM traces ORDER BY 1 LIMIT 8")]
        chosen = list(dict.fromkeys([*self.asked_images, *told, *traced, *(row[0] for row in spread)]))
        return chosen[: max(number, len(self.asked_images))]

    # -- what is embedded, decoded -----------------------------------------------------------------------------------

    def collect(self) -> dict[str, Any]:
        """The data behind the page's script; fills the sheets of pictures on the way."""
        examples, used, shown = self.choose_examples()
        lookup = self.choose_images(max(self.budget - used, self.budget // 6))
        frames = {(row["image_id"], row["target"]): row["frames"] for row in examples}
        for view in self.views:
            for finding in view.findings:
                for image_id, target in finding.examples[:6]:
                    if target >= 0:
                        frames.setdefault((image_id, target), 0)
        self.disagreements = self._disagreements()
        for row in self.disagreements:
            frames.setdefault((row["image_id"], row["prediction"]), 0)
        classes = range(len(self.first.class_names))
        wanted = dict(frames)
        for image_id in lookup:
            for target in classes:
                wanted.setdefault((image_id, target), 0)
        # Images of findings and examples are needed themselves, whether or not they can be looked up.
        image_ids = sorted({image_id for image_id, _ in wanted} | set(lookup))
        audits = [self._audit_data(view, wanted, image_ids) for view in self.views]
        by_pair: dict[str, list[Any]] = {}
        for row in examples:
            by_pair.setdefault(f"{row['source']}-{row['target']}", []).append([row["image_id"], row["kind"]])
        self.shown = {**shown, "images": len(lookup)}
        return {
            "names": list(self.first.class_names),
            "maps": [dict(zip(("key", "title", "unit", "doc", "share"), entry)) for entry in MAPS],
            "figures": [*_FIGURES, "cf", "path", "path_prob", "path_step"],
            "audits": audits,
            "images": {image_id: self.codes[image_id] for image_id in image_ids if image_id in self.codes},
            "lookup": lookup,
            "examples": by_pair,
        }

    def _audit_data(self, view: _View, wanted: dict[tuple[str, int], int], image_ids: list[str]) -> dict[str, Any]:
        view.con.register(
            "wanted",
            pa.table(
                {
                    "image_id": pa.array([key[0] for key in wanted], pa.string()),
                    "target": pa.array([key[1] for key in wanted], pa.int32()),
                }
            ),
        )
        view.con.register("wanted_images", pa.table({"image_id": pa.array(image_ids, pa.string())}))
        codes = view.table("SELECT * FROM codes SEMI JOIN wanted_images USING (image_id) ORDER BY image_id").to_pylist()
        rows = view.table(
            f"SELECT {_ROW}, z_cf, x_cf FROM counterfactuals SEMI JOIN wanted USING (image_id, target) "
            "ORDER BY image_id, target"
        ).to_pylist()
        good = {code["image_id"]: code for code in codes if code["status"] == "ok"}
        reconstructions: dict[str, int] = {}
        if view.model is not None:
            decoded = view.decode(np.array([code["z"] for code in good.values()], np.float32).reshape(len(good), -1))
            reconstructions = {image_id: self.tiles.add(picture) for image_id, picture in zip(good, decoded)}
        for code in codes:
            self._keep_code(code)
        lacking = [row for row in rows if row["x_cf"] is None and row["z_cf"] is not None]
        if lacking and view.model is not None:
            for row, picture in zip(lacking, view.decode(np.array([row["z_cf"] for row in lacking], np.float32))):
                row["x_cf"] = picture
        paths = self._paths(view, rows, good, wanted)
        out: dict[str, dict[str, list[Any]]] = {}
        for i, row in enumerate(rows):
            picture = self._read(row["x_cf"])
            tiles, probs, steps = paths.get(i, ([], [], []))
            figures = [_short(row[name]) for name in _FIGURES]
            out.setdefault(row["image_id"], {})[str(row["target"])] = [
                *figures,
                self.tiles.add(picture),
                tiles,
                probs,
                steps,
            ]
        facts = view.facts
        num_classes = len(view.class_names)
        maps = {key: [[_short(value) for value in line] for line in facts.pairs[key].tolist()] for key, *_ in MAPS}
        change = None
        if facts.differences is not None and num_classes <= 24:
            seen = facts.differences.count > 0
            change = [
                [
                    self.tiles.add(_signed(facts.differences.mean[s, t])) if seen[s, t] else -1
                    for t in range(num_classes)
                ]
                for s in range(num_classes)
            ]
        return {
            "name": view.name,
            "method": view.method,
            "maps": maps,
            "change": change,
            "reconstructions": reconstructions,
            "sources": {
                image_id: [code["source"], _short(code["probs"][code["source"]])] for image_id, code in good.items()
            },
            "rows": out,
        }

    def _read(self, picture: bytes | np.ndarray | None) -> np.ndarray | None:
        """A stored PNG as (C, H, W); what is decoded already, or missing, as it is."""
        return decode_png([picture], self.first.image_shape)[0] if isinstance(picture, bytes) else picture

    def _keep_code(self, code: dict[str, Any]) -> None:
        """What the page says of an image; the first audit speaks for all."""
        if code["image_id"] in self.codes:
            return
        picture = self._read(code["x"])
        self.codes[code["image_id"]] = {
            "label": code["label"],
            "label_name": code["label_name"],
            "source": code["source"],
            "probs": [_short(value) for value in code["probs"]] if code["probs"] is not None else None,
            "predictive": _short(code["predictive"]),
            "aleatoric": _short(code["aleatoric"]),
            "epistemic": _short(code["epistemic"]),
            "reconstruction_l1": _short(code["reconstruction_l1"]),
            "error": code["error"],
            "prediction": code.get("prediction"),
            "x": self.tiles.add(picture),
        }

    def _paths(
        self, view: _View, rows: list[dict[str, Any]], good: dict[str, Any], wanted: dict[tuple[str, int], int]
    ) -> dict[int, tuple[list[int], list[Any], list[int]]]:
        """Pictures, target probabilities and steps along each pair's way, for the rows that want them.

        The recorded steps of the search where the audit traced the image; else equal parts of the segment from z to
        z_cf, and no steps.
        """
        if view.model is None:
            return {}
        traces = self._traces(view)
        codes: list[np.ndarray] = []
        walks: list[tuple[int, dict[str, Any], list[float], list[int]]] = []
        for i, row in enumerate(rows):
            key = (row["image_id"], row["target"])
            frames = wanted[key] or (self.bounds.path if key in traces else 0)
            if not frames or row["z_cf"] is None or row["image_id"] not in good:
                continue
            along = np.arange(1, frames + 1) / (frames + 1)
            if key in traces:
                known_steps, trace_probs, trace_codes = traces[key]
                chosen = np.unique(np.round(along * (len(known_steps) - 1)).astype(int))
                codes.append(trace_codes[chosen])
                walks.append(
                    (i, row, [float(p) for p in trace_probs[chosen]], [int(step) for step in known_steps[chosen]])
                )
            else:
                z, z_cf = np.array(good[row["image_id"]]["z"], np.float32), np.array(row["z_cf"], np.float32)
                codes.append(z + along[:, None].astype(np.float32) * (z_cf - z))
                walks.append((i, row, [], []))
        if not walks:
            return {}
        points = np.concatenate(codes)
        lengths = [len(code) for code in codes]
        image_ids = [walk[1]["image_id"] for walk, length in zip(walks, lengths) for _ in range(length)]
        pictures, probs = view.decode(points), view.probabilities(points, image_ids)
        paths: dict[int, tuple[list[int], list[Any], list[int]]] = {}
        place = 0
        for (i, row, known, steps), length in zip(walks, lengths):
            span = range(place, place + length)
            target_probs = known or [float(probs[j, row["target"]]) for j in span]
            paths[i] = ([self.tiles.add(pictures[j]) for j in span], [_short(round(p, 3)) for p in target_probs], steps)
            place += length
        return paths

    def _traces(self, view: _View) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Steps, target probabilities and codes of the wanted pairs that the audit recorded."""
        if view.audit.traces is None:
            return {}
        view.con.register("traces", view.audit.traces)
        table = view.table(
            "SELECT image_id, target, list(step ORDER BY step) AS steps, list(target_prob ORDER BY step) AS probs, "
            "list(z ORDER BY step) AS codes FROM traces SEMI JOIN wanted USING (image_id, target) GROUP BY ALL"
        )
        return {
            (row["image_id"], row["target"]): (
                np.array(row["steps"]),
                np.array(row["probs"], np.float32),
                np.array(row["codes"], np.float32),
            )
            for row in table.to_pylist()
        }

    # -- the page ----------------------------------------------------------------------------------------------------

    def render(self) -> str:
        """The whole page as HTML."""
        data = self.collect()
        names = self.first.class_names
        overviews = [_overview(view) for view in self.views]
        told = self._told(data)
        folder = resources.files("clarity.report")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        template = environment.from_string((folder / "report.html.j2").read_text("utf-8"))
        plan, total = self.first.audit.plan, overviews[0]
        what = _named(plan.dataset)
        data["command"] = self._command()
        return template.render(
            version=__version__,
            title=what,
            headline=_headline(what, self.views),
            lead=_lead(self.first, total),
            problems=[problem for view in self.views for problem in _problems(view, len(self.views) > 1)],
            audits=[
                {
                    "name": view.name,
                    "figures": _keys(overview),
                    "histograms": [
                        _bars(_histogram(view, "steps"), "Steps to the counterfactual", "steps"),
                        _bars(_histogram(view, "distance_z_l1"), "Latent distance (L1 between the codes)", "distance"),
                    ],
                    "ranges": _dots(_ranges(view)),
                    "plan": _plan_text(view),
                }
                for view, overview in zip(self.views, overviews)
            ],
            findings=told,
            quiet=[text for _, text in self.first.quiet]
            if len(self.views) == 1
            else [f"{view.name}: {text}" for view in self.views for _, text in view.quiet],
            embedded=(
                f"{plural(len(data['lookup']), 'image')} of {total['images']:,} can be looked up here"
                + (": those of the findings and some of each class." if len(data["lookup"]) < total["images"] else ".")
            ),
            labels=self._labels(),
            predictions=self._predictions(data["audits"][0]),
            views_sql=_views_sql(self.first.uri),
            queries={
                name: {"doc": query.doc, "sql": query.sql}
                for name, query in load_queries().items()
                if name != "predictions" or "prediction" in self.first.audit.codes.schema.names
            },
            terms=TERMS,
            method_note=self._bound_note(names),
            footer=f"Made by clarity {__version__} from {', '.join(storage.display(view.uri) for view in self.views)}. "
            "This page sends and loads nothing.",
            css=markupsafe.Markup((folder / "report.css").read_text("utf-8")),
            js=markupsafe.Markup((folder / "report.js").read_text("utf-8")),
            data=markupsafe.Markup(_embedded_json(data | {"tile": self._tile_data()})),
            sheets=self.tiles.sheets(),
        )

    def _tile_data(self) -> dict[str, int]:
        tiles = self.tiles
        return {"width": tiles.width, "height": tiles.height, "columns": tiles.columns, "rows": tiles.rows}

    def _command(self) -> str:
        return "python jobs/report.py " + " ".join(shlex.quote(storage.display(view.uri)) for view in self.views)

    def _bound_note(self, names: tuple[str, ...]) -> str:
        shown = self.shown
        text = (
            "The figures are over every row of the audit. Pictures are a sample, the same each time: "
            f"{len(self.tiles):,} of at most {self.budget + len(names) ** 2:,}; up to {self.bounds.examples} closest, "
            f"median, hardest and failed examples a "
            f"class pair, for {shown['shown']:,} of {shown['pairs']:,} class pairs, and every counterfactual of "
            f"{plural(shown['images'], 'image')}."
        )
        if self.first.facts.differences is not None:
            text += f" Mean changes are over {int(self.first.facts.differences.count.sum()):,} pairs."
        if self.first.model is None:
            text += " The audit holds no model, so there are no reconstructions and no paths."
        return text

    def _told(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """The findings of all audits as the template takes them, with pictures beside them where there are any."""
        ranked = [(finding, i) for i, view in enumerate(self.views) for finding in view.findings]
        ranked.sort(key=lambda entry: -entry[0].severity)
        names, size = self.first.class_names, _shown_size(self.tiles, 46)
        told = []
        for finding, i in ranked:
            audit = data["audits"][i]
            evidence = []
            if finding.kind == "shortcut":
                evidence.append(self._mean_change(i, finding.figures["target"]))
            shown = [example for example in finding.examples if example[1] >= 0][:4]
            if not shown:
                shown = [
                    (data["examples"][key][0][0], target)
                    for source, target in finding.pairs[:3]
                    if (key := f"{source}-{target}") in data["examples"]
                ]
            for image_id, target in shown:
                row = audit["rows"].get(image_id, {}).get(str(target))
                code = self.codes.get(image_id)
                if code is None:
                    continue
                pictures = [{"tile": code["x"], "alt": f"image {image_id}"}]
                caption = f"{image_id}: {names[code['source']] if code['source'] is not None else '?'}"
                if row is not None:
                    pictures.append({"tile": row[len(_FIGURES)], "alt": f"its counterfactual, {names[target]}"})
                    caption += f" → {names[target]}"
                if finding.kind == "labels":
                    caption = f"{image_id}: labelled {names[target]}, seen as {names[code['source']]}"
                if any(picture["tile"] >= 0 for picture in pictures):
                    evidence.append(
                        {"pictures": [{**p, "size": size, "signed": False} for p in pictures], "caption": caption}
                    )
            told.append(
                {
                    "kind": finding.kind,
                    "level": finding.level,
                    "title": finding.title,
                    # A class pair stays on one line.
                    "sentence": finding.sentence.replace(" → ", "\u00a0→\u00a0"),
                    "audit": self.views[i].name,
                    "evidence": evidence,
                    "pairs": [
                        {"source": source, "target": target, "text": f"{names[source]} → {names[target]}"}
                        for source, target in (finding.pairs[:6] if finding.kind not in ("labels", "edge") else ())
                    ],
                    "images": [example[0] for example in finding.examples[:6]]
                    if finding.kind in ("labels", "edge", "predictions")
                    else [],
                }
            )
        return told

    def _mean_change(self, audit: int, target: int) -> dict[str, Any]:
        differences = self.views[audit].facts.differences
        assert differences is not None
        name = self.first.class_names[target]
        tile = self.tiles.add(_signed(differences.target_mean[target]))
        picture = {
            "tile": tile,
            "alt": f"mean change towards {name}",
            "size": _shown_size(self.tiles, 84),
            "signed": True,
        }
        return {"pictures": [picture], "caption": f"mean change towards {name}"}

    def _labels(self) -> dict[str, Any]:
        """The table of suspicious labels and the agreement by class, of the first audit."""
        view, names = self.first, self.first.class_names
        confusion = _confusion(view)
        if confusion:
            for row in confusion["recall"]:
                row["share"] = percent(row["agree"], row["count"])
        table = view.facts.suspicion
        rows = []
        if table is not None:
            for row in table.slice(0, self.bounds.listed).to_pylist():
                if row["suspicion"] < 0.01:
                    break
                code = self.codes.get(row["image_id"])
                rows.append(
                    {
                        "image_id": row["image_id"],
                        "tile": code["x"] if code else self._tile_of(row["image_id"]),
                        "label": names[row["label"]],
                        "source": names[row["source"]],
                        "suspicion": row["suspicion"],
                        "label_prob": probability(row["label_prob"]),
                        "neighbours": "–" if row["neighbours"] is None else percent(row["neighbours"]),
                        "distance": "–" if row["distance"] is None else f"{row['distance']:.1f}",
                    }
                )
        folds = int(view.audit.plan.model.get("num_folds") or 0)
        note = (
            "Suspicion asks whether an image is an ordinary member of another class, by the ensemble and by the labels "
            f"of its {findings.NEIGHBOURS} nearest codes; 0.5 and more is told as a finding."
        )
        if rows and rows[0]["suspicion"] <= 0.5:
            note += " None is as high here: these are the doubtful ones, not the wrong ones."
        if folds:
            note += f" Each image was explained by the one of {folds} ensembles that did not see it in training."
        elif view.audit.plan.dataset.get("split") == "train":
            note += " These images may have trained the ensemble, which then believes their labels: train with folds."
        return {"rows": rows, "confusion": confusion, "note": note}

    def _disagreements(self) -> list[dict[str, Any]]:
        """Where the first audit's ensemble differs from the predictions handed in, its surest first."""
        view = self.first
        if "prediction" not in view.audit.codes.schema.names:
            return []
        theirs = "prediction_probs[prediction + 1]" if "prediction_probs" in view.audit.codes.schema.names else "NULL"
        return view.table(
            f"""
            SELECT c.image_id, c.label_name, prediction, c.source, {theirs} AS their_prob,
                   probs[c.source + 1] AS source_prob, probs[prediction + 1] AS prediction_prob,
                   distance_z_l1 AS distance
            FROM codes AS c LEFT JOIN counterfactuals AS p
                 ON p.image_id = c.image_id AND target = prediction AND converged
            WHERE c.status = 'ok' AND prediction <> c.source
            ORDER BY probs[c.source + 1] DESC, c.image_id LIMIT $count
            """,
            {"count": self.bounds.listed},
        ).to_pylist()

    def _predictions(self, audit: dict[str, Any]) -> dict[str, Any] | None:
        """How the first audit's ensemble and the predictions handed in agree, by class; where they do not."""
        view, names = self.first, self.first.class_names
        if "prediction" not in view.audit.codes.schema.names:
            return None
        shares = view.rows(
            "SELECT prediction, count(*), count(*) FILTER (prediction = source) FROM codes "
            "WHERE status = 'ok' AND prediction IS NOT NULL GROUP BY 1 "
            "ORDER BY count(*) FILTER (prediction = source) / count(*), 1"
        )
        (without, labelled, theirs, ours) = view.rows(
            "SELECT count(*) FILTER (prediction IS NULL), "
            "count(*) FILTER (prediction IS NOT NULL AND label IS NOT NULL), count(*) FILTER (prediction = label), "
            "count(*) FILTER (prediction IS NOT NULL AND source = label) "
            "FROM codes WHERE status = 'ok'"
        )[0]
        total, same = sum(row[1] for row in shares), sum(row[2] for row in shares)
        note = f"Your model's predictions for {plural(total, 'image')}: the ensemble sees the same class in "
        note += f"{same:,} ({percent(same, total)}). "
        note += f"{plural(without, 'image')} came without a prediction. " if without else ""
        if labelled:
            note += (
                f"On the {labelled:,} labelled ones, your model is right in {percent(theirs, labelled)}, the ensemble "
                f"in {percent(ours, labelled)}. "
            )
        note += "What is explained here is the ensemble: where the two differ, it does not speak for your model."
        crossed = view.rows(
            "SELECT prediction, source, count(*) FROM codes WHERE status = 'ok' AND prediction <> source "
            "GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT 8"
        )
        found = [audit["rows"].get(row["image_id"], {}).get(str(row["prediction"])) for row in self.disagreements]
        listed = [
            {
                "image_id": row["image_id"],
                "tile": self.codes[row["image_id"]]["x"],
                "cf": None if pair is None else pair[len(_FIGURES)],
                "label": row["label_name"],
                "prediction": names[row["prediction"]],
                "their_prob": None if row["their_prob"] is None else probability(row["their_prob"]),
                "source": names[row["source"]],
                "source_prob": probability(row["source_prob"]),
                "prediction_prob": probability(row["prediction_prob"]),
                "distance": "–" if row["distance"] is None else f"{row['distance']:.1f}",
            }
            for row, pair in zip(self.disagreements, found)
        ]
        return {
            "note": note,
            "shares": [
                {"name": names[row[0]], "count": row[1], "agree": row[2], "share": percent(row[2], row[1])}
                for row in shares
            ],
            "crossed": [
                {"prediction": names[row[0]], "source": names[row[1]], "count": row[2], "pair": f"{row[1]}-{row[0]}"}
                for row in crossed
            ],
            "rows": listed,
            "more": total - same - len(listed),
        }

    def _tile_of(self, image_id: str) -> int:
        rows = self.first.rows("SELECT x FROM codes WHERE image_id = $id", {"id": image_id})
        return self.tiles.add(self._read(rows[0][0])) if rows else -1


def _signed(change: np.ndarray) -> np.ndarray:
    """A change in [-1, 1] as a picture: grey for none, brighter for added, darker for taken away; channels averaged."""
    return np.repeat(0.5 + 0.5 * np.clip(change.mean(0, keepdims=True), -1, 1), len(change), 0)


def _short(value: Any) -> Any:
    """A number with two digits more than the page shows, so that it is rounded once; null for what is not finite."""
    if isinstance(value, float):
        return (
            None
            if not math.isfinite(value)
            else int(value)
            if value == int(value) and abs(value) < 1e9
            else float(f"{value:.6g}")
        )
    return value


# ------------------------------------------------------------------------------------------------------------------
# Aggregates beside the maps.


def _overview(view: _View) -> dict[str, Any]:
    """The figures of the first screen."""
    images, failed, labelled, agree = view.rows(
        "SELECT count(*), count(*) FILTER (status <> 'ok'), count(label) FILTER (status = 'ok'), "
        "count(*) FILTER (status = 'ok' AND label = source) FROM codes"
    )[0]
    pairs, converged, survived, steps, distance, before, after, broken = view.rows(
        "SELECT count(*), count(*) FILTER (converged), count(*) FILTER (reencoded_class = target), "
        "median(steps) FILTER (converged), median(distance_z_l1) FILTER (converged), "
        "median(epistemic_initial), median(epistemic_final), count(*) FILTER (status <> 'ok') FROM counterfactuals"
    )[0]
    return {
        "images": images,
        "failed": failed,
        "labelled": labelled,
        "agree": agree,
        "pairs": pairs,
        "converged": converged,
        "survived": survived,
        "steps": steps,
        "distance": distance,
        "epistemic_initial": before,
        "epistemic_final": after,
        "nonfinite": broken,
    }


def _histogram(view: _View, column: str, bins: int = 36) -> dict[str, Any] | None:
    """Counts of a column of the converged pairs in equal bins up to its 99.5 % quantile, and how many lie beyond."""
    low, high, top, count = view.rows(
        f"SELECT 0, quantile_cont({column}, 0.995), max({column}), count({column}) FROM counterfactuals WHERE converged"
    )[0]
    if not count or not high:
        return None
    width = _nice(high / bins)
    rows = dict(
        view.rows(
            f"SELECT least(floor({column} / $width), $last)::INT, count(*) FROM counterfactuals WHERE converged "
            "GROUP BY 1",
            {"width": width, "last": bins},
        )
    )
    counts = [rows.get(i, 0) for i in range(bins)]
    while len(counts) > 8 and not counts[-1]:
        counts.pop()
    return {"low": low, "width": width, "counts": counts, "beyond": count - sum(counts), "max": top, "count": count}


def _nice(width: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * 0.999)


def _ranges(view: _View) -> list[dict[str, Any]]:
    """Epistemic uncertainty by class, 5 % to 95 %: of images seen as it, and of counterfactuals towards it."""
    quantiles = "[0.05, 0.25, 0.5, 0.75, 0.95]"
    own = dict(
        view.rows(f"SELECT source, quantile_cont(epistemic, {quantiles}) FROM codes WHERE status = 'ok' GROUP BY 1")
    )
    after = dict(
        view.rows(
            f"SELECT target, quantile_cont(epistemic_final, {quantiles}) FROM counterfactuals "
            "WHERE epistemic_final IS NOT NULL GROUP BY 1"
        )
    )
    rows: list[dict[str, Any]] = [
        {"name": name, "own": own.get(i), "after": after.get(i)}
        for i, name in enumerate(view.class_names)
        if i in after
    ]
    if len(rows) > 24:
        rows.sort(key=lambda row: -(row["after"][2] - (row["own"] or row["after"])[2]))
        rows = rows[:24]
    return rows


def _confusion(view: _View) -> dict[str, Any] | None:
    """Counts by label and by the class that the ensemble sees; None where nothing is labelled."""
    rows = view.rows("SELECT label, source, count(*) FROM codes WHERE status = 'ok' AND label IS NOT NULL GROUP BY ALL")
    if not rows:
        return None
    counts = np.zeros((len(view.class_names),) * 2, np.int64)
    for label, source, count in rows:
        counts[label, source] = count
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    worst = [
        {
            "label": view.class_names[i],
            "source": view.class_names[j],
            "count": int(wrong[i, j]),
            "pair": f"{j}-{i}" if view.facts.pairs["pairs"][j, i] > 0 else None,
        }
        for i, j in (divmod(int(cell), len(counts)) for cell in np.argsort(-wrong, axis=None, kind="stable")[:8])
        if wrong[i, j]
    ]
    recall = [
        {"name": name, "count": int(counts[i].sum()), "agree": int(counts[i, i])}
        for i, name in enumerate(view.class_names)
        if counts[i].sum()
    ]
    return {"worst": worst, "recall": sorted(recall, key=lambda row: row["agree"] / row["count"])}


# ------------------------------------------------------------------------------------------------------------------
# Words and charts of the page.

#: What the words of the page mean.
TERMS = (
    (
        "source, target, label",
        "the class that the ensemble sees in an image, the class that was wanted, and the class that the data set "
        "gives it",
    ),
    ("counterfactual", "the picture decoded from a nearby code that the ensemble sees as the target"),
    (
        "reconstruction",
        "the picture decoded from the image's own code: what the search starts from, and what differences are taken "
        "against",
    ),
    ("converged", "the mean target probability over the members exceeded the wanted one within the allowed steps"),
    ("strict validity", "the share of all requested pairs that converged; a pair that failed counts against it"),
    (
        "re-encoded agreement",
        "the share of all pairs still seen as their target after decoding, rounding to 8 bits and encoding again",
    ),
    ("latent distance", "sum of absolute differences between the two codes"),
    ("epistemic, aleatoric", "in nats: what the members disagree about, and what they agree to be uncertain about"),
    (
        "path",
        "pictures decoded at equal steps of the straight line between the two codes, with the target's probability "
        "there; not the way the search took, unless it says trace",
    ),
    ("difference", "counterfactual minus reconstruction, channels averaged: orange was added, blue taken away"),
    (
        "closest, median, hardest",
        "by latent distance among the pairs of that class pair that converged; failed: the lowest final probability",
    ),
)


def _embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _named(dataset: dict[str, Any]) -> str:
    """What was explained: the source, or where it is one of many kinds, the name of the place; and the split."""
    source, place, split = (str(dataset.get(name) or "") for name in ("source", "data", "split"))
    name = storage.name(place).rsplit(".", 1)[0] if source in ("folder", "parquet") and place else source
    return f"{name or 'images'}, {split}" if split else name or "images"


def _headline(what: str, views: list[_View]) -> str:
    if len(views) > 1:
        return f"{what}: {', '.join(view.name for view in views[:-1])} and {views[-1].name}"
    return f"{what}: what would each image need to be another class?"


def _lead(view: _View, total: dict[str, Any]) -> str:
    plan = view.audit.plan
    card = view.model.card if view.model is not None else {}
    members = card.get("ensemble", {}).get("num_members")
    classes = len(view.class_names)
    towards = "every other class" if plan.targets is None else f"{len(plan.targets)} of {classes} classes"
    which = "misclassified " if plan.only == "misclassified" else ""
    images = plural(total["images"] - total["failed"], which + "image")
    text = f"{images} of {classes} classes, explained towards {towards}: "
    text += f"{plural(total['pairs'], 'search', 'searches')} with the method {plan.method}"
    text += f" in the {plan.model['latent_dim']}-dimensional code of a variational autoencoder"
    if members:
        text += f", under an ensemble of {plural(members, 'classifier')}"
    if (gamma := plan.config.get("min_target_prob")) is not None:
        text += f", until the mean target probability exceeded {gamma:g}"
    if (limit := plan.config.get("max_steps")) is not None:
        text += f" or {limit:,} steps were spent"
    text += "."
    if left_out := plan.dataset.get("left_out"):
        text += f" Left out: {', '.join(f'{count:,} {what}' for what, count in left_out.items())}."
    return text


def _problems(view: _View, named: bool) -> list[dict[str, Any]]:
    """What is missing from an audit that is not whole."""
    plan, commits = view.audit.plan, view.audit.commits
    if view.audit.complete:
        return []
    pending = [shard for shard in range(len(plan.shards)) if shard not in commits]
    images = sum(plan.shards[shard]["stop"] - plan.shards[shard]["start"] for shard in pending)
    failures: list[str] = []
    for shard in pending:
        place = storage.join(view.uri, "_failures", f"shard-{shard:05d}.json")
        if len(failures) < 3 and storage.exists(place):
            failures.append(f"shard {shard}: {storage.read_json(place).get('error', 'failed')}")
    text = (
        f"{len(pending):,} of {plural(len(plan.shards), 'shard')} are not committed, so "
        f"{plural(images, 'image')} of {plan.num_images:,} are absent from everything below. "
    )
    text += f"What failed: {'; '.join(failures)}. " if failures else "The run was stopped or is still at work. "
    text += "Repeat jobs/explain_all.py with the same flags to finish it; what is committed is not done again."
    some = ", ".join(f"shard {shard}" for shard in pending[:8])
    return [
        {
            "title": f"{view.name}: this audit is {'failed' if failures else 'unfinished'}."
            if named
            else f"This audit is {'failed' if failures else 'unfinished'}.",
            "text": text,
            "missing": some + (f" and {len(pending) - 8:,} more" if len(pending) > 8 else ""),
            "command": None,
        }
    ]


def _keys(total: dict[str, Any]) -> list[dict[str, str]]:
    """The key figures, each with a line that says what is behind it."""
    pairs, failed, others = total["pairs"], total["failed"], total["labelled"] - total["agree"]
    failures = f"{pairs - total['converged']:,} did not converge" if total["converged"] < pairs else "all converged"
    failures = failures if pairs else "no pairs yet"
    keys = [
        ("Images", f"{total['images'] - failed:,}", f"{failed:,} could not be read" if failed else "all were read"),
        ("Counterfactuals", f"{pairs:,}", f"{total['nonfinite']:,} not finite" if total["nonfinite"] else "all finite"),
        ("Strict validity", percent(total["converged"], pairs), failures),
        ("Re-encoded agreement", percent(total["survived"], pairs), "still the target once decoded and encoded"),
    ]
    converged = total["steps"] is not None
    distance = f"median latent distance {total['distance']:.1f}" if converged else "nothing converged"
    keys += [("Median steps", f"{total['steps']:,.0f}" if converged else "–", distance)]
    if total["epistemic_final"] is not None:
        before = f"median after; before {total['epistemic_initial']:.2g}"
        keys += [("Epistemic, nats", f"{total['epistemic_final']:.2g}", before)]
    else:
        keys += [("Epistemic, nats", "–", "a single classifier has none")]
    if total["labelled"]:
        keys += [
            (
                "Seen as labelled",
                percent(total["agree"], total["labelled"]),
                f"{others:,} {'is' if others == 1 else 'are'} not" if others else "all of them",
            )
        ]
    return [{"name": name, "value": value, "sub": sub} for name, value, sub in keys]


def _plan_text(view: _View) -> str:
    """The plan as JSON, without its long table of shards."""
    plan = view.audit.plan.to_json()
    plan["shards"] = f"{len(view.audit.plan.shards)} shards, {len(view.audit.commits)} committed"
    return json.dumps(plan, indent=2, ensure_ascii=False)


def _views_sql(uri: str) -> str:
    path = storage.display(uri).rstrip("/").replace("'", "''")
    tables = [f"CREATE VIEW {name} AS FROM '{path}/{name}/*.parquet';" for name in ("codes", "counterfactuals")]
    return "\n".join([*tables, load_views()["class_pair_figures"].strip()])


def _shown_size(tiles: _Tiles, height: int) -> int:
    """Width at which a picture is about ``height`` high, and a whole multiple of its own if it is small."""
    scale = height / tiles.height
    return round(tiles.width * (max(1, round(scale)) if scale > 1 else scale))


def _bars(
    histogram: dict[str, Any] | None, title: str, noun: str, width: int = 560, height: int = 120
) -> dict[str, Any]:
    """A histogram as rectangles."""
    base = height - 20
    if histogram is None:
        return {
            "title": f"{title}: nothing converged",
            "alt": title,
            "width": width,
            "height": height,
            "base": base,
            "bars": [],
            "ticks": [],
        }
    counts, step = histogram["counts"], histogram["width"]
    each, top = width / len(counts), max(counts)
    bars = [
        {
            "x": round(i * each + 0.5, 1),
            "y": round(base - (base - 4) * count / top, 1),
            "width": round(each - 1, 1),
            "height": round((base - 4) * count / top, 1),
            "title": f"{i * step:g} to {(i + 1) * step:g} {noun}: {count:,} pairs",
        }
        for i, count in enumerate(counts)
        if count
    ]
    every = max(1, len(counts) // 6)
    ticks = [
        {"x": round(i * each, 1), "text": f"{i * step:g}", "anchor": "start" if i == 0 else "middle"}
        for i in range(0, len(counts), every)
    ]
    beyond = f"; {histogram['beyond']:,} lie beyond, up to {histogram['max']:.4g}" if histogram["beyond"] else ""
    text = f"{title}, {histogram['count']:,} pairs{beyond}"
    return {"title": text, "alt": text, "width": width, "height": height, "base": base, "bars": bars, "ticks": ticks}


def _dots(rows: list[dict[str, Any]], width: int = 560) -> dict[str, Any] | None:
    """Two ranges a class on one logarithmic axis."""
    values = [value for row in rows for key in ("own", "after") if row[key] for value in row[key]]
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    low = math.floor(math.log10(max(min(positive), 1e-6)))
    high = max(low + 1, math.ceil(math.log10(max(positive))))
    left = 24 + min(150, 7 * max(len(row["name"]) for row in rows))

    def place(value: float) -> float:
        along = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return round(left + (width - left - 16) * along, 1)

    drawn = []
    for i, row in enumerate(rows):
        y = 14 + 26 * i
        marks = [
            {
                "kind": kind,
                "y": y + shift,
                "x": [place(value) for value in row[kind]],
                "title": f"{row['name']}, {what}: median {row[kind][2]:.3g} nats, 5 % {row[kind][0]:.3g}, 95 % "
                f"{row[kind][4]:.3g}",
            }
            for kind, shift, what in (("own", -5, "images"), ("after", 5, "counterfactuals"))
            if row[kind]
        ]
        drawn.append(
            {"name": row["name"] if len(row["name"]) <= 22 else row["name"][:21] + "…", "y": y, "marks": marks}
        )
    ticks = [{"x": place(10.0**power), "text": f"{10.0**power:g}"} for power in range(low, high + 1)]
    return {
        "width": width,
        "height": 26 * len(rows) + 24,
        "left": left,
        "rows": drawn,
        "ticks": ticks,
        "alt": "Epistemic uncertainty of images and of counterfactuals, by class: "
        + "; ".join(mark["title"] for row in drawn for mark in row["marks"]),
    }
