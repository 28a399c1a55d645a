"""Folders of image files, one for each class."""

from __future__ import annotations

import pyarrow as pa

from clarity import storage
from clarity.data.files import printable, quote
from clarity.data.listing import Dataset, make_listing, note_left_out
from clarity.ids import split_of
from clarity.images import EXTENSIONS


def list_folder(dataset: Dataset) -> pa.Table:
    """The image files below a folder, labelled by the first folder of their path."""
    root = str(dataset.data)
    if not storage.is_dir(root):
        raise ValueError(f"expected a folder, found a file at {storage.display(root)}: name the folder that holds it")
    files = [(file, tuple(file.path.split("/"))) for file in storage.list_files(root)]
    shown = [(file, parts) for file, parts in files if not any(part.startswith(".") for part in parts)]
    images = [(file, parts) for file, parts in shown if file.path.lower().endswith(EXTENSIONS)]
    missed = {"hidden files": len(files) - len(shown), "files without an image's extension": len(shown) - len(images)}
    splits = split_folders(images)
    folders = [root]
    if splits:
        chosen = splits if dataset.split == "all" else splits & {dataset.split}
        if not chosen:
            raise ValueError(
                f"expected a folder {dataset.split}/ in {storage.display(root)}, found only {', '.join(splits)}/: "
                "choose that split, or all"
            )
        missed["images outside train/ and test/"] = sum(parts[0] not in splits for _, parts in images)
        images = [(file, parts[1:]) for file, parts in images if parts[0] in chosen]
        folders = [storage.join(root, split) for split in chosen]
    classes = {parts[0] for _, parts in images if len(parts) > 1}
    named = {label for folder in folders for label in storage.list_dirs(folder) if not label.startswith(".")}
    missed["class folders without an image"] = len(named - classes)
    if not splits and dataset.split != "all":
        images = [(file, parts) for file, parts in images if split_of(printable(file.path)) == dataset.split]
    listing = make_listing(
        dataset,
        [printable(file.path) for file, _ in images],
        [quote(file.path) for file, _ in images],
        [0] * len(images),
        [file.size for file, _ in images],
        [printable(parts[0]) if len(parts) > 1 else None for _, parts in images],
    )
    return note_left_out(listing, missed)


def split_folders(images: list[tuple[storage.FileInfo, tuple[str, ...]]]) -> set[str]:
    """The split folders at the top: train and test together, or one that is alone; among others it is a class."""
    tops = {parts[0] for _, parts in images if len(parts) > 1}
    found = {"train", "test"} & tops
    return found if len(found) == 2 or found == tops else set()
