"""README and reference against the code: every flag, column, source and method is named, commands and queries run."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from clarity.schema import CODES, COUNTERFACTUALS, PREDICTIONS, TRACES, Column

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.stem != "driver")


@functools.cache
def flags_of(job: Path) -> list[str]:
    """Every option that a job takes, as its own help says."""
    run = subprocess.run([sys.executable, str(job), "--help"], capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", run.stdout, re.MULTILINE)) - {"--help"})


def section(title: str) -> str:
    """The text under a heading of either file, up to the next heading of the same or a higher rank."""
    text = README + "\n# \n" + REFERENCE
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match, f"neither README.md nor docs/reference.md has a section {title!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_readme_names_every_flag(job: Path) -> None:
    text = section(f"`jobs/{job.name}`")
    missing = [flag for flag in flags_of(job) if f"`{flag}" not in text]
    assert not missing


def test_flags_are_found_in_the_jobs_at_all() -> None:
    assert {"--dataset", "--model", "--out"} <= set(flags_of(ROOT / "jobs" / "explain_all.py"))


@pytest.mark.parametrize(
    ("table", "columns"),
    [("codes", CODES | PREDICTIONS), ("counterfactuals", COUNTERFACTUALS), ("traces", TRACES)],
)
def test_readme_names_every_column(table: str, columns: dict[str, Column]) -> None:
    text = section(f"`{table}/*.parquet`")
    assert not [column for column in columns if f"`{column}`" not in text]


def test_readme_names_every_source_method_and_vae() -> None:
    from clarity.data import SOURCES
    from clarity.methods import METHODS
    from clarity.vae import VAES

    assert not [name for name in SOURCES if f"`{name}`" not in section("Your own images")]
    assert not [name for name in METHODS if f"`{name}`" not in section("Methods")]
    assert not [name for name in VAES if f"`{name}`" not in section("`jobs/train.py`")]


def test_readme_says_the_defaults_of_the_configurations() -> None:
    from clarity.search import SearchConfig
    from clarity.training.loops import IMAGE_TRAINING, EnsembleTraining, VAETraining

    text = section("`jobs/train.py`")
    for training, flags in ((VAETraining(), "vae"), (EnsembleTraining(), "ensemble"), (IMAGE_TRAINING, "image")):
        row = next(line for line in text.splitlines() if line.startswith(f"| `--{flags}-epochs`"))
        values = (training.epochs, training.min_updates, training.batch_size, training.learning_rate)
        assert f"| {', '.join(map(str, values))}" in row
    rows = section("`jobs/explain_all.py`").splitlines()
    for name, default in asdict(SearchConfig()).items():
        assert next(row for row in rows if f"`--{name.replace('_', '-')}`" in row).split("|")[2].strip() == str(default)


def test_readme_links_lead_somewhere() -> None:
    assert "docs/reference.md" in README
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        links = re.findall(r"\]\((?!http|#)([^)#]+)", text) + re.findall(r'src="(?!http)([^"]+)"', text)
        assert not [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]


def test_first_screen_has_the_two_commands() -> None:
    first = README[: README.index("\n## ")]
    assert "pip install . && python jobs/explain_all.py" in first
    assert "pip install '.[test]' && pytest" in first


def test_readme_query_runs_on_an_audit(tmp_path: Path) -> None:
    """The first screen's lines of Python, run where an audit of the same columns lies."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clarity.schema import counterfactuals_schema

    schema = counterfactuals_schema(5)
    rows = {field.name: pa.nulls(4, field.type) for field in schema}
    rows |= {"image_id": pa.array(["c", "a", "b", "d"]), "source_name": pa.array(["4"] * 4)}
    rows |= {"target_name": pa.array(["9", "9", "9", "8"]), "converged": pa.array([True] * 4)}
    rows |= {"distance_z_l1": pa.array(np.array([3, 1, 2, 0], np.float32)), "steps": pa.array([7, 5, 6, 1], pa.int32())}
    directory = tmp_path / "runs" / "digits" / "audit" / "counterfactuals"
    directory.mkdir(parents=True)
    pq.write_table(pa.table(rows), directory / "shard-00000.parquet")
    code = README.split("<!-- query -->\n```python\n")[1].split("```")[0]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    answers = re.findall(r"│ ([abcd]) ", run.stdout)
    assert answers == ["a", "b", "c"]
