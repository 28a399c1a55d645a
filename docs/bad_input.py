#!/usr/bin/env python
"""Prints the tables of bad input in reliability.md, from what really happens: ``python docs/bad_input.py``."""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import networks  # noqa: E402
import test_bad_input  # noqa: E402
import test_model  # noqa: E402

from clarity.model import load_model, save_model  # noqa: E402


def cell(message: str, root: str) -> str:
    """A message as a cell of a Markdown table."""
    message = re.sub(r"/tmp/tmp\w+", "DIR", message.replace(root, "DIR").replace(f"{ROOT}/", ""))
    return message.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def markdown() -> str:
    """The tables: images and data sets, models, requests."""
    lines = ["| input | outcome | message |", "|---|---|---|"]
    for kind, build, _, note in test_bad_input.BAD_INPUT:
        with tempfile.TemporaryDirectory() as root:
            outcome, message = build(Path(root))
        lines.append(f"| {kind} | {outcome} | {cell(message or note, root)} |")
    lines += ["", "| model directory with | outcome | message |", "|---|---|---|"]
    before = os.getcwd()
    for kind, change, _ in test_model.BAD_MODELS:
        with tempfile.TemporaryDirectory() as root:
            os.chdir(root)
            path = Path(root, "model")
            save_model(test_model.completed(networks.tiny_model()), path)
            change(path)
            outcome, message = test_bad_input.outcome_of(functools.partial(load_model, path))
            assert "exploded" not in os.listdir(root)
            os.chdir(before)
        lines.append(f"| {kind} | {outcome} | {cell(message, root)} |")
    lines += ["", "| request | exit code | message |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as made:
        networks.save_digits_model(Path(made, "digits"))
        for kind, argv, _ in test_bad_input.BAD_REQUESTS:
            with tempfile.TemporaryDirectory() as root:
                code, message = test_bad_input.refusal(Path(made, "digits"), argv, Path(root))
            lines.append(f"| {kind} | {code} | {cell(message.partition('error: ')[2], root)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
