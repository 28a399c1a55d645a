"""The documented questions: each runs, stands in the documentation, and agrees with pandas and Polars."""

from pathlib import Path

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audits import Planted, make_tables, replaced
from pyarrow.dataset import dataset

from clarity.audit.queries import connect, load_queries, query

DOCS = Path(__file__).parent.parent.parent / "docs" / "queries.md"


@pytest.mark.parametrize("name", load_queries())
def test_query_runs_and_stands_in_the_documentation_with_its_columns(name: str) -> None:
    text, asked = DOCS.read_text(), load_queries()[name]
    part = text[text.index(f"### `{name}`") :].split("\n### ")[0]
    assert asked.doc in part and asked.sql in part and asked.doc.endswith((".", "?"))
    tables = make_tables(planted=Planted(hard=(1, 3), wrong_labels=4, unreadable=2, prediction_errors=5))
    metadata = pa.table({"image_id": tables.codes["image_id"], "segment": [f"s{i % 3}" for i in range(120)]})
    con = connect(tables.codes, tables.counterfactuals)
    parameters = {"source": "bee", "target": "cow"} if name == "closest_to" else {}
    table = query(con, name, metadata=metadata if name == "by_metadata" else None, **parameters)
    assert table.num_rows
    if name != "predictions":
        assert part.split("```text\n")[1].splitlines()[0].split() == table.column_names


def test_query_answers_agree_with_pandas_and_polars(tmp_path: Path) -> None:
    tables = make_tables(planted=Planted(hard=(1, 3)))
    path = tmp_path / "pairs.parquet"
    pq.write_table(tables.counterfactuals, path)
    con = connect(tables.codes, dataset(path))
    nearest = query(con, "nearest_counterfactual", count=1000)
    frame = pandas.read_parquet(path)
    frame = frame[frame.converged].sort_values(["distance_z_l1", "target"]).groupby("image_id").first()
    assert nearest.num_rows == len(frame)
    assert frame.loc[nearest["image_id"].to_pylist(), "target_name"].tolist() == nearest["target_name"].to_pylist()
    matrix = query(con, "class_pairs").to_pylist()
    expected = (
        polars.read_parquet(path)
        .group_by("source", "target")
        .agg(polars.col("steps").filter(polars.col("converged")).median(), polars.col("converged").mean().round(4))
        .sort("source", "target")
        .to_dicts()
    )
    assert [(row["median_steps"], row["strict_validity"]) for row in matrix] == [
        (row["steps"], row["converged"]) for row in expected
    ]


def test_query_finds_the_images_closest_to_another_class() -> None:
    tables = make_tables(planted=Planted(edge=5))
    con = connect(tables.codes, tables.counterfactuals)
    rows = query(con, "closest_to", source="ant", target="cow", count=3).to_pylist()
    assert len(rows) == 3 and rows[0]["image_id"] in tables.edge
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)


def test_query_ranks_class_pairs_that_never_converge_as_the_hardest() -> None:
    tables = make_tables()
    pairs = tables.counterfactuals
    source, target = (pairs[name].to_numpy() for name in ("source", "target"))
    rarely = (source == 2) & (target == 3) & (np.arange(len(pairs)) > np.flatnonzero((source == 2) & (target == 3))[0])
    tables = replaced(tables, "counterfactuals", "converged", ~rarely & ~((source == 1) & (target == 0)))
    found = query(connect(tables.codes, tables.counterfactuals), "hardest_pairs", count=2).to_pandas()
    assert found.source_name.tolist() == [tables.class_names[1], tables.class_names[2]]
    assert found.strict_validity[0] == 0 < found.strict_validity[1] < 0.5


def test_query_refuses_what_it_does_not_know() -> None:
    tables = make_tables(40)
    con = connect(tables.codes, tables.counterfactuals)
    assert "prediction_agreement" not in con.sql("SHOW TABLES").df().name.tolist(), "without predictions"
    with pytest.raises(ValueError, match=r"name: expected one of asymmetries, .*, got 'hardest'"):
        query(con, "hardest")
    with pytest.raises(ValueError, match="takes \\['count'\\], got \\['limit'\\]"):
        query(con, "hardest_pairs", limit=3)
    with pytest.raises(ValueError, match="metadata: expected a table with the columns image_id and segment, got none"):
        query(con, "by_metadata")


def test_views_agree_with_numpy() -> None:
    tables = make_tables(planted=Planted(hard=(1, 3), lost=3, nonfinite=2, prediction_errors=5))
    con = connect(tables.codes, tables.counterfactuals)
    pairs = tables.counterfactuals.to_pandas()
    total = con.sql("FROM class_pair_figures WHERE source IS NULL").df().iloc[0]
    good = pairs[pairs.converged]
    assert (total.pairs, total.converged, total.nonfinite) == (len(pairs), len(good), 2)
    assert total.median_distance == np.median(good.distance_z_l1) and total.mean_steps == pairs.steps.mean()
    cell = con.sql("FROM class_pair_figures WHERE source = 1 AND target = 3").df().iloc[0]
    mine = pairs[(pairs.source == 1) & (pairs.target == 3)]
    good = mine[mine.converged]
    expected = {
        "pairs": len(mine),
        "strict_validity": mine.converged.mean(),
        "reencoded_agreement": (mine.reencoded_class == mine.target).mean(),
        "median_steps": good.steps.median(),
        "median_distance": good.distance_z_l1.median(),
        "epistemic_initial": mine.epistemic_initial.median(),
        "epistemic_final": mine.epistemic_final.median(),
    }
    assert {name: cell[name] for name in expected} == pytest.approx(expected)
    agreement = con.sql("FROM prediction_agreement").df()
    assert agreement.images.sum() == 120
    assert agreement.images[agreement.prediction == agreement.source].sum() == 115
