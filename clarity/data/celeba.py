"""CelebA in its official layout, labelled by hair colour as in the paper."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from clarity import storage
from clarity.data.files import quote
from clarity.data.listing import Dataset, annotate, make_listing

HAIR = {"Black_Hair": "black", "Blond_Hair": "blond", "Brown_Hair": "brown", "Gray_Hair": "gray"}
PARTITIONS = {"0": "train", "1": "validation", "2": "test"}


def list_celeba(dataset: Dataset) -> pa.Table:
    """The faces of a split that have exactly one hair colour; with ``unlabelled`` the others too, without a label."""
    root = str(dataset.data)
    folder = storage.join(root, "img_align_celeba")
    if not storage.is_dir(folder):
        raise ValueError(f"expected a folder img_align_celeba/ in {storage.display(root)}, found none: check the path")
    names = celeba_attributes(root)
    partitions = dict(celeba_rows(root, "list_eval_partition.txt", 0, 1, set(PARTITIONS)))
    hair = [names.index(name) + 1 for name in HAIR]
    carried = [names.index(name) + 1 for name in dataset.attributes]
    faces: list[tuple[Any, ...]] = []
    others = 0
    for cells in celeba_rows(root, "list_attr_celeba.txt", 2, len(names), {"1", "-1"}):
        if cells[0] not in partitions:
            raise ValueError(f"expected every face in list_eval_partition.txt, found no {cells[0]!r}: restore the file")
        if dataset.split not in ("all", PARTITIONS[partitions[cells[0]]]):
            continue
        colours = [colour for colour, column in zip(HAIR.values(), hair) if cells[column] == "1"]
        if len(colours) != 1:
            others += 1
            if not dataset.unlabelled:
                continue
        label = colours[0] if len(colours) == 1 else None
        faces.append((cells[0], label, *(int(cells[column] == "1") for column in carried)))
    ids, label_names, *attributes = zip(*faces) if faces else [()] * (2 + len(carried))
    sizes = {file.path: file.size for file in storage.list_files(folder)}
    locations = [f"img_align_celeba/{quote(name)}" for name in ids]
    listing = make_listing(
        dataset,
        ids,
        locations,
        [0] * len(ids),
        [sizes.get(name) for name in ids],
        label_names,
        [pa.array(values, pa.int8()) for values in attributes],
    )
    reason = "faces without exactly one of black, blond, brown, gray hair"
    return annotate(listing, {} if dataset.unlabelled else {reason: others})


def celeba_rows(root: str, file: str, skipped: int, values: int, choices: set[str]) -> Iterator[list[str]]:
    """The cells of each line: a file's name and its values."""
    for number, line in enumerate(celeba_lines(root, file)[skipped:], skipped + 1):
        cells = line.split()
        if len(cells) != values + 1 or "/" in cells[0] or not choices.issuperset(cells[1:]):
            raise ValueError(
                f"expected a file's name and {values} of {', '.join(sorted(choices))} in line {number} of {file}, "
                f"found {line[:60]!r}: restore the file"
            )
        yield cells


def celeba_attributes(root: str) -> list[str]:
    """The names of the attributes, from the second line of their file."""
    lines = celeba_lines(root, "list_attr_celeba.txt")
    names = lines[1].split() if len(lines) > 1 else []
    if not set(HAIR) <= set(names) or lines[0].strip() != str(len(lines) - 2):
        raise ValueError(
            "expected the number of faces in line 1 of list_attr_celeba.txt, the attributes in line 2, among them "
            f"{', '.join(HAIR)}, and a line for each face, found {len(lines)} lines: copy it again"
        )
    return names


def celeba_lines(root: str, file: str) -> list[str]:
    """The lines of one of the text files."""
    try:
        return storage.read_bytes(storage.join(root, file)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected {file} beside img_align_celeba/, found none that can be read ({error}): "
            "lay out the official files"
        ) from None
