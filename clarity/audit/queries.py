"""Documented SQL queries of an audit, run by DuckDB.

Each is a file in sql/: its comments say what it answers, and the defaults of its parameters as JSON.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    import duckdb


class PairFigure(NamedTuple):
    """One figure of class pairs: its title, its unit, what it says, and whether it is a share, low ones dark."""

    title: str
    label: str
    doc: str
    share: bool = False


#: Columns of the view class_pair_figures that ``plots.class_pairs`` and the report show.
PAIR_FIGURES = {
    "strict_validity": PairFigure(
        "Converged", "share of pairs", "searches in which the target reached the requested probability", True
    ),
    "reencoded_agreement": PairFigure(
        "Survived re-encoding", "share of pairs", "pictures still classified as the target when encoded again", True
    ),
    "judge_agreement": PairFigure(
        "Judge sees the target", "share of pairs", "pictures that a held-out network classifies as the target", True
    ),
    "confirmed_share": PairFigure("Confirmed", "share of pairs", "pictures that passed every check", True),
    "median_steps": PairFigure("Steps", "updates, median of converged pairs", "length of the search"),
    "median_distance": PairFigure("Latent distance", "L1, median of converged pairs", "size of the change"),
    "epistemic_initial": PairFigure("Disagreement before", "nats, median", "the ensemble's, about the images"),
    "epistemic_final": PairFigure("Disagreement after", "nats, median", "the ensemble's, about the counterfactuals"),
    "pairs": PairFigure("Pairs", "count", "number of pairs"),
}


@dataclass(frozen=True)
class Query:
    """One question: what it answers, its SQL with $parameters, and their defaults."""

    doc: str
    sql: str
    parameters: dict[str, Any]


@functools.cache
def load_queries() -> dict[str, Query]:
    """Every question of sql/, by name."""
    queries = {}
    for name, text in read_sql("sql").items():
        lines = text.splitlines()
        comments = [line.removeprefix("-- ") for line in lines if line.startswith("--")]
        parameters = [line.removeprefix("Parameters: ") for line in comments if line.startswith("Parameters: ")]
        queries[name] = Query(
            doc=" ".join(line for line in comments if not line.startswith("Parameters: ")),
            sql="\n".join(line for line in lines if not line.startswith("--")),
            parameters=json.loads(parameters[0]) if parameters else {},
        )
    return queries


@functools.cache
def load_views() -> dict[str, str]:
    """The views that questions, findings, figures and the page share: CREATE VIEW statements, by name."""
    return read_sql("sql/views")


@functools.cache
def statement(name: str) -> str:
    """A statement of sql/parts, of which summary, findings and page are made."""
    return read_sql("sql/parts")[name]


def read_sql(directory: str) -> dict[str, str]:
    """The texts of the .sql files of a directory beside this file, by name, sorted."""
    files = resources.files("clarity.audit").joinpath(directory).iterdir()
    return {file.name[:-4]: file.read_text("utf-8") for file in sorted(files, key=str) if file.name.endswith(".sql")}


def connect(codes: Any, counterfactuals: Any, **others: Any) -> duckdb.DuckDBPyConnection:
    """Opens a DuckDB with ``codes``, ``counterfactuals``, the tables of ``others``, and the views."""
    import duckdb  # here, so that a model can be trained and pictures explained without it

    con = duckdb.connect()
    con.execute("SET enable_progress_bar = false")  # it would be drawn into notebooks
    for name, table in {"codes": codes, "counterfactuals": counterfactuals, **others}.items():
        con.register(name, table)
    for name, view in load_views().items():
        if name != "prediction_agreement" or has_predictions(con):
            con.execute(view)
    return con


def has_predictions(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the audit was given predictions of the user's own model."""
    return "prediction" in con.table("codes").columns


def query(con: duckdb.DuckDBPyConnection, name: str, *, metadata: Any = None, **parameters: Any) -> pa.Table:
    """Answers a documented question; ValueError for an unknown one or an unknown parameter, or lacking metadata."""
    queries = load_queries()
    if name not in queries:
        raise ValueError(f"name: expected one of {', '.join(queries)}, got {name!r}")
    known = queries[name].parameters
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"parameters: {name} takes {sorted(known) or 'none'}, got {unknown}")
    if metadata is not None:
        con.register("metadata", metadata)
    elif name == "by_metadata":
        raise ValueError("metadata: expected a table with the columns image_id and segment, got none")
    return con.sql(queries[name].sql, params={**known, **parameters}).to_arrow_table()
