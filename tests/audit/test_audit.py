"""The audit directory: plans, claims, commits, what a reader sees, and what verification finds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pytest

from clarity import schema, storage
from clarity.audit import lock
from clarity.audit.commits import (
    GivenUp,
    begin_attempt,
    claim,
    commit_shard,
    drop_commits,
    scratch_directory,
    to_parquet,
    unreachable_paths,
    valid_commits,
)
from clarity.audit.lock import AuditBusy, FileLock, Lease
from clarity.audit.plan import Plan, ids_digest, rows_per_shard, shard_table
from clarity.audit.read import read_audit
from clarity.audit.summary import describe, summarise
from clarity.audit.verify import verify
from clarity.images import decode_png, encode_png

ROOT = Path(__file__).parents[2]
IDS = ["b", "a", "d e", "ü\n", "c"]


def make_tables(plan: Plan, shard: int) -> dict[str, pa.Table]:
    """A shard's tables as a model might fill them; the image "c" could not be read."""
    span, classes, latent = plan.shards[shard], len(plan.class_names), plan.model["latent_dim"]
    ids = sorted(IDS[span["start"] : span["stop"]])
    rng = np.random.default_rng(shard)
    ok = np.array([name != "c" for name in ids])
    pictures = encode_png(rng.integers(0, 256, (len(ids), *plan.image_shape), np.uint8))
    source = np.array([sum(name.encode()) % classes for name in ids], np.int32)

    def nullable(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=~ok)

    codes = {
        "image_id": pa.array(ids),
        "label": pa.array(source % 2),
        "label_name": pa.array(["x"] * len(ids)),
        "source": nullable(source, pa.int32()),
        "source_name": nullable([plan.class_names[k] for k in source], pa.string()),
        "probs": schema.fixed_size_list(rng.random((len(ids), classes), np.float32), ok),
        **{name: nullable(np.ones(len(ids)), pa.float32()) for name in ("predictive", "aleatoric", "epistemic")},
        "z": schema.fixed_size_list(rng.random((len(ids), latent), np.float32), ok),
        "reconstruction_l1": nullable(np.ones(len(ids)), pa.float32()),
        "status": pa.array(np.where(ok, "ok", "error")),
        "error": pa.array(["broken"] * len(ids), mask=ok),
        "x": nullable(pictures, pa.binary()),
    }
    rows = [(target, i) for target in range(classes) for i in range(len(ids)) if ok[i] and source[i] != target]
    count, of = len(rows), [i for _, i in rows]
    target = np.array([target for target, _ in rows], np.int32)
    converged = rng.random(count) < 0.8
    numbers = {field.name: pa.array(rng.random(count), pa.float32()) for field in schema.counterfactuals_schema(latent)
               if field.type == pa.float32()}  # fmt: skip
    pairs = numbers | {
        "image_id": pa.array([ids[i] for i in of]),
        "label": codes["label"].take(pa.array(of, pa.int64())),
        "source": pa.array(source[of], pa.int32()),
        "source_name": pa.array([plan.class_names[source[i]] for i in of]),
        "target": pa.array(target),
        "target_name": pa.array([plan.class_names[k] for k in target]),
        "method": pa.array([plan.method] * count),
        "status": pa.array(["ok"] * count),
        "converged": pa.array(converged),
        "steps": pa.array(np.where(converged, 7, plan.config["max_steps"]), pa.int32()),
        "confirmed": pa.nulls(count, pa.bool_()),
        "rungs": pa.array(np.zeros(count), pa.int32()),
        "target_prob_final": pa.array(np.where(converged, 0.995, 0.5), pa.float32()),
        "reencoded_class": pa.array(target),
        "judge_class": pa.array(target),
        "z_cf": schema.fixed_size_list(rng.random((count, latent), np.float32)),
        "x_cf": pa.array(encode_png(rng.integers(0, 256, (count, *plan.image_shape), np.uint8))),
    }

    def table(columns: dict[str, Any], expected: pa.Schema) -> pa.Table:
        return pa.table([columns[name] for name in expected.names], schema=expected)

    return {
        "codes": table(codes, plan.codes_schema()),
        "counterfactuals": table(pairs, plan.counterfactuals_schema()),
    }


