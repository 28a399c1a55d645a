"""Read the committed shards of an audit."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from clarity import storage
from clarity.audit.commits import valid_commits
from clarity.audit.plan import Plan, read_plan
from clarity.audit.queries import connect, load_queries, query
from clarity.audit.summary import foreign_labels, summarise
from clarity.findings.verdict import verdict
from clarity.report.text import counted

#: Attributes of each pair as the attribute network sees them; written by the comparison beside the audit's tables.
ATTRIBUTES_FILE = "attributes.parquet"


@dataclass(frozen=True, repr=False)
class Audit:
    """The committed shards of an audit; ``codes``, ``counterfactuals`` and ``traces`` are Arrow data sets."""

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

    def summary(self) -> dict[str, Any]:
        """Verdict on the model and accuracy of its judge; counts, failures, steps and seconds of what is there."""
        path = storage.join(self.uri, "model", "model.json")
        card = storage.read_json(path) if storage.exists(path) else {}
        foreign = foreign_labels(connect(self.codes, self.counterfactuals)) > 0
        found = verdict(card, foreign, self.plan.checks.get("predictor"))
        of_model = {"verdict": asdict(found), "judge": (card.get("evaluation") or {}).get("judge")}
        return of_model | summarise(self.plan, self.commits, self.codes, self.counterfactuals)

    def query(self, name: str, *, metadata: Any = None, **parameters: Any) -> pa.Table:
        """Answer a documented question of ``audit/sql``, as ``query("closest_to", source="4", target="9")``.

        ``metadata`` is the table that ``by_metadata`` joins: Arrow or pandas, with the columns image_id and segment.
        ValueError where source or target, given or by default, is no class of the audit.
        """
        asked = {**(load_queries()[name].parameters if name in load_queries() else {}), **parameters}
        for role in {"source", "target"} & asked.keys():
            if asked[role] not in self.class_names:
                got = repr(parameters[role]) if role in parameters else "none"
                raise ValueError(f"{role}: expected a class of {', '.join(self.class_names[:10])}, got {got}")
        return query(connect(self.codes, self.counterfactuals), name, metadata=metadata, **parameters)

    def __repr__(self) -> str:
        """The audit in a few lines."""
        plan, names = self.plan, self.class_names
        classes = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        lines = [
            f"Audit of {counted(plan.num_images, 'images')} by {plan.method!r} in {storage.display(self.uri)}",
            f"  shards           {len(self.commits)} of {len(plan.shards)} committed",
            f"  classes          {len(names)}: {classes}",
        ]
        for name, table in (("codes", self.codes), ("counterfactuals", self.counterfactuals)):
            lines.append(f"  {name:15}  {counted(table.count_rows(), 'rows')}, {len(table.schema)} columns")
        return "\n".join(lines)


def read_audit(uri: str | Path, without: Collection[int] = ()) -> Audit:
    """Open an audit directory, finished or not; only what its commits name is read. ValueError where it is none.

    Shards of ``without``, which may be damaged, are left out.
    """
    uri = str(uri)
    plan = read_plan(uri)
    commits = {shard: commit for shard, commit in valid_commits(uri, plan).items() if shard not in without}
    files, path = storage.filesystem(uri)

    def table(name: str, expected: pa.Schema | None) -> pads.Dataset:
        named = [f"{path}/{f}" for _, c in sorted(commits.items()) for f in c["files"] if f.startswith(f"{name}/")]
        if not named and expected is not None:
            return pads.dataset(expected.empty_table())
        return pads.dataset(named, schema=expected, format="parquet", filesystem=files) if named else None

    codes, pairs = table("codes", plan.codes_schema()), table("counterfactuals", plan.counterfactuals_schema())
    return Audit(uri, plan, commits, codes, pairs, table("traces", None))
