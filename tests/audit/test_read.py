"""Reading an audit: committed shards, questions, summaries, other tools."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from audits import SEARCHED, model_card
from shards import make_tables

from clarity import storage
from clarity.audit.commits import claim, commit_shard, to_parquet
from clarity.audit.plan import Plan
from clarity.audit.queries import connect
from clarity.audit.read import read_audit
from clarity.audit.summary import describe, summarise, unreached
from clarity.findings.finding import gather
from clarity.findings.verdict import Verdict


def test_files_explain_themselves(plan: Plan, filled: str) -> None:
    file = pq.ParquetFile(Path(filled, "counterfactuals/shard-00000.parquet"))
    metadata = file.schema_arrow.metadata
    assert metadata[b"clarity.fingerprint"].decode() == plan.fingerprint
    assert json.loads(metadata[b"clarity.class_names"]) == plan.class_names
    assert json.loads(metadata[b"clarity.config"]) == plan.config
    assert metadata[b"clarity.method"] == b"clarity"
    assert metadata[b"clarity.image_shape"] == b"1,8,12"
    assert metadata[b"clarity.schema_version"] == b"2"
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_read_audit_sees_committed_shards_only(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = tmp_path / "audit"
    with claim(str(uri), plan, model_dir):
        assert read_audit(uri).codes.count_rows() == 0
        for shard in (0, 2):
            commit_shard(str(uri), plan, shard, make_tables(plan, shard), {})
        storage.write_bytes(str(uri / "codes/shard-00001.parquet"), to_parquet(make_tables(plan, 1)["codes"]))
        found = read_audit(uri)
        assert sorted(found.codes.to_table()["image_id"].to_pylist()) == ["a", "b", "c"]
        assert not found.complete
        assert found.traces is None


def test_damaged_shards_can_be_left_out(filled: str) -> None:
    whole = read_audit(filled).summary()
    for path in Path(filled, "codes").glob("*00001*"):
        path.write_bytes(bytes(path.stat().st_size))  # of its size, or its commit would not count
    found = read_audit(filled, without=[1]).summary()
    assert found["committed"] == whole["committed"] - 1 and 0 < found["images"] < whole["images"]


def test_audit_repr_says_what_is_there(filled: str) -> None:
    said = repr(read_audit(filled)).splitlines()
    assert said[0] == f"Audit of 5 images by 'clarity' in {filled}"
    assert "3 of 3 committed" in said[1]
    assert said[2].endswith("4: ant, bee, cow, dog")
    assert "5 rows" in said[3] and "12 rows" in said[4]


#: What the job adds to a summary when a run has ended.
ENDED = dict.fromkeys(("pairs_per_second", "seconds", "redecoded"), 0) | {"problems": []}


def test_read_audit_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no plan.json in .*: check the path"):
        read_audit(tmp_path)


def test_summarise_counts(filled: str) -> None:
    found = read_audit(filled).summary()
    pairs = read_audit(filled).counterfactuals.to_table()
    assert found["images"] == 5
    assert found["errors"] == {"truncated PNG": 1} and found["first_unread"] == {"truncated PNG": "c"}
    assert "           1 x truncated PNG (c)\n" in describe(found | ENDED)
    written_before = {name: value for name, value in found.items() if name != "first_unread"}
    assert "           1 x truncated PNG\n" in describe(written_before | ENDED)
    assert found["pairs"] == len(pairs) == 12
    assert found["converged"] == pc.sum(pairs["converged"]).as_py()
    assert found["median_steps"] == 7
    assert found["mean_steps"] == round(pc.mean(pairs["steps"]).as_py(), 2)
    assert found["engines"] == {"plain": 3}
    assert found["judged"] == found["judged_as_target"] == len(pairs)
    storage.write_json(str(Path(filled, "model", "model.json")), model_card(judge=(0.9, 0.8)))
    told = "12 (100.00 %); right on 90 % of held-out images, 80 % of their reconstructions\n"
    assert "judge      sees the target in 12 (100.00 %)\n" in describe(found | ENDED)
    assert f"judge      sees the target in {told}" in describe(read_audit(filled).summary() | ENDED)
    assert found["seconds_by_stage"] == {"search": 1.5}
    assert len(found["slowest_class_pairs"]) == 5
    slowest = found["slowest_class_pairs"][0]
    mine = pairs.filter(
        pc.and_(pc.equal(pairs["source_name"], slowest["source"]), pc.equal(pairs["target_name"], slowest["target"]))
    )
    assert slowest["pairs"] == len(mine) and slowest["mean_steps"] == round(pc.mean(mine["steps"]).as_py(), 1)


def test_summarise_warns_of_a_model_of_another_data_set(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = read_audit(filled)
    codes = audit.codes.to_table()
    assert audit.summary()["warnings"] == []
    nothing = pa.nulls(len(codes), pa.int32())
    strange = codes.set_column(codes.column_names.index("label"), codes.schema.field("label"), nothing)
    commits = {0: {"clipped": 2}, 1: {}, 2: {"clipped": 1}}
    found = summarise(audit.plan, commits, pads.dataset(strange), audit.counterfactuals)
    labelled = len(codes) - codes["label_name"].null_count
    assert found["warnings"][0].startswith(f"None of the {labelled} labels of the data is a class of the model (")
    for module in ("audit.read", "findings.finding"):  # whose model has no figures here
        monkeypatch.setattr(f"clarity.{module}.verdict", lambda card, foreign, _: Verdict(f"foreign {foreign}", ""))
    for foreign, table in ((False, codes), (True, strange)):
        level = f"foreign {foreign}"
        assert replace(audit, codes=pads.dataset(table)).summary()["verdict"]["level"] == level
        assert gather(connect(table, audit.counterfactuals), audit.class_names, **SEARCHED).verdict.level == level
    assert found["warnings"][1].startswith("3 images hold values above the range")
    assert describe(found | ENDED).splitlines()[0].startswith("WARNING    None of the")


def test_summarise_of_nothing_is_empty(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir):
        found = read_audit(uri).summary()
    assert (found["images"], found["pairs"], found["converged"]) == (0, 0, 0)
    assert found["mean_steps"] is None and found["median_steps"] is None and found["slowest_class_pairs"] == []
    told = describe(found | ENDED).splitlines()
    assert told[0].startswith("model  ") and told[1:] == ["INCOMPLETE 0 of 3 shards; the same command resumes"]


READERS = """
import duckdb, pandas, polars, sys
import pyarrow.dataset as pads
files = path + "/counterfactuals/*.parquet"
arrow = pads.dataset(path + "/counterfactuals").to_table().to_pandas()
sql = duckdb.sql(f"FROM '{files}' ORDER BY target, image_id").df()
lazy = polars.read_parquet(files).to_pandas()
frame = pandas.read_parquet(path + "/counterfactuals")
for table in (arrow, sql, lazy, frame):
    print(len(table), len(table["z_cf"].iloc[0]), table["steps"].sum())
