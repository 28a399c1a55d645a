"""Attempts, files and commits of shards."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shards import IDS, make_tables

from clarity import storage
from clarity.audit.commits import (
    GivenUp,
    begin_attempt,
    claim,
    commit_shard,
    drop_commits,
    scratch_directory,
    valid_commits,
)
from clarity.audit.plan import Plan
from clarity.audit.verify import verify


def test_write_shard_gives_the_same_bytes_again(plan: Plan, filled: str) -> None:
    path = Path(filled, "counterfactuals/shard-00001.parquet")
    before = path.read_bytes()
    commit_shard(filled, plan, 1, make_tables(plan, 1), {"engine": "other"})
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [f"shard-0000{shard}.parquet" for shard in range(3)]


def cut_file(commit: Path) -> None:
    path = commit.parents[1] / "codes/shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])


BROKEN: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "torn": lambda path: path.write_text(path.read_text()[:40]),
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[1]"),
    "of another plan": lambda path: path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "x')),
    "of another shard": lambda path: path.write_text(path.with_name("shard-00000.json").read_text()),
    "its file cut short": cut_file,
    "its file gone": lambda path: (path.parents[1] / "counterfactuals/shard-00001.parquet").unlink(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_commit_that_is_broken_makes_its_shard_pending(plan: Plan, filled: str, model_dir: str, how: str) -> None:
    BROKEN[how](Path(filled, "_commits/shard-00001.json"))
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


def test_claim_copies_the_model_alone(plan: Plan, model_dir: str) -> None:
    Path(model_dir, "older").mkdir()
    Path(model_dir, "older", "plan.json").write_text("{}")
    with claim(storage.join(model_dir, "audit"), plan, model_dir):
        assert [path.name for path in Path(model_dir, "audit", "model").iterdir()] == ["model.json"]


def test_finish_marks_only_what_is_verified(plan: Plan, filled: str, model_dir: str) -> None:
    success = Path(filled, "_SUCCESS")
    drop_commits(filled, [])
    Path(filled, "summary.json").unlink()
    with claim(filled, plan, model_dir) as held:
        assert not held.complete and not held.pending and success.exists()
    assert json.loads(success.read_text())["images"] == len(IDS)
    success.unlink()
    with claim(filled, plan, model_dir) as held:
        assert not held.complete
        held.finish({}, verified=False, damaged=[1])
        assert not success.exists() and not Path(filled, "_commits/shard-00001.json").exists()
        commit_shard(filled, plan, 1, make_tables(plan, 1), {})
        held.finish({}, verified=True)
        assert held.complete
    assert sorted(path.name for path in Path(filled).iterdir()) == [
        "_SUCCESS", "_commits", "codes", "counterfactuals", "model", "plan.json", "summary.json",
    ]  # fmt: skip
