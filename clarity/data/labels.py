"""Labels of image files from a table beside them: labels.csv, metadata.csv or metadata.jsonl."""

import csv
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clarity import storage
from clarity.data.listing import Dataset, names_of, require_once, split_named
from clarity.images import EXTENSIONS
from clarity.report.text import counted

TABLES = ("labels.csv", "labels.tsv", "metadata.csv", "metadata.tsv", "metadata.jsonl")
#: Usual names of the columns, the first that is there counts; ``columns`` names another.
COLUMNS = {
    "image": ("file_name", "filename", "file", "image", "image_path", "path", "image_name", "image_id", "name", "id"),
    "label": ("label", "label_name", "class", "class_name", "class_id", "classid", "category", "target"),
    "split": ("split",),
}


@dataclass(frozen=True)
class Labels:
    """What tables beside the images say: labels and splits by path, rows without an image, notes for a user."""

    labels: dict[str, str | None]
    splits: dict[str, str | None]
    tables: tuple[str, ...]
    left_out: dict[str, int]
    notes: tuple[str, ...] = ()


def find_tables(root: str, folders: Sequence[str]) -> list[str]:
    """The tables of labels at the top of a data set and in some folders, by their paths."""
    paths = [posixpath.join(folder, name) for folder in ("", *folders) for name in TABLES]
    return [path for path in paths if storage.exists(storage.join(root, path))]


def read_labels(dataset: Dataset, folders: Sequence[str], paths: Iterable[str], in_classes: bool) -> Labels:
    """What the tables beside some images say of them.

    ``folders`` are those of splits, which may have tables of their own; ``in_classes`` tells whether the images of
    ``paths`` lie in folders that can be classes. ValueError: a table that contradicts itself, or lacks a column.
    """
    root = str(dataset.data)
    index = PathIndex(paths)
    labels: dict[str, str | None] = {}
    splits: dict[str, str | None] = {}
    read: list[str] = []
    left_out: dict[str, int] = {}
    notes: list[str] = []
    tables = find_tables(root, folders)
    if dataset.columns and not tables:
        raise ValueError(
            f"columns: expected a table of labels in {storage.display(root)}, found none: it is called labels.csv"
        )
    for table in tables:
        rows = read_table(storage.join(root, table))
        image, label, split = (find_column(dataset, table, rows, name) for name in ("image", "label", "split"))
        if image is None or label is None:
            if not in_classes:
                missing = "label" if image else "image"
                notes.append(
                    f"{table} gives no labels: its first line names the columns {names_of(rows[0] if rows else ())}; "
                    f"say which one does, as in columns {missing}=NAME, or write names above it"
                )
            continue
        unknown, unlike = 0, dict[str, str | None]()
        for row in rows:
            path = index.find(posixpath.dirname(table), row.get(image) or "")
            if path is None:
                unknown += 1
                continue
            text = (row.get(label) or "").strip() or None
            if labels.setdefault(path, text) != text:
                unlike[path] = text
            if split:
                splits[path] = split_named(row.get(split))
        if unlike:
            path, text = next(iter(unlike.items()))
            raise ValueError(
                f"expected one label for each image in {table}, found several for {counted(len(unlike), 'images')}, "
                f"such as {labels[path]!r} and {text!r} for {path}: keep one of them"
            )
        if unknown == len(rows):
            notes.append(
                f"{table} is not used: no name in its column {image}, such as {rows[0].get(image)!r}, is that of "
                "exactly one image; correct the names, or say which column holds them, as in columns image=NAME"
            )
            continue
        read.append(table)
        left_out[f"rows of {table} without an image"] = unknown
        if in_classes:
            notes.append(f"labels come from {table}, not from the names of folders")
    if all(re.fullmatch(r"-?\d+(\.0*)?", text) for text in labels.values() if text):
        labels = {path: text and text.partition(".")[0] for path, text in labels.items()}  # 3.0 is class 3
    return Labels(labels, splits, tuple(read), left_out, tuple(notes))


def read_table(uri: str) -> list[dict[str, Any]]:
    """The rows of a table of text: JSON lines, or CSV with a header and commas, semicolons or tabs."""
    names: Sequence[str] = ()
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
        if uri.endswith(".jsonl"):
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
            flat = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in found]
            rows = [{key: None if value is None else str(value) for key, value in row.items()} for row in flat]
        else:
            file = io.StringIO(text, newline=None)  # lines may end as on an old Mac
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
            rows = list(reader)
            for row in rows:
                row.pop(None, None)  # cells beyond the header
    except (ValueError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"expected a table of file names and labels in {storage.display(uri)}, found none that can be read "
            f"({error}): save it as CSV in UTF-8"
        ) from None
    require_once(filter(None, names), names, storage.display(uri))
    return rows


def find_column(dataset: Dataset, table: str, rows: list[dict[str, Any]], name: str) -> str | None:
    """The column of a table that holds the file names, the labels or the splits; None where there is none."""
    there = list(rows[0]) if rows else []
    asked = dict(dataset.columns).get(name)
    if asked is not None and asked not in there:
        raise ValueError(f"columns: expected {asked} in {table}, found columns {names_of(there)}: choose from these")
    folded = {column.casefold(): column for column in there}
    return asked or next((folded[known] for known in COLUMNS[name] if known in folded), None)


class PathIndex:
    """Finds image files by what tables call them: a path, a name, it without its extension, or 7 for 007.png."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths: dict[str, str] = {}
        self.names: dict[str, str | None] = {}
        for path in paths:
            self.paths[unicodedata.normalize("NFC", path)] = path
            name = unicodedata.normalize("NFC", os.path.basename(path))
            stem = os.path.splitext(name)[0]
            for known in {name, stem, str(int(stem)) if stem.isdecimal() else stem}:
                self.names[known] = None if known in self.names else path

    def find(self, folder: str, text: str) -> str | None:
        """The path of an image that a table in a folder calls ``text``; None: none, or more than one."""
        text = unicodedata.normalize("NFC", text.strip().replace("\\", "/"))
        path = self.paths.get(posixpath.normpath(posixpath.join(folder, text)))
        if path is None and not text.lower().endswith(EXTENSIONS):
            stems = (posixpath.normpath(posixpath.join(folder, text + extension)) for extension in EXTENSIONS)
            path = next((self.paths[stem] for stem in stems if stem in self.paths), None)
        if path is not None:
            return path
        path = self.names.get(os.path.basename(text))
        if path is None or not path.startswith(posixpath.join(folder, "")):
            return None
        # A train/7.jpg that is missing is not test/7.jpg.
        named, lies = (posixpath.basename(posixpath.dirname(name)) for name in (posixpath.normpath(text), path))
        return None if named and lies and named != lies else path