assert "ray" not in sys.modules
"""


def test_tables_are_read_by_pyarrow_duckdb_polars_and_pandas(filled: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", f"path = {filled!r}\n{READERS}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"12 5 {12 * 7}"] * 4


def test_audits_of_another_schema_are_refused(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "old")
    with claim(uri, replace(plan, schema_version=1), model_dir):
        pass
    with pytest.raises(ValueError, match="its tables are of version 1, not 2"):
        read_audit(uri)


def test_unreached_targets_are_told_with_the_threshold_to_try() -> None:
    assert unreached({"pairs": 10, "converged": 9, "target_prob_p5": 0.5}) == ""
    assert unreached({"pairs": 0, "converged": 0, "target_prob_p5": None}) == ""
    told = unreached({"pairs": 10, "converged": 6, "target_prob_p5": 0.714})
    assert told.startswith("4 (40.00 %) of the searches did not converge; 95 % of the pairs reach 0.714")
    assert told.endswith("try --min-target-prob auto, or 0.71")
    told = unreached({"pairs": 10, "converged": 0, "target_prob_p5": 0.303})
    assert told.endswith("95 % of the pairs reach 0.303: try --min-target-prob auto")
    for reached, advice in ((0.714, ": try --min-target-prob 0.71"), (0.303, "")):
        told = unreached({"pairs": 10, "converged": 0, "target_prob_p5": reached, "by_class": True})
        assert told.endswith(f"95 % of the pairs reach {reached}{advice}"), "auto was asked for already"
