"""Folders of image files: one for each class, below one for each split or not, or beside a table of labels."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa

from clarity import storage
from clarity.data.files import printable, quote
from clarity.data.labels import find_column, find_tables, read_labels, read_table
from clarity.data.listing import (
    Dataset,
    annotate,
    drop_no_label,
    foreign_format,
    make_listing,
    note_of_split,
    some,
    split_named,
    split_within,
)
from clarity.ids import split_of
from clarity.images import EXTENSIONS
from clarity.report.text import plural

#: A path through a folder that a system left behind, which holds no images of the data set.
SYSTEM_FOLDER = re.compile(
    r"(?i)(?:^|/)(@eadir|\$recycle\.bin|lost\+found|__macosx|system volume information|#recycle)(?:/|$)"
)
#: The last number of a file's name, to its end.
LAST_NUMBER = re.compile(r"[\W_]*\d+\W*\.\w+$", re.ASCII)
#: Names of folders for what they hold, or which part of the data set, and not for a class of images.
NO_CLASS = re.compile(
    r"(?i)((jpeg)?images?|imgs?|data|datasets?|masks?|labels?|annotations?|segmentation(s|class|object)?|"
    r"(.*[\W_])?(fold|part|split|batch|subset)[\W_]*\d+)"
)
#: A class folder of which other folders hold so large a share of all images is taken for a wrapper of the classes.
WRAPPED = 0.9
HIDDEN = re.compile(r"(^|/)\.")


def list_folder(dataset: Dataset) -> pa.Table:
    """The image files below a folder, labelled by a table beside them, else by the first folder of their path."""
    root = str(dataset.data)
    images, others, left_out = find_images(root)
    tops = split_folders(root)
    if tops:
        inside = [file for file in images if file.path.split("/")[0] in tops]
        left_out[f"images beside {', '.join(f'{top}/' for top in tops)}"] = len(images) - len(inside)
        images = inside
    else:
        require_no_inner_splits(root, [file.path for file in images])
    depth = 1 if tops else 0  # of the class in a path
    classes = {parts[depth] for file in images if len(parts := file.path.split("/")) > depth + 1}
    table = read_labels(dataset, list(tops), [file.path for file in images], len(classes) > 1)
    told = list(table.notes)
    if dataset.split != "all":
        splits: list[str | None]
        paths = [file.path for file in images]
        if tops:
            splits = [tops[path.split("/")[0]] for path in paths]
        elif any(table.splits.values()):
            splits = [table.splits.get(path) for path in paths]
        else:
            splits = [split_of(printable(path)) for path in paths]
            told += note_of_split(dataset, splits.count(dataset.split), len(paths), find_relatives(paths, splits))
        left_out["images for which the table of labels names no split"] = splits.count(None)
        images = [file for file, split in zip(images, splits) if split == dataset.split]
    folders = [storage.join(root, top) for top in tops if dataset.split in ("all", tops[top])] or [root]
    links, empty = folders_without_images(folders, classes)
    left_out[f"class folders linked to others ({some(links)})"] = len(links)
    left_out[f"class folders without an image ({some(empty)})"] = len(empty)
    paths = [file.path for file in images]
    if table.labels:
        names = [table.labels.get(path) for path in paths]
        left_out |= table.left_out
        others = [path for path in others if path not in table.tables]
        if strangers := sum(path not in table.labels for path in paths):
            told.append(f"{plural(strangers, 'image is', 'images are')} in no table of labels, and without a label")
    else:
        steps = [path.split("/") for path in paths]
        names = [printable(step[depth]) if len(step) > depth + 1 else None for step in steps]
        told += notes_on_inner_folders(root, steps, depth)
        told += [f"{name}/ is read as the split {split}" for name, split in tops.items() if not split_named(name)]
        tables = (".csv", ".tsv", ".jsonl", ".json", ".xlsx")
        unread = [path for path in others if path.lower().endswith(tables)]
        if unread and not table.notes and len(classes) < 2:
            told.append(f"not read: {some(unread)}; a table of labels is labels.csv (file_name,label) at the top")
    left_out[f"files without an image's extension ({some(others)})"] = len(others)
    listing = make_listing(
        dataset,
        [printable(path) for path in paths],
        [quote(path) for path in paths],
        [0] * len(paths),
        [file.size for file in images],
        names,
    )
    if table.labels:
        listing = drop_no_label(listing)
    return annotate(listing, left_out, told)


def find_images(root: str) -> tuple[list[storage.FileInfo], list[str], dict[str, int]]:
    """The image files below a folder, sorted by path; the paths of others; and the numbers left out, by reason."""
    if not storage.is_dir(root):
        found = f"found a file at {storage.display(root)}: name the folder that holds it"
        raise ValueError(f"expected a folder, {foreign_format([storage.name(root)]) or found}")
    files = storage.list_files(root)
    shown = [file for file in files if not HIDDEN.search(file.path)]
    system = [match[1] for file in shown if (match := SYSTEM_FOLDER.search(file.path))]
    own = [file for file in shown if not SYSTEM_FOLDER.search(file.path)]
    images = [file for file in own if is_image(file.path)]
    if not images and (foreign := foreign_format(file.path for file in own)):
        raise ValueError(f"expected images in {storage.display(root)}, {foreign}")
    others = [file.path for file in own if not is_image(file.path)]
    left_out = {
        "hidden files": len(files) - len(shown),
        f"files in folders of the system ({some(system)})": len(system),
    }
    return images, others, left_out


def find_relatives(paths: Sequence[str], splits: Sequence[str | None]) -> list[tuple[str, str]]:
    """Images of the split test with names like those of images of train, but for the last number; each with the first.

    As frames of a video, images of a patient and altered copies have: the rest of the name holds a number, too, and not
    all images of a folder share it.
    """
    names = [(path.rpartition("/")[0], LAST_NUMBER.sub("", path)) for path in paths]
    folders, families = Counter(folder for folder, _ in names), Counter(names)
    known: dict[tuple[str, str], str] = {}
    for name, path, split in zip(names, paths, splits):
        if split == "train" and any(map(str.isdigit, posixpath.basename(name[1]))):
            known.setdefault(name, path)
    found = [(name, path) for name, path, split in zip(names, paths, splits) if split == "test" and name in known]
    return [(printable(path), printable(known[name])) for name, path in found if families[name] < folders[name[0]]]


def folder_splits(dataset: Dataset) -> set[str]:
    """The splits that folders at the top, or a table of labels, name."""
    root = str(dataset.data)
    found = set(split_folders(root).values()) if storage.is_dir(root) else set()
    for path in find_tables(root, ()) if not found else ():
        rows = read_table(storage.join(root, path))
        column = find_column(dataset, path, rows, "split")
        found |= {split for row in rows if column and (split := split_named(row.get(column)))}
    return found


def split_folders(root: str) -> dict[str, str]:
    """The folders at the top that are named like splits, and which they are; ValueError where they may be classes.

    Names such as Final_Training count where there are two splits of them, or a folder of images beside one.
    """
    tops = folders_in(root)
    splits = {name: split for name in tops if (split := split_named(name))}
    if not splits:
        within = {name: split for name in tops if (split := split_within(name))}
        if len(set(within.values())) > 1 or any(map(NO_CLASS.fullmatch, tops)):
            splits = within
    others = [name for name in tops if name not in splits] if splits else []
    others = [name for name in others if any(is_image(f.path) for f in storage.list_files(storage.join(root, name)))]
    if others:
        named, rest = ", ".join(f"{name}/" for name in splits), ", ".join(f"{name}/" for name in others[:3])
        raise ValueError(
            f"expected either splits or classes at the top of {storage.display(root)}, found {named} beside {rest}: if "
            f"{named} are splits, move {rest} away or below them; if they are classes, give them other names; "
            "to read one folder alone, name it"
        )
    return splits


def folders_in(uri: str) -> list[str]:
    """The names of the folders directly in a folder that may hold images of the data set, sorted."""
    return [name for name in storage.list_dirs(uri) if not (HIDDEN.search(name) or SYSTEM_FOLDER.search(name))]


def is_image(path: str) -> bool:
    """Whether a file is named like an image."""
    return path.lower().endswith(EXTENSIONS)


def require_no_inner_splits(root: str, paths: list[str]) -> None:
    """Raises ValueError where train/ and test/ lie inside another folder, which would become the class of both."""
    inner: dict[str, set[str]] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        parts = folder.split("/")
        for depth in range(1, len(parts)):
            if split := split_named(parts[depth]):
                inner.setdefault("/".join(parts[:depth]), set()).add(split)
    if found := sorted(folder for folder, splits in inner.items() if len(splits) > 1):
        inside = storage.display(storage.join(root, found[0]))
        remedy = f"name {inside}" if len(found) == 1 else "move them to the top"
        raise ValueError(
            f"expected splits above class folders in {storage.display(root)}, found them inside {found[0]}/ "
            f"({', '.join(sorted(inner[found[0]]))}): {remedy}"
        )


def notes_on_inner_folders(root: str, paths: list[list[str]], depth: int) -> list[str]:
    """A note of classes whose images all lie in several folders below theirs, as the folder may only wrap classes.

    ValueError: such a folder holds nearly all images, beside folders of a few others; or its folders are named as the
    classes beside it; or several folders are named for what they hold.
    """
    inner: dict[str, set[str]] = {}
    direct = set()
    for parts in paths:
        if len(parts) > depth + 2:
            inner.setdefault(parts[depth], set()).add(printable(parts[depth + 1]))
        elif len(parts) == depth + 2:
            direct.add(parts[depth])
    classes = {printable(name) for name in [*inner, *direct]}
    if len(named := [name for name in classes if NO_CLASS.fullmatch(name)]) > 1:
        raise ValueError(
            f"expected a folder for each class, found some named for what they hold ({some(named)}): to read one "
            "alone, name it; if they are classes, give them other names; else put classes or labels.csv at the top"
        )
    for name, folders in inner.items():
        if folders <= classes and printable(name) not in folders:
            raise ValueError(
                f"expected a folder for each class, found {printable(name)}/ with folders named as those beside it "
                f"({some(folders)}): move it away, or its images into those; to read it alone, name it"
            )
    wrapping = [name for name in inner if name not in direct and len(inner[name]) > 1]
    if not wrapping:
        return []
    first, others = wrapping[0], len({*inner, *direct}) - 1
    below = f"({printable(first)}: {some(inner[first])})"
    inside = [parts for parts in paths if parts[depth] == first]
    remedy = f"name {storage.display(storage.join(root, *map(printable, inside[0][: depth + 1])))}"
    if others and len(inside) >= WRAPPED * len(paths):
        raise ValueError(
            f"expected a folder for each class, found {len(inside)} of {len(paths)} images in folders below one "
            f"{below}: if those are the classes, {remedy}; else put its images directly into it"
        )
    have = plural(len(wrapping), "class has all its", "classes have all their")
    return [f"{have} images in folders below {below}, which are not read as classes; if they are, {remedy}"]


def folders_without_images(roots: Iterable[str], classes: set[str]) -> tuple[list[str], list[str]]:
    """Class folders in which no image is listed: those that are links to others, and those that are empty."""
    links: set[str] = set()
    empty: set[str] = set()
    for root in roots:
        for name in folders_in(root):
            if name not in classes:
                link = not storage.is_remote(root) and os.path.islink(os.path.join(root, name))
                (links if link else empty).add(printable(name))
    return sorted(links), sorted(empty)
