"""Opens the audits of a page: their tables in DuckDB, their model, their findings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clarity import storage
from clarity.audit.queries import connect, statement
from clarity.audit.read import ATTRIBUTES_FILE, Audit, read_audit
from clarity.findings.differences import Differences, mean_differences
from clarity.findings.finding import Facts, gather
from clarity.findings.registry import Results, find
from clarity.images import decode_png
from clarity.report.text import short_names

if TYPE_CHECKING:
    import duckdb

    from clarity.model import Model


#: Letters of a class name on the page.
MAX_NAME = 40
#: Pairs behind the mean changes.
CHANGE_PAIRS = 4_500


@dataclass(frozen=True)
class View:
    """One audit of the page, the name under which the page shows it, and the model that the audit holds."""

    name: str
    audit: Audit
    model: Model | None
    facts: Facts
    results: Results

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes as the page writes them, by index: long ones are shortened."""
        return self.facts.class_names

    def records(self, sql: str, parameters: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Runs a query; its rows as dictionaries."""
        return self.facts.con.sql(sql, params=parameters or {}).to_arrow_table().to_pylist()


def decode(model: Model, z: Any) -> np.ndarray:
    """Images (B, C, H, W) float32 of codes (B, D)."""
    import torch

    from clarity.rows import decode_rows

    codes = np.array(z, np.float32).reshape(-1, model.latent_dim)
    return decode_rows(model.decoder, torch.from_numpy(codes)).numpy()


def classify(view: View, z: np.ndarray, image_ids: Sequence[str]) -> np.ndarray:
    """Mean class probabilities (B, K) at codes (B, D) float32, each by the ensemble that explained its image."""
    import torch

    from clarity.ids import fold_of
    from clarity.rows import logits_rows, mean_probs

    model = view.model
    assert model is not None
    ensembles = model.folds if view.audit.plan.model.get("num_folds") else (model.ensemble,)
    folds = np.array([fold_of(name, len(ensembles)) for name in image_ids])
    probs = np.zeros((len(z), model.num_classes), np.float32)
    for fold, ensemble in enumerate(ensembles):
        mine = folds == fold
        probs[mine] = mean_probs(logits_rows(ensemble, torch.from_numpy(z[mine])))
    return probs


def open_views(uris: Sequence[str]) -> list[View]:
    """Opens audits that share class names and image shape."""
    audits = [read_audit(uri) for uri in uris]
    for other in audits[1:]:
        for what in ("class_names", "image_shape"):
            expected, got = getattr(audits[0].plan, what), getattr(other.plan, what)
            if expected != got:
                raise ValueError(
                    f"audits: expected audits with the same {what.replace('_', ' ')}, but "
                    f"{storage.display(audits[0].uri)} has {expected} and {storage.display(other.uri)} has {got}; "
                    "make two reports"
                )
    return [open_view(audit, name) for audit, name in zip(audits, names_of(audits))]


def names_of(audits: Sequence[Audit]) -> list[str]:
    """Distinct names: the methods where these differ, else the directories, else these with a number."""
    directories = [storage.name(audit.uri) for audit in audits]
    for names in ([audit.plan.method for audit in audits], directories):
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{name} {i + 1}" for i, name in enumerate(directories)]


def open_view(audit: Audit, name: str) -> View:
    """Opens one audit; without a model in its directory the page has tables only."""
    attributes, directory = (storage.join(audit.uri, part) for part in (ATTRIBUTES_FILE, "model"))
    con = connect(audit.codes, audit.counterfactuals)
    if storage.exists(attributes):
        con.register("attributes", pq.read_table(io.BytesIO(storage.read_bytes(attributes))))
    model = None
    if storage.exists(storage.join(directory, "model.json")):
        from clarity.model import load_model

        model = load_model(directory)
    facts = gather(
        con,
        short_names(audit.class_names, MAX_NAME),
        thresholds=audit.plan.thresholds,
        max_steps=audit.plan.config["max_steps"],
        card=None if model is None else model.card,
        differences=mean_changes(con, audit, model),
        # No folds, and not known to be held out; a plan without the entry knew its split alone.
        trained_on_labels=not audit.plan.model.get("num_folds")
        and audit.plan.dataset.get("trained", audit.plan.dataset.get("split") in ("train", "all")) is not False,
        keep=audit.plan.keep,
        predictor=audit.plan.checks.get("predictor"),
    )
    return View(name, audit, model, facts, find(facts))


def mean_changes(con: duckdb.DuckDBPyConnection, audit: Audit, model: Model | None) -> Differences | None:
    """Mean changes over a sample: as many pairs of each target, evenly over sources, chosen by a hash of the id."""
    num_classes = len(audit.class_names)
    table = con.sql(statement("page_changes"), params={"each": max(20, CHANGE_PAIRS // num_classes)}).to_arrow_table()
    if not table.num_rows:
        return None
    # An image is in many pairs: its own picture is made once.
    _, first, row_of = np.unique(table["image_id"].to_numpy(), return_index=True, return_inverse=True)
    own = table.take(pa.array(first))
    # The search starts from the reconstruction, so its code comes before the stored image.
    stored = own["x"] if model is None else pa.chunked_array([pa.nulls(len(own))])
    before = pictures(own["z"], stored, model, audit.plan.image_shape)
    after = pictures(table["z_cf"], table["x_cf"], model, audit.plan.image_shape)
    if before is None or after is None:
        return None
    source, target = table["source"].to_numpy(), table["target"].to_numpy()
    return mean_differences(before[row_of], after, source, target, num_classes)


def pictures(
    codes: pa.ChunkedArray, stored: pa.ChunkedArray, model: Model | None, image_shape: tuple[int, int, int]
) -> np.ndarray | None:
    """Pictures (P, C, H, W) in [0, 1]: decoded if some are not stored; None where neither is possible."""
    if not stored.null_count:
        return decode_png(stored.combine_chunks(), image_shape).astype(np.float32) / 255
    return None if model is None else decode(model, codes.to_pylist())
