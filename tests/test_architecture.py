"""The structure of the code, read with ast: who may import whom, and what clarity/ never does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clarity"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from levels above its own line; modules of one line may not import each other, those of one
# package may.
LEVELS = [
    {"ids", "images", "refine", "updates", "compiled"},
    {"storage", "vae", "uncertainty", "schema", "report.text", "findings.statistics"},
    {"findings.verdict", "figure"},
    {"data", "classifiers", "audit"},
    {"objectives", "rows"},
    {"judges", "attributes", "native_search", "triton_search"},
    {"model", "search", "predictions", "predictor"},
    {"methods"},
    {"tables"},
    {"checks"},
    {"training"},
    {"explainer"},
    {"worker"},
    {"planning"},
    {"notebook"},
    {"findings", "plots"},
    {"paper", "report"},
]
ROOMS = sorted(set().union(*LEVELS))
#: Of jobs/, what is no program: what all jobs share, the actor plan, and what the benchmark times.
SHARED = {"driver", "actors", "measures"}
#: Lines of a file at most.
MAX_LINES = 500
PROGRAMS = sorted((ROOT / "jobs").glob("*.py"))


def room_of(module: str) -> str:
    """The longest beginning of a module's name below clarity that has a level; else its first word."""
    parts = module.split(".")
    names = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next((name for name in names if name in ROOMS), parts[0])


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, without those for type checking alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "clarity":
                found |= {f"clarity.{alias.name}" for alias in node.names}
    return found


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_above(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    assert room in ROOMS, f"{room} has no level"
    for module in imports_of(path):
        other = room_of(module.removeprefix("clarity."))
        if module.startswith("clarity.") and other in ROOMS and other != room:
            assert level(other) < level(room), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_library_never_imports_ray_nor_prints(path: Path) -> None:
    assert not {module for module in imports_of(path) if module.split(".")[0] == "ray"}
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_job_imports_no_other_job_but_what_they_share_and_can_be_run_by_its_name(path: Path) -> None:
    jobs = {other.stem for other in PROGRAMS} - SHARED
    assert not {module for module in imports_of(path) if module.split(".")[0] == "jobs" or module in jobs}
    if path.stem in jobs:
        assert path.read_text().startswith("#!/usr/bin/env python")
        assert path.stat().st_mode & 0o111, f"{path.name} has no run bit"


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_file_has_one_subject(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES
    assert not [line for line in lines if re.match(r"\s*# ?[-=]{4}", line)], "a ruler marks a file that wants to exist"


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_word_has_one_meaning(path: Path) -> None:
    """It is a directory, a URI, an index or axes."""
    assert not re.findall(r"(?i)\b\w*places?\b(?<!replace)(?<!replaces)(?<!inplace)", path.read_text())


def test_no_module_is_named_like_a_public_function() -> None:
    modules = {path.stem for path in FILES} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {"load", "explain", "decode", "train", "read_audit"} <= names
    assert not modules & {"load", "explain", "decode", "train", "read_audit"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_tests_import_no_private_name(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    ours = [node for node in imports if node.module.split(".")[0] in ("clarity", "jobs", "driver", "measures")]
    assert not [alias.name for node in ours for alias in node.names if alias.name.startswith("_")]


def test_tables_are_read_without_torch_or_ray() -> None:
    code = "import sys, clarity; clarity.read_audit; print([m for m in ('torch', 'ray') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_models_are_trained_explained_and_measured_without_ray_or_duckdb() -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('duckdb', 'ray')); sys.path.append('jobs')\n"
    code += "import benchmark, clarity; clarity.train, clarity.explain, clarity.Explainer; print(benchmark.table)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.startswith("<function table"), run.stderr


def test_top_level_holds_nothing_unplanned() -> None:
    planned = {"jobs", "clarity", "cluster.yaml", "tests", "pyproject.toml", "README.md", "LICENSE", "docs", "setup.py"}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= planned
