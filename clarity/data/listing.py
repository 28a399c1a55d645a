"""What every source shares: a data set, what a source can do, and the listing of a data set's images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from clarity.images import Preprocessing, UnreadableImage

LISTING_COLUMNS = ("image_id", "location", "row", "size", "label_name")

#: What a source reads for one row: a file's bytes, decoded pixels, or why there are none.
Content = bytes | Image.Image | UnreadableImage


@dataclass(frozen=True)
class Dataset:
    """Which images: a source, where its data lies, which part. Cheap and picklable; made by ``open_dataset``."""

    source: str
    data: str | None = None
    split: str = "train"
    attributes: tuple[str, ...] = ()
    unlabelled: bool = False


@dataclass(frozen=True)
class Source:
    """What a source can do.

    Args:
        doc: the layout that it reads, in a line.
        list_images: the listing of a data set.
        read_images: for rows of a listing, pairs (index among the rows, content), in any order.
        default_preprocessing: None: looked up in the images.
        needs_data: whether the user names where the data lies.
        remote: whether the data may lie on an object store.
        splits: the choices of ``split``.
        attributes: names of the attributes of the data at a URI; None: the source has none.
    """

    doc: str
    list_images: Callable[[Dataset], pa.Table]
    read_images: Callable[[Dataset, pa.Table], Iterable[tuple[int, Content]]]
    default_preprocessing: Preprocessing | None = None
    needs_data: bool = True
    remote: bool = True
    splits: tuple[str, ...] = ("train", "test", "all")
    attributes: Callable[[str], list[str]] | None = None


def make_listing(
    dataset: Dataset,
    image_ids: Any,
    locations: Any,
    rows: Any,
    sizes: Any,
    label_names: Any,
    attributes: Sequence[Any] = (),
) -> pa.Table:
    """The listing of a data set: one row for each image."""
    kinds = [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), *[pa.int8()] * len(dataset.attributes)]
    fields = pa.schema(list(zip((*LISTING_COLUMNS, *dataset.attributes), kinds)))
    return pa.table([image_ids, locations, rows, sizes, label_names, *attributes], fields)


def note_left_out(listing: pa.Table, counts: dict[str, int]) -> pa.Table:
    """The listing, with the reasons and numbers of what it leaves out; read by ``left_out``."""
    noted = {reason: count for reason, count in counts.items() if count}
    return listing.replace_schema_metadata({"clarity.left_out": json.dumps(noted)})


def left_out(listing: pa.Table) -> dict[str, int]:
    """What the source saw and did not list: reason -> count."""
    return dict(json.loads((listing.schema.metadata or {}).get(b"clarity.left_out", b"{}")))