@pytest.fixture
def plan() -> Plan:
    return Plan(
        dataset={"source": "digits", "data": "", "num_images": len(IDS), "listing": "f00", "extra": []},
        model={
            "fingerprint": "abc",
            "class_names": ["ant", "bee", "cow", "dog"],
            "image_shape": [1, 8, 12],
            "latent_dim": 5,
            "num_folds": 0,
            "sums": {},
        },
        method="clarity",
        config={"min_target_prob": 0.99, "max_steps": 20},
        targets=None,
        images="png",
        shards=shard_table(IDS, 2),
        versions={"clarity": "0.1.0"},
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    return str(tmp_path / "model")


@pytest.fixture
def filled(plan: Plan, model_dir: str, tmp_path: Path) -> str:
    """A complete audit."""
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir) as held:
        for shard in held.pending:
            commit_shard(uri, plan, shard, make_tables(plan, shard), {"engine": "plain", "seconds": {"search": 0.5}})
        held.refresh()
        held.finish(read_audit(uri).summary(), verify(uri).ok)
    return uri


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_plan_survives_json_and_notices_changes(plan: Plan) -> None:
    value = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(value) == plan
    value["config"]["max_steps"] = 21
    with pytest.raises(ValueError, match="fingerprint"):
        Plan.from_json(value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "latent"}, 'method: "clarity" in the audit, "latent" in this run'),
        ({"config": {"min_target_prob": 0.9, "max_steps": 20}}, "config.min_target_prob: 0.99 in the audit, 0.9"),
        ({"images": "none"}, "images"),
        ({"targets": [1, 2]}, "targets"),
        ({"only": "misclassified"}, "only"),
        ({"trace": 3}, "trace"),
        ({"shards": shard_table(IDS, 3)}, "shards.count: 3 in the audit, 2 in this run"),
        ({"versions": {"clarity": "9"}}, "versions.clarity"),
    ],
)
def test_plan_names_what_differs(plan: Plan, change: dict[str, Any], named: str) -> None:
    other = replace(plan, **change)
    assert other.fingerprint != plan.fingerprint
    assert any(line.startswith(named) for line in plan.differences(other)), plan.differences(other)


def test_plan_names_other_data_and_another_model(plan: Plan) -> None:
    other = replace(plan, dataset=plan.dataset | {"listing": "f01"}, shards=shard_table(IDS[::-1], 2))
    assert plan.differences(other) == ["data: other images or labels than in the audit"]
    fewer = replace(plan, dataset=plan.dataset | {"listing": "f01", "num_images": 3}, shards=shard_table(IDS[:3], 2))
    assert plan.differences(fewer) == ["data: 5 images in the audit, 3 in this run"]
    assert plan.differences(replace(plan, model=plan.model | {"fingerprint": "d"}))[0].startswith("model.fingerprint")


def test_plan_does_not_depend_on_date_or_place_of_the_data(plan: Plan) -> None:
    other = replace(plan, created="2027", dataset=plan.dataset | {"data": "/elsewhere"})
    assert other.fingerprint == plan.fingerprint
    assert not plan.differences(other)


def test_rows_per_shard_keeps_every_limit() -> None:
    assert rows_per_shard(60_000, 10_000) == 256
    assert rows_per_shard(60_000, 1 << 20) == 32
    assert rows_per_shard(60_000, 10_000, gpu=True) == 4096
    assert rows_per_shard(60_000, 1 << 20, gpu=True) == 512
    assert rows_per_shard(500, 10_000, gpu=True) == 63
    assert rows_per_shard(60_000, 1 << 30) == 1
    assert rows_per_shard(500, 10_000) == 63
    assert rows_per_shard(60_000, 10_000, seconds_per_image=5.0) == 4
    assert rows_per_shard(60_000, 10_000, seconds_per_image=500.0) == 1


