"""Claims: what a run may take up, and what it cleans up."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from shards import make_tables

from clarity.audit.commits import begin_attempt, claim, commit_shard, unreachable_paths
from clarity.audit.lock import AuditBusy
from clarity.audit.plan import Plan


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


def test_claim_notices_another_run_that_has_ended(plan: Plan, filled: str, model_dir: str) -> None:
    with claim(filled, plan, model_dir) as first:
        Path(filled, "_lock").unlink()
        with claim(filled, plan, model_dir):
            pass
        with pytest.raises(AuditBusy, match="taken over"):
            first.check()


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
