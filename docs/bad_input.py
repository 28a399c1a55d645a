#!/usr/bin/env python
"""Prints what really happens with each bad input; reliability.md sums it up: ``python docs/bad_input.py``."""

import functools
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import networks  # noqa: E402
import test_bad_input  # noqa: E402
import test_model  # noqa: E402

from clarity.model import load_model, save_model  # noqa: E402


def inputs() -> Iterator[tuple[str, str]]:
    """Images and data sets: outcome and name, with what is made of an image that is read."""
    for kind, build, _, note in test_bad_input.BAD_INPUT:
        with tempfile.TemporaryDirectory() as root:
            outcome, message = build(Path(root))
        yield outcome, kind if message else f"{kind} ({note})"


def models() -> Iterator[tuple[str, str]]:
    """Model directories: outcome and what is wrong with them."""
    before = os.getcwd()
    for kind, change, _ in test_model.BAD_MODELS:
        with tempfile.TemporaryDirectory() as root:
            os.chdir(root)
            path = Path(root, "model")
            save_model(test_model.completed(networks.tiny_model()), path)
            change(path)
            outcome, _ = test_bad_input.outcome_of(functools.partial(load_model, path))
            assert "exploded" not in os.listdir(root)
            os.chdir(before)
        yield outcome, kind


def requests() -> Iterator[tuple[str, str]]:
    """Commands: exit code and what is wrong with them."""
    with tempfile.TemporaryDirectory() as made:
        networks.save_digits_model(Path(made, "digits"))
        for kind, argv, _ in test_bad_input.BAD_REQUESTS:
            with tempfile.TemporaryDirectory() as root:
                code, _ = test_bad_input.refusal(Path(made, "digits"), argv, Path(root))
            yield f"exit code {code}", kind


def markdown() -> str:
    """A paragraph for each outcome of images and data sets, model directories and commands."""
    paragraphs = []
    for title, cases in (("Images and data", inputs()), ("Models", models()), ("Commands", requests())):
        outcomes: dict[str, list[str]] = {}
        for outcome, name in cases:
            outcomes.setdefault(outcome, []).append(name)
        for outcome, names in outcomes.items():
            paragraphs.append(f"**{title}, {outcome}** ({len(names)}): {'; '.join(names)}.")
    wrapped = (textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) for text in paragraphs)
    return "\n\n".join(wrapped)


if __name__ == "__main__":
    print(markdown())
