"""README and reference against the code: every flag, column, source and method is named, commands and queries run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from audits import fill

from clarity.audit.commits import claim
from clarity.planning import make_plan
from clarity.search import SearchConfig
from clarity.worker import Work

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
PAPER = (ROOT / "docs" / "paper.md").read_text()


def section(title: str) -> str:
    """The text under a heading of one of the pages, up to the next heading of the same or a higher rank."""
    text = "\n# \n".join((README, REFERENCE, PAPER))
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match, f"neither README.md, docs/reference.md nor docs/paper.md has a section {title!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def test_reference_is_what_the_schema_and_the_parsers_say(
    load_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every column, and every flag of every job with its sentence; what is stale is found and written again."""
    program = load_job("reference", "docs")
    assert program.main(["--check"]) == 0
    (tmp_path / "reference.md").write_text(REFERENCE.replace("`--max-steps` N", "`--most-steps` N"))
    monkeypatch.setattr(program, "PAGE", tmp_path / "reference.md")
    assert program.main(["--check"]) == 1
    assert program.main([]) == 0 and (tmp_path / "reference.md").read_text() == REFERENCE


def test_every_flag_explains_itself(load_job: Any) -> None:
    """In a sentence, in a group; never by the name of a class."""
    for name in (*load_job("reference", "docs").JOBS, "compare", "benchmark"):
        for action in load_job(name).new_parser()._actions:
            text = action.help or ""
            assert len(text.split()) >= 3 and (text[0].isupper() or action.dest == "help")
            assert not re.search(r"\b[Ss]ee [A-Z]\w+[A-Z]", text)


def printed_commands(job: str) -> list[str]:
    """The arguments of a job wherever README and docs print its command, in blocks and within text."""
    texts = [path.read_text().replace("\\\n", " ") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    return [found for text in texts for found in re.findall(rf"python jobs/{job}\.py([^`\n]*)", text)]


@pytest.mark.parametrize("job", ["train", "explain_all", "compare", "report", "benchmark"])
def test_printed_commands_have_flags_that_exist(load_job: Any, job: str) -> None:
    commands = printed_commands(job)
    assert commands
    for command in commands:
        load_job(job).new_parser().parse_args(shlex.split(command.replace("...", ""), comments=True))


def test_printed_commands_draw_every_figure_of_the_paper(load_job: Any) -> None:
    """Figure 10 needs a second model, which only the shipped digits have by default."""
    parser = load_job("compare").new_parser()
    parsed = [parser.parse_args(shlex.split(command, comments=True)) for command in printed_commands("compare")]
    assert any(args.dataset == "mnist" and args.methods == ["all"] and args.flat_model for args in parsed)


def test_readme_names_every_source_method_and_vae() -> None:
    from clarity.data import SOURCES
    from clarity.methods import METHODS
    from clarity.vae import VAES

    assert not [name for name in SOURCES if f"`{name}`" not in section("Your own images")]
    assert not [name for name in METHODS if f"`{name}`" not in section("Methods")]
    assert not [name for name in VAES if f"`{name}`" not in section("`jobs/train.py`")]


def test_readme_links_lead_somewhere() -> None:
    assert "docs/reference.md" in README
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        links = re.findall(r"\]\((?!http|#)([^)#]+)", text) + re.findall(r'src="(?!http)([^"]+)"', text)
        assert not [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]


def test_readme_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 140 and len(README.split()) <= 1100


def test_readme_has_the_two_commands() -> None:
    first = README[: README.index("\n## Ask the tables")]
    assert "pip install . && python jobs/explain_all.py" in first
    assert "pip install '.[test]' && pytest" in first


def test_readme_query_runs_on_an_audit(tmp_path: Path) -> None:
    """The first screen's lines of Python, run where an audit of the same columns lies."""
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


def test_readme_notebook_runs_on_the_shipped_digits(
    tiny_digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block as it is printed, beside a model and an audit where the first command leaves them."""
    from PIL import Image

    import clarity
    from clarity import data

    runs = tmp_path / "runs" / "digits"
    shutil.copytree(tiny_digits_model, runs / "model")
    code = section("From a notebook").split("```python\n")[1].split("```")[0]
    ((image_id, target),) = re.findall(r'Counterfactual\(audit, "(.+?)", "(.)"\)', code)
    dataset = data.open_dataset("digits", None, "test")
    listing = data.list_images(dataset)
    listing = listing.filter(pc.is_in(listing["image_id"], pa.array([image_id, "test/0000"])))
    model = clarity.load(str(runs / "model"))
    plan = make_plan(model, dataset, listing, method="clarity", config=SearchConfig())
    with claim(str(runs / "audit"), plan, str(runs / "model")) as held:
        fill(Work(held.uri, held.run, held.plan, dataset, model.preprocessing), listing)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), made)
    assert len(made["table"]) == 4 and made["pair"].row["target_name"] == target
    with Image.open(tmp_path / "runs" / "pair.png") as picture:
        assert picture.width > picture.height > 50