def test_shard_table_covers_every_image_once() -> None:
    table = shard_table(IDS, 2)
    assert [(span["start"], span["stop"]) for span in table] == [(0, 2), (2, 4), (4, 5)]
    assert table[0]["ids"] == ids_digest(["a", "b"]) != ids_digest(["ab"])
    with pytest.raises(ValueError, match="at least 1"):
        shard_table(IDS, 0)


# ---- claims --------------------------------------------------------------------------------------------------------


def test_claim_makes_and_resumes(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir) as held:
        assert held.pending == [0, 1, 2]
        assert unreachable_paths(uri, held.run) == []
        assert unreachable_paths(uri, "another") == ["out"]
        commit_shard(uri, plan, 1, make_tables(plan, 1), {})
    assert (tmp_path / "audit" / "model" / "model.json").exists()
    with claim(uri, replace(plan, created="later"), model_dir) as held:
        assert held.pending == [0, 2]
        assert held.plan.created == plan.created
    assert not (tmp_path / "audit" / "_lock").exists()


def test_claim_refuses_another_plan(plan: Plan, filled: str, model_dir: str) -> None:
    with (
        pytest.raises(ValueError, match=r"another plan: config\.max_steps: 20 in the audit, 30 in this run"),
        claim(filled, replace(plan, config=plan.config | {"max_steps": 30}), model_dir),
    ):
        pass


def test_claim_refuses_what_is_no_audit(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    for name, reason in (("file", "found a file"), ("photos", "found cat.png")):
        with pytest.raises(ValueError, match=reason), claim(str(tmp_path / name), plan, model_dir):
            pass
    assert (tmp_path / "photos" / "cat.png").exists()


def test_claim_refuses_a_damaged_plan(plan: Plan, filled: str, model_dir: str) -> None:
    path = Path(filled, "plan.json")
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"plan\.json is damaged"), claim(filled, plan, model_dir):
        pass


