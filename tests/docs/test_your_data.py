"""docs/your-data.md names what is really read."""

from pathlib import Path

from clarity.data.labels import COLUMNS, TABLES
from clarity.data.listing import SPLIT_NAMES
from clarity.images import EXTENSIONS

PAGE = (Path(__file__).parent.parent.parent / "docs" / "your-data.md").read_text()


def test_your_data_names_every_ending_split_and_column() -> None:
    known = [*EXTENSIONS, *(name for names in SPLIT_NAMES.values() for name in names)]
    known += [*COLUMNS["image"], *COLUMNS["label"], "labels.csv", "metadata.csv", "metadata.jsonl"]
    assert not [name for name in known if f"`{name}`" not in PAGE]
    assert {table.rsplit(".")[-1] for table in TABLES} == {"csv", "tsv", "jsonl"}
