"""Read the committed shards of an audit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from clarity import storage
from clarity.audit.commits import files_below, valid_commits
from clarity.audit.plan import Plan, read_plan, shard_name

#: Attributes of each pair as the attribute network sees them; written by the comparison beside the audit's tables.
ATTRIBUTES_FILE = "attributes.parquet"


@dataclass(frozen=True)
class Audit:
    """The committed shards of an audit, lazily: ``codes``, ``counterfactuals`` and ``traces`` are Arrow data sets."""

    uri: str
    plan: Plan
    commits: dict[int, dict[str, Any]]
    codes: pads.Dataset
    counterfactuals: pads.Dataset
    traces: pads.Dataset | None

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.commits) == len(self.plan.shards)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by index."""
        return self.plan.class_names


def read_audit(uri: str | Path) -> Audit:
    """Open an audit directory, finished or not: only what its commits name is read.

    Raises:
        ValueError: it is no audit directory.
    """
    uri = str(uri)
    plan = read_plan(uri)
    commits = _known_commits(uri, plan)
    files, path = storage.filesystem(uri)

    def table(name: str, schema_: pa.Schema | None) -> pads.Dataset:
        named = [f"{path}/{f}" for _, c in sorted(commits.items()) for f in c["files"] if f.startswith(f"{name}/")]
        if not named and schema_ is not None:
            return pads.dataset(schema_.empty_table())
        return pads.dataset(named, schema=schema_, format="parquet", filesystem=files) if named else None

    return Audit(
        uri,
        plan,
        commits,
        table("codes", plan.codes_schema()),
        table("counterfactuals", plan.counterfactuals_schema()),
        table("traces", None),
    )


def _known_commits(uri: str, plan: Plan) -> dict[int, dict[str, Any]]:
    """The commits; of a finished audit from the one file that gathers them, as far as their records are there."""
    try:
        done = json.loads(storage.read_bytes(storage.join(uri, "_SUCCESS")))
        present = files_below(uri, "_commits")
        if done["fingerprint"] == plan.fingerprint:
            gathered = {commit["shard"]: commit for commit in done["commits"]}
            return {s: c for s, c in gathered.items() if f"_commits/{shard_name(s)}.json" in present}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return valid_commits(uri, plan)
