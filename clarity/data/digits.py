"""5,000 digits of MNIST that ship with the package; ``DIGITS.md`` tells their origin and license."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from clarity.data.listing import Content, Dataset
from clarity.data.parquet import list_parquet, read_parquet

FILE = str(Path(__file__).with_name("digits.parquet"))


def list_digits(dataset: Dataset) -> pa.Table:
    """The listing of the shipped Parquet file."""
    return list_parquet(replace(dataset, data=FILE))


def read_digits(dataset: Dataset, rows: pa.Table) -> Iterator[tuple[int, Content]]:
    """The images of rows of the listing."""
    return read_parquet(replace(dataset, data=FILE), rows)
