"""A plan of five images, a model directory, and a complete audit of them."""

from pathlib import Path

import pytest
from shards import IDS, make_tables

from clarity.audit.commits import claim, commit_shard
from clarity.audit.plan import Plan, shard_table
from clarity.audit.read import read_audit
from clarity.audit.verify import verify


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