HOLD = """
import sys, time
from clarity.audit.lock import FileLock
lock = FileLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_claim_is_refused_while_another_process_holds_it(plan: Plan, filled: str, model_dir: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, filled], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(AuditBusy, match=f"process {holder.pid}"), claim(filled, plan, model_dir):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with claim(filled, plan, model_dir) as held:
        assert held.complete


@pytest.fixture
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    monkeypatch.setattr(lock, "STALE_S", 0.4)
    monkeypatch.setattr(lock, "SETTLE_S", 0.05)


def write_holder(uri: str) -> None:
    holder = {"run": "other", "host": "elsewhere", "pid": 1}
    storage.write_bytes(storage.join(uri, "_lock"), json.dumps(holder).encode())


def test_lease_is_refused_while_its_holder_renews_it(quick_renewals: None, tmp_path: Path) -> None:
    first = Lease(str(tmp_path))
    with pytest.raises(AuditBusy):
        Lease(str(tmp_path))
    first.release()
    second = Lease(str(tmp_path))
    second.release()
    assert not (tmp_path / "_lock").exists()


def test_lease_is_taken_over_from_a_silent_holder(quick_renewals: None, tmp_path: Path) -> None:
    write_holder(str(tmp_path))
    start = time.monotonic()
    Lease(str(tmp_path)).release()
    assert time.monotonic() - start > 0.4


def test_lease_notices_that_it_was_taken_over(quick_renewals: None, tmp_path: Path) -> None:
    held = Lease(str(tmp_path))
    write_holder(str(tmp_path))
    held.thread.join(5)
    assert held.lost
    held.release()
    assert json.loads((tmp_path / "_lock").read_text())["run"] == "other"


def test_lease_of_those_that_begin_at_once_is_held_by_one(
    quick_renewals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SETTLE_S", 0.5)
    monkeypatch.setattr(lock, "STALE_S", 10.0)
    got: list[str] = []
    locks: list[Any] = []
    start = threading.Barrier(4)

    def take() -> None:
        start.wait()
        try:
            locks.append(Lease(str(tmp_path)))
            got.append("held")
        except AuditBusy:
            got.append("busy")

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["busy", "busy", "busy", "held"]
    locks[0].release()


def test_file_lock_of_two_threads_is_held_by_one(tmp_path: Path) -> None:
    got: list[str] = []

    def take() -> None:
        try:
            held = FileLock(str(tmp_path))
        except AuditBusy:
            got.append("busy")
            return
        got.append("held")
        time.sleep(0.3)
        held.release()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["busy", "busy", "busy", "held"]


def test_claim_notices_that_its_lock_was_removed(plan: Plan, filled: str, model_dir: str) -> None:
    with contextlib.ExitStack() as later:
        with claim(filled, plan, model_dir) as first:
            Path(filled, "_lock").unlink()
            first.check()
            second = later.enter_context(claim(filled, plan, model_dir))
            with pytest.raises(AuditBusy, match="taken over"):
                first.check()
            with pytest.raises(AuditBusy):
                first.finish({}, verified=True)
        # The end of the first leaves the second what is its own.
        second.check()
        assert Path(filled, "_lock").exists()
        assert begin_attempt(filled, second.run, 0, "read") == 1


# ---- shards --------------------------------------------------------------------------------------------------------


def test_write_shard_gives_the_same_bytes_again(plan: Plan, filled: str) -> None:
    path = Path(filled, "counterfactuals/shard-00001.parquet")
    before = path.read_bytes()
    commit_shard(filled, plan, 1, make_tables(plan, 1), {"engine": "other"})
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [f"shard-0000{shard}.parquet" for shard in range(3)]


def test_files_explain_themselves(plan: Plan, filled: str) -> None:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(Path(filled, "counterfactuals/shard-00000.parquet"))
    metadata = file.schema_arrow.metadata
    assert metadata[b"clarity.fingerprint"].decode() == plan.fingerprint
    assert json.loads(metadata[b"clarity.class_names"]) == plan.class_names
    assert json.loads(metadata[b"clarity.config"]) == plan.config
    assert metadata[b"clarity.method"] == b"clarity"
    assert metadata[b"clarity.image_shape"] == b"1,8,12"
    assert metadata[b"clarity.schema_version"] == b"2"
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def break_commit(uri: str, how: str) -> None:
    path = Path(uri, "_commits/shard-00001.json")
    if how == "deleted":
        path.unlink()
    elif how == "torn":
        path.write_text(path.read_text()[:40])
    elif how == "empty":
        path.write_text("")
    elif how == "a list":
        path.write_text("[1]")
    elif how == "of another plan":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "other"}))
    elif how == "of another shard":
        path.write_text(Path(uri, "_commits/shard-00000.json").read_text())
    elif how == "its file cut short":
        data = Path(uri, "codes/shard-00001.parquet")
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "its file gone":
        Path(uri, "counterfactuals/shard-00001.parquet").unlink()


BROKEN = [
    "deleted",
    "torn",
    "empty",
    "a list",
    "of another plan",
    "of another shard",
    "its file cut short",
    "its file gone",
]


@pytest.mark.parametrize("how", BROKEN)
def test_commit_that_is_broken_makes_its_shard_pending(plan: Plan, filled: str, model_dir: str, how: str) -> None:
    break_commit(filled, how)
    with claim(filled, plan, model_dir) as held:
        assert held.pending == [1]
        assert not held.complete
        assert not Path(filled, "_SUCCESS").exists()
        # What no commit names is gone, so that a reader by name pattern sees no stray row.
        assert not Path(filled, "codes/shard-00001.parquet").exists()
        assert not Path(filled, "counterfactuals/shard-00001.parquet").exists()


def test_claim_removes_strays(plan: Plan, filled: str, model_dir: str) -> None:
    for name in ("codes/shard-00009.parquet", "counterfactuals/x.tmp", "_tmp/left", "_commits/shard-00077.json"):
        storage.write_bytes(storage.join(filled, name), b"torn")
    assert any("no commit names" in problem for problem in verify(filled).problems)
    with claim(filled, plan, model_dir) as held:
        assert held.complete
    assert verify(filled).ok
    assert not Path(filled, "_tmp/left").exists()


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


def test_audit_repr_says_what_is_there(filled: str) -> None:
    said = repr(read_audit(filled)).splitlines()
    assert said[0] == f"Audit of 5 images by 'clarity' in {filled}"
    assert "3 of 3 committed" in said[1]
    assert said[2].endswith("4: ant, bee, cow, dog")
    assert "5 rows" in said[3] and "12 rows" in said[4]


def test_audit_query_answers_a_documented_question(filled: str) -> None:
    opened = read_audit(filled)
    pairs = opened.counterfactuals.to_table()
    source, target = pairs["source_name"][0].as_py(), pairs["target_name"][0].as_py()
    found = opened.query("closest_to", source=source, target=target)
    mine = pc.and_(pc.equal(pairs["source_name"], source), pc.equal(pairs["target_name"], target))
    assert len(found) == len(pairs.filter(pc.and_(mine, pairs["converged"])))
    with pytest.raises(ValueError, match="name: expected one of"):
        opened.query("closest")


def test_read_audit_of_a_finished_one_follows_its_commits(filled: str) -> None:
    assert read_audit(filled).complete
    Path(filled, "_commits/shard-00001.json").unlink()
    assert sorted(read_audit(filled).commits) == [0, 2]


def test_read_audit_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no plan.json in .*: check the path"):
        read_audit(tmp_path)


def test_begin_attempt_counts_in_each_run(tmp_path: Path) -> None:
    uri = str(tmp_path)
    for run in ("run", "another"):
        storage.write_bytes(storage.join(scratch_directory(uri, run), "probe"), b"")
    assert [begin_attempt(uri, "run", 3, "read") for _ in range(3)] == [1, 2, 3]
    with pytest.raises(GivenUp, match="3 attempts at stage read"):
        begin_attempt(uri, "run", 3, "read")
    assert begin_attempt(uri, "run", 3, "write") == 1
    assert begin_attempt(uri, "another", 3, "read") == 1


def test_begin_attempt_refuses_a_place_that_is_not_the_drivers(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"does not see the run .*: it has ended, or this node does not mount"):
        begin_attempt(str(tmp_path / "audit"), "run", 3, "read")
    assert not (tmp_path / "audit").exists()


def test_worker_that_outlives_its_driver_can_write_nothing(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir) as held:
        dead = held.run
        begin_attempt(uri, dead, 0, "write")
        shutil.copytree(Path(uri, "_tmp"), tmp_path / "left")
    # A driver that was killed leaves its workplace; the next one takes it away before it reads the commits.
    shutil.move(tmp_path / "left", Path(uri, "_tmp"))
    with claim(uri, plan, model_dir) as held:
        assert [path.name for path in Path(uri, "_tmp").iterdir()] == [held.run]
        before = {path for path in Path(uri).rglob("*") if path.name != "_lock"}
        with pytest.raises(RuntimeError, match="it has ended"):
            begin_attempt(uri, dead, 0, "read")
        for shard in range(3):
            with pytest.raises(storage.StorageError, match="No such file"):
                tables = make_tables(plan, shard)
                commit_shard(uri, plan, shard, tables, {}, scratch=scratch_directory(uri, dead))
        assert {path for path in Path(uri).rglob("*") if path.name != "_lock"} == before
        commit_shard(uri, plan, 0, make_tables(plan, 0), {}, scratch=held.scratch)
        held.refresh()
        assert held.pending == [1, 2]
    assert not Path(uri, "_tmp").exists()


def test_rename_under_way_ends_before_or_not_at_all(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    """Workers of a dead run write without a pause while a new run begins: what lands, the new run sees."""
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir) as held:
        dead = held.run
        shutil.copytree(Path(uri, "_tmp"), tmp_path / "left")
    for _ in range(5):
        shutil.copytree(tmp_path / "left", Path(uri, "_tmp"))
        ended: list[str] = []

        def write(shard: int, ended: list[str] = ended) -> None:
            with contextlib.suppress(storage.StorageError):
                while True:
                    tables = make_tables(plan, shard)
                    commit_shard(uri, plan, shard, tables, {}, scratch=scratch_directory(uri, dead))
            ended.append("refused")

        threads = [threading.Thread(target=write, args=(shard,)) for shard in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        with claim(uri, plan, model_dir) as held:
            seen = held.commits
            before = {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*.*") if path.name != "_lock"}
            for thread in threads:
                thread.join()
            assert ended == ["refused"] * 3
            after = {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*.*") if path.name != "_lock"}
            assert after == before
            assert valid_commits(uri, plan) == seen
        for shard in range(3):
            Path(uri, f"_commits/shard-0000{shard}.json").unlink(missing_ok=True)


def test_claim_that_ended_before_its_plan_is_taken_up(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    with pytest.raises(storage.StorageError), claim(uri, plan, str(tmp_path / "no model")):
        pass
    with claim(uri, plan, model_dir) as held:
        assert held.pending == [0, 1, 2]


def test_record_failure_counts_the_attempts(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir) as held:
        for shard, stage in ((1, "read"), (1, "explain"), (1, "explain"), (2, "explain")):
            begin_attempt(uri, held.run, shard, stage)
        held.record_failure(1, "explain", "planted")
    found = storage.read_json(storage.join(uri, "_failures", "shard-00001.json"))
    assert found == {"shard": 1, "stage": "explain", "error": "planted", "attempts": 2}


def test_claim_takes_back_the_shards_of_other_engines(plan: Plan, filled: str, model_dir: str) -> None:
    commit_shard(filled, plan, 1, make_tables(plan, 1), {"engine": "native"})
    with claim(filled, plan, model_dir) as held:
        held.keep_one_engine()
        assert (held.engine, held.pending) == ("plain", [1])
        held.require_same_engine(1, "plain")
        held.require_same_engine(1, None)
        with pytest.raises(ValueError, match="engine: expected plain, which searched the shards before, got native"):
            held.require_same_engine(1, "native")


def test_audit_without_its_summary_is_not_complete(plan: Plan, filled: str, model_dir: str) -> None:
    Path(filled, "summary.json").unlink()
    with claim(filled, plan, model_dir) as held:
        assert not held.complete and not held.pending


def test_claim_copies_the_model_alone(plan: Plan, model_dir: str) -> None:
    Path(model_dir, "older").mkdir()
    Path(model_dir, "older", "plan.json").write_text("{}")
    with claim(storage.join(model_dir, "audit"), plan, model_dir):
        assert [path.name for path in Path(model_dir, "audit", "model").iterdir()] == ["model.json"]


def test_drop_commits_unmarks_the_audit(filled: str) -> None:
    drop_commits(filled, [])
    assert Path(filled, "_SUCCESS").exists()
    drop_commits(filled, [1])
    assert not Path(filled, "_SUCCESS").exists()
    assert sorted(read_audit(filled).commits) == [0, 2]


def test_finish_marks_only_what_is_verified(plan: Plan, filled: str, model_dir: str) -> None:
    success = Path(filled, "_SUCCESS")
    assert json.loads(success.read_text())["images"] == len(IDS)
    success.unlink()
    with claim(filled, plan, model_dir) as held:
        assert not held.complete
        held.finish({}, verified=False, unsound=[1])
        assert not success.exists() and not Path(filled, "_commits/shard-00001.json").exists()
        commit_shard(filled, plan, 1, make_tables(plan, 1), {})
        held.finish({}, verified=True)
        assert held.complete
    assert sorted(path.name for path in Path(filled).iterdir()) == [
        "_SUCCESS", "_commits", "codes", "counterfactuals", "model", "plan.json", "summary.json",
    ]  # fmt: skip


# ---- verification --------------------------------------------------------------------------------------------------


def test_verify_counts(plan: Plan, filled: str) -> None:
    found = verify(filled)
    assert found.ok, found.problems
    assert (found.images, found.errors, found.pairs) == (5, 1, 12)


def put(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    column = table[name].to_pylist()
    column[row] = value
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(column, table.schema.field(name).type))


def swap(table: pa.Table) -> pa.Table:
    return table.take(pa.array([1, 0, *range(2, len(table))]))


DAMAGE: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "pair missing": ("counterfactuals", lambda t: t.slice(1), "1 missing, 0 double"),
    "pair double": ("counterfactuals", lambda t: pa.concat_tables([t.slice(0, 1), t]), "0 missing, 1 double"),
    "pairs out of order": ("counterfactuals", swap, "out of order"),
    "target is the source": ("counterfactuals", lambda t: put(t, "target", 0, t["source"][0].as_py()), "1 missing"),
    "another image": ("counterfactuals", lambda t: put(t, "image_id", 0, "zz"), "1 not asked for"),
    "another source": ("codes", lambda t: put(t, "source", 0, (t["source"][0].as_py() + 1) % 4), "missing"),
    "another label": ("counterfactuals", lambda t: put(t, "label", 0, 3), "another label"),
    "image missing": ("codes", lambda t: t.slice(1), "does not hold the shard's images"),
    "images out of order": ("codes", swap, "does not hold the shard's images"),
    "converged flipped": (
        "counterfactuals",
        lambda t: put(t, "converged", 0, not t["converged"][0].as_py()),
        "converged disagrees",
    ),
    "steps out of range": ("counterfactuals", lambda t: put(t, "steps", 0, 21), "steps out of range"),
    "picture missing": ("counterfactuals", lambda t: put(t, "x_cf", 0, None), "pictures are missing"),
    "value missing": ("codes", lambda t: put(t, "epistemic", 0, None), "without its values"),
    "error with values": ("codes", lambda t: put(put(t, "status", 0, "error"), "error", 0, "?"), "with values"),
    "column dropped": ("counterfactuals", lambda t: t.drop_columns(["steps"]), "another schema"),
    "metadata of another run": (
        "codes",
        lambda t: t.replace_schema_metadata({b"clarity.fingerprint": b"other"}),
        "other file metadata",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds(plan: Plan, filled: str, kind: str) -> None:
    name, damage, problem = DAMAGE[kind]
    tables = make_tables(plan, 0)
    tables[name] = damage(tables[name])
    commit_shard(filled, plan, 0, tables, {})  # sums and sizes agree: only the content is wrong
    found = verify(filled)
    assert not found.ok
    assert any(problem in line and line.startswith("shard-00000") for line in found.problems), found.problems


def test_verify_finds_a_changed_byte(plan: Plan, filled: str) -> None:
    path = Path(filled, "codes/shard-00001.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    found = verify(filled)
    assert "another checksum" in found.problems[0]
    assert found.shards == [1]
    drop_commits(filled, found.shards)
    found = verify(filled)
    assert not found.ok and not found.problems and (found.committed, found.planned) == (2, 3)


def test_verify_decodes_a_sample_again(plan: Plan, filled: str) -> None:
    pictures = read_audit(filled).counterfactuals.to_table(columns=["z_cf", "x_cf"])
    codes, shown = schema.matrix(pictures["z_cf"]), decode_png(pictures["x_cf"], plan.image_shape)

    def redecode(z: np.ndarray, off: int = 0) -> np.ndarray:
        rows = [int(np.flatnonzero((codes == row).all(1))[0]) for row in z]
        return np.clip(shown[rows].astype(int) + off, 0, 255).astype(np.uint8)

    found = verify(filled, redecode=redecode)
    assert found.ok
    assert found.redecoded == 12
    assert verify(filled, redecode=lambda z: redecode(z, 1)).ok
    assert "differ by 2 grey levels" in verify(filled, redecode=lambda z: redecode(z, 2)).problems[0]


def test_summarise_counts(plan: Plan, filled: str) -> None:
    found = read_audit(filled).summary()
    pairs = read_audit(filled).counterfactuals.to_table()
    assert found["images"] == 5
    assert found["errors"] == {"broken": 1}
    assert found["pairs"] == len(pairs) == 12
    assert found["converged"] == pc.sum(pairs["converged"]).as_py()
    assert found["median_steps"] == 7
    assert found["mean_steps"] == round(pc.mean(pairs["steps"]).as_py(), 2)
    assert found["engines"] == {"plain": 3}
    assert found["judged"] == found["judged_as_target"] == len(pairs)
    assert found["seconds_by_stage"] == {"search": 1.5}
    assert len(found["slowest_class_pairs"]) == 5
    slowest = found["slowest_class_pairs"][0]
    mine = pairs.filter(
        pc.and_(pc.equal(pairs["source_name"], slowest["source"]), pc.equal(pairs["target_name"], slowest["target"]))
    )
    assert slowest["pairs"] == len(mine) and slowest["mean_steps"] == round(pc.mean(mine["steps"]).as_py(), 1)


def test_summarise_warns_of_a_model_of_another_data_set(plan: Plan, filled: str) -> None:
    audit = read_audit(filled)
    codes = audit.codes.to_table()
    assert audit.summary()["warnings"] == []
    nothing = pa.nulls(len(codes), pa.int32())
    strange = codes.set_column(codes.column_names.index("label"), codes.schema.field("label"), nothing)
    commits = {0: {"clipped": 2}, 1: {}, 2: {"clipped": 1}}
    found = summarise(audit.plan, commits, pads.dataset(strange), audit.counterfactuals)
    labelled = len(codes) - codes["label_name"].null_count
    assert found["warnings"][0].startswith(f"None of the {labelled} labels of the data is a class of the model (")
    assert found["warnings"][1].startswith("3 images hold values above the range")
    told = dict.fromkeys(("pairs_per_second", "seconds", "redecoded"), 0) | {"problems": []}
    assert describe(found | told).splitlines()[0].startswith("WARNING    None of the")


def test_summarise_of_nothing_is_empty(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    with claim(uri, plan, model_dir):
        found = read_audit(uri).summary()
    assert (found["images"], found["pairs"], found["converged"]) == (0, 0, 0)
    assert found["mean_steps"] is None and found["median_steps"] is None and found["slowest_class_pairs"] == []


# ---- other readers -------------------------------------------------------------------------------------------------

READERS = {
    "pyarrow": "import pyarrow.dataset as d; t = d.dataset(f'{p}/counterfactuals').to_table(); n = t.num_rows; "
    "z = t['z_cf'][0].as_py(); s = sum(t['steps'].to_pylist())",
    "duckdb": "import duckdb; q = duckdb.sql(f\"from '{p}/counterfactuals/*.parquet' order by target, image_id\"); "
    "n = len(q); z = list(duckdb.sql('select z_cf from q limit 1').fetchall()[0][0]); "
    "s = duckdb.sql('select sum(steps) from q').fetchall()[0][0]",
    "polars": "import polars; t = polars.read_parquet(f'{p}/counterfactuals/*.parquet'); n = len(t); "
    "z = t['z_cf'][0].to_list(); s = t['steps'].sum()",
    "pandas": "import pandas; t = pandas.read_parquet(f'{p}/counterfactuals'); n = len(t); z = list(t['z_cf'][0]); "
    "s = t['steps'].sum()",
}


@pytest.mark.parametrize("reader", READERS)
def test_tables_are_read_by(reader: str, filled: str) -> None:
    code = f"p = {filled!r}; {READERS[reader]}; import sys; assert 'ray' not in sys.modules; print(n, len(z), s)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    steps = pc.sum(read_audit(filled).counterfactuals.to_table()["steps"]).as_py()
    assert run.stdout.split() == ["12", "5", str(steps)]


def test_audits_of_before_are_read_verified_and_summed_up(plan: Plan, model_dir: str, tmp_path: Path) -> None:
    """Of the first schema, without the columns that came later."""
    uri, old = str(tmp_path / "old"), replace(plan, schema_version=1)
    assert not {"rungs", "confirmed", "judge_class"} & set(old.counterfactuals_schema().names)
    with claim(uri, old, model_dir) as held:
        for shard in held.pending:
            commit_shard(uri, old, shard, make_tables(old, shard), {"engine": "plain"})
    assert verify(uri).ok
    opened = read_audit(uri)
    assert opened.counterfactuals.to_table()["rungs"].null_count == opened.counterfactuals.count_rows() > 0
    summary = opened.summary()
    assert summary["pairs"] > 0 and summary["judged"] == 0 and summary["checks"] is None
