"""Images and where they come from: a source lists a data set, then reads any part of the listing into an Arrow table.

The listing is a table of one row for each image, in an order that depends on the data alone: ``image_id`` (unique),
``location`` and ``row`` (where its bytes lie), ``size`` (of that file), ``label_name`` (null: none), the attributes.
To add a source, write its two functions in a file of their own and its line in ``SOURCES``.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from clarity import schema, storage
from clarity.data.celeba import PARTITIONS, celeba_attributes, list_celeba
from clarity.data.files import read_files
from clarity.data.folder import folder_splits, list_folder
from clarity.data.listing import (
    LISTING_COLUMNS,
    PIECE,
    SPLIT_NAMES,
    Dataset,
    Source,
    annotate,
    escaped,
    left_out,
    names_of,
    notes,
    require_unique,
    split_named,
    where_of,
)
from clarity.data.mnist import list_mnist, read_mnist
from clarity.data.parquet import list_parquet, parquet_attributes, parquet_splits, read_parquet
from clarity.images import (
    RANGES,
    Preprocessing,
    UnreadableImage,
    convert,
    decode,
    is_grey,
    max_value_of,
    open_image,
    upright,
)
from clarity.report.text import counted, plural

#: The digits that ship with the package; DIGITS.md tells their origin and license.
DIGITS = str(Path(__file__).with_name("digits.parquet"))
#: Labels that pandas reads as missing, in any case.
MISSING = ("nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nat")
#: Column names that attributes cannot have, as tables of an audit or a listing hold others under them.
TAKEN = {*LISTING_COLUMNS, *schema.CODES, *schema.PREDICTIONS, "image", "split", schema.PREDICTOR_IMAGE}


def open_dataset(
    source: str,
    data: storage.URI | None = None,
    split: str = "train",
    *,
    attributes: Sequence[str] = (),
    unlabelled: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """A data set; source, location and split are checked here.

    Args:
        source: a key of SOURCES.
        data: where it lies; a local path is made absolute, for workers in other directories. None for digits.
        split: "train", "validation" or "test", by any usual name; "all"; or "held-out": test, and where the data has
            none, validation. Images that the data does not split are "train" or "test" by their ids.
        attributes: columns carried along: celeba_hair's 40 (1 or 0), integers and booleans of parquet; ("all",) is
            every one that there is.
        unlabelled: celeba_hair: list the faces without exactly one hair colour too, with a null label. Other sources
            list what has no label in any case.
        columns: what the data calls the columns image, label, image_id and split, where it calls them otherwise;
            for a folder those of its table of labels.

    Raises:
        ValueError: an unknown source, split, attribute or column; data missing, superfluous or not there.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data set {source!r}: expected one of {', '.join(SOURCES)}")
    kind = SOURCES[source]
    if data is not None and not kind.needs_data:
        raise ValueError(f"data: expected none for {source}, which ships its own, got {storage.display(data)}")
    if kind.needs_data:
        data = check_data(source, str(data or "").strip())
    renamed = tuple(sorted((columns or {}).items()))
    if unknown := [name for name, _ in renamed if name not in kind.columns]:
        choices = names_of(kind.columns)
        raise ValueError(f"columns: expected names of {choices} for {source}, got {names_of(unknown)}: leave them out")
    dataset = Dataset(source, None if data is None else str(data), split, unlabelled=unlabelled, columns=renamed)
    dataset = replace(dataset, split=choose_split(dataset))
    return with_attributes(dataset, attributes)


def with_attributes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The data set with these columns carried along; ("all",) is every one that there is."""
    if not names:
        return dataset
    kind = SOURCES[dataset.source]
    known = [name for name in kind.attributes(dataset) if name not in TAKEN] if kind.attributes else []
    wanted = known if tuple(names) == ("all",) else list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in known]:
        choices = f"some of {names_of(known)}" if known else "columns of integers or booleans, which these data lack"
        remedy = "choose from these" if known else "leave them out"
        raise ValueError(f"attributes: expected {choices}, got {', '.join(map(repr, unknown))}: {remedy}")
    return replace(dataset, attributes=tuple(wanted))


def choose_split(dataset: Dataset) -> str:
    """The name of the requested split in the data: train, validation, test or all; ValueError where it has none."""
    if dataset.split == "all":
        return "all"
    wanted = split_named(dataset.split)
    named = SOURCES[dataset.source].find_splits(replace(dataset, split=wanted or "test"))
    choices = [split for split in SPLIT_NAMES if split in named] or ["train", "test"]
    if dataset.split == "held-out":
        if "train" in choices and len(choices) == 1:
            raise ValueError(
                f"expected a test or validation split to hold out in {where_of(dataset)}, found train alone: to "
                "hold out one image in ten, name the folder train/ itself, or leave train out of the names of files; "
                "else choose train or all, or for a training none"
            )
        wanted = choices[-1]  # test, else validation
    if wanted not in choices:
        raise ValueError(
            f"split: expected one of {', '.join([*choices, 'all'])}, which {where_of(dataset)} has, got "
            f"{dataset.split!r}: choose from these"
        )
    return wanted


def held_out_of(dataset: Dataset) -> Dataset:
    """The labelled images of a data set to measure on: its test split, or validation where it has no test."""
    return replace(dataset, split=choose_split(replace(dataset, split="held-out")), unlabelled=False)


def check_data(source: str, data: str) -> str:
    """The absolute location of the data; ValueError if it is missing."""
    doc = SOURCES[source].doc
    if not data:
        raise ValueError(f"data: expected where the images of {source} lie ({doc}), got nothing: name it")
    if not storage.is_remote(data):
        storage.filesystem(data)
        data = os.path.abspath(os.path.expanduser(data))
    elif not SOURCES[source].remote:
        raise ValueError(f"{source} expects a local directory, found {storage.display(data)}: copy it here")
    if not storage.exists(data):
        where = f"{storage.display(data)}: check the path, and that this machine can reach it"
        raise ValueError(f"{source} expects data ({doc}), found nothing at {where}")
    return data


def require_outside(dataset: Dataset, out: str) -> None:
    """Raise ValueError if an output directory lies in a folder of data, where its files would be read as data."""
    if dataset.source in ("folder", "parquet") and storage.lies_in(out, str(dataset.data)):
        raise ValueError(f"out: expected a directory outside the data, got {storage.display(out)}: choose another")


def list_images(dataset: Dataset) -> pa.Table:
    """The listing: one row for each image, see the module's docstring. ``left_out`` tells what is not in it.

    ValueError: no image, or image ids that are missing or double.
    """
    listing = SOURCES[dataset.source].list_images(dataset)
    ids = listing["image_id"]
    where = where_of(dataset)
    if not len(ids):
        reasons = "".join(f"; left out: {counted(count, reason)}" for reason, count in left_out(listing).items())
        reasons += "".join(f"; {note}" for note in notes(listing))
        raise ValueError(
            f"expected images in split {dataset.split!r} of {where}, found none{reasons}: check the path and its "
            f"layout ({SOURCES[dataset.source].doc}), or choose another split"
        )
    require_unique(ids, where)
    return normalise_labels(listing)


def normalise_labels(listing: pa.Table) -> pa.Table:
    """The listing with each class name in one form, see ``normalise_names``, and notes of doubtful names."""
    names = pc.unique(listing["label_name"]).drop_null()
    labels, composed = normalise_names(listing["label_name"]), Counter(normalise_names(names).to_pylist())
    told = [
        f"the class {name!r} is written in two ways that look alike (Unicode NFC and NFD), read as one"
        for name in sorted(composed)
        if composed[name] > 1
    ]
    folded: dict[str, list[str]] = {}
    for name in sorted(composed):
        folded.setdefault(name.casefold(), []).append(name)
    told += [
        f"classes whose names differ in case only: {', '.join(alike)}; rename one if they are the same"
        for alike in folded.values()
        if len(alike) > 1
    ]
    told += [
        f"{plural(pc.sum(pc.equal(labels, name)).as_py(), 'image has', 'images have')} the label {name!r}, read as a "
        "class; if it stands for no label, leave it out"
        for name in sorted(composed)
        if name.casefold() in MISSING
    ]
    listing = listing.set_column(listing.column_names.index("label_name"), "label_name", labels)
    return annotate(listing, sentences=told)


def normalise_names(names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Names of classes in one form of Unicode (NFC), on one line."""
    names = pc.utf8_normalize(names, form="NFC")
    different = [name for name in pc.unique(names).drop_null().to_pylist() if escaped(name) != name]
    for character in sorted({*"".join(different)}):
        names = pc.replace_substring(names, character, escaped(character))
    return names


def class_names_of(listing: pa.Table) -> tuple[str, ...]:
    """The classes to train on, at least two: the listing's labels, sorted; as numbers where all of them are."""
    names = pc.unique(listing["label_name"]).drop_null().to_pylist()
    if len(names) < 2:
        raise ValueError(
            f"expected images of at least two classes, found {', '.join(map(repr, names)) or 'no labels'}: a class is "
            "a folder, a value of the column label, or a row of labels.csv (file_name,label)"
            + "".join(f"; {note}" for note in notes(listing))
        )
    return tuple(sorted(names, key=int if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names) else None))


def label_indices(label_names: pa.Array | pa.ChunkedArray, class_names: Sequence[str]) -> pa.Array:
    """The index of each label in ``class_names``, int32; null for a missing or an unknown one."""
    found = pc.index_in(normalise_names(label_names), value_set=normalise_names(pa.array(class_names, pa.string())))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def listing_fingerprint(listing: pa.Table) -> str:
    """sha256 over the rows of a listing, sizes of files included, however the table is cut into chunks."""
    digest = hashlib.sha256()
    for field in listing.schema:
        column = listing[field.name]
        digest.update(json.dumps([field.name, str(field.type), len(column)]).encode())
        digest.update(np.packbits(column.is_null().to_numpy()).tobytes())
        if pa.types.is_string(field.type):
            digest.update(pc.binary_length(column).fill_null(0).to_numpy().astype("<i4"))
            for start in range(0, len(column), PIECE):
                digest.update("".join(text or "" for text in column[start : start + PIECE].to_pylist()).encode())
        else:
            digest.update(column.cast(pa.int64(), safe=False).fill_null(0).to_numpy().astype("<i8"))
    return digest.hexdigest()


def infer_preprocessing(
    dataset: Dataset,
    listing: pa.Table,
    *,
    image_size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    center_crop: int | None = None,
) -> Preprocessing:
    """The preprocessing for training: what is given, else the source's own, else looked up in 64 of the images.

    Looked up: grey if all of them are, and of 256 too, however they are stored, else RGB; their size if all have one
    and no side is above 128, else 64 x 64; what is white where images have more than 8 bits, in 1,024 of the images.
    ``image_size`` is a side, or (height, width), in pixels; ``center_crop`` the side of the centred square taken first.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if known := SOURCES[dataset.source].default_preprocessing:
        height, width = size or (known.height, known.width)
        return Preprocessing(mode or known.mode, height, width, center_crop or known.center_crop)
    sizes, grey, largest = sample_images(dataset, listing, 64)
    if grey and not mode:
        grey = sample_images(dataset, listing, 256)[1]
    if largest is not None:
        largest = sample_images(dataset, listing, 1024)[2]
    mode = mode or ("L" if grey else "RGB")
    common = sizes.pop() if len(sizes) == 1 and not center_crop else (64, 64)
    size = size or (common if max(common) <= 128 else (64, 64))
    if largest is not None:  # the end of the fewest bits that hold it
        largest = next((top for top in RANGES if largest <= top), (1 << largest.bit_length()) - 1)
    return Preprocessing(mode, *size, center_crop, largest)


def sample_images(dataset: Dataset, listing: pa.Table, count: int) -> tuple[set[tuple[int, int]], bool, int | None]:
    """Sizes (height, width) of some images, upright; whether all are grey; the largest value above 8 bits, or None."""
    indices = np.unique(np.linspace(0, len(listing) - 1, count).astype(int))
    sizes, grey, largest, deep, reasons = set(), True, None, list[int](), list[str]()
    for _, content in SOURCES[dataset.source].read_images(dataset, listing.take(indices)):
        try:
            if isinstance(content, UnreadableImage):
                raise content
            opened = content if isinstance(content, Image.Image) else open_image(content)
            # Of colours of 16 bits Pillow keeps the upper 8, and tells it before it decodes them.
            is_deep = opened.mode in ("RGB", "RGBA") and any(";16" in str(tile) for tile in getattr(opened, "tile", ()))
            picture = decode(upright, opened)
            deep += [int(np.asarray(picture)[..., :3].max())] if is_deep else []
            value = max_value_of(picture)
            if value is not None or picture.mode == "F":
                convert(picture, "L", value or 255)  # refuses floats and negative values out of range
            sizes.add((picture.height, picture.width))
            grey = grey and is_grey(picture)
            if value is not None:
                largest = max(largest or 0, value)
        except UnreadableImage as error:
            reasons.append(str(error))
    if not sizes:
        raise ValueError(f"expected images, found none that can be read among {len(indices)}; the first: {reasons[0]}")
    if deep and max(deep) < 64:
        raise ValueError(
            f"expected colours of 16 bits that use their range, found none above {256 * max(deep) + 255} in "
            f"{len(deep)} images, which would be almost black: convert them to 8 bits a channel"
        )
    return sizes, grey, largest


def read_images(dataset: Dataset, rows: pa.Table, preprocessing: Preprocessing) -> pa.Table:
    """Rows of the listing with their pixels and further columns (``schema.shard_schema``), in the same order.

    An image that cannot be read is a row with a null image and its reason. ``clipped_of`` counts those with values
    above the range of the model. StorageError: the source itself is out of reach; the rows are to be read again.
    """
    pixels = np.zeros((len(rows), math.prod(preprocessing.image_shape)), np.uint8)
    errors: list[str | None] = ["expected an image, found that its source gave none: report this"] * len(rows)
    clipped = 0
    for index, content in SOURCES[dataset.source].read_images(dataset, rows):
        try:
            if isinstance(content, UnreadableImage):
                raise content
            image, within_range = preprocessing.apply_within_range(content)
            pixels[index] = image.reshape(-1)
            errors[index] = None
            clipped += not within_range
        except UnreadableImage as error:
            errors[index] = str(error)
    extra = rows.drop_columns(list(LISTING_COLUMNS))
    fields = schema.shard_schema(preprocessing.image_shape, extra.schema)
    images = schema.fixed_size_list(pixels, np.array([error is None for error in errors], bool))
    columns = [rows["image_id"], rows["label_name"], images, pa.array(errors, pa.string())]
    if clipped:
        fields = fields.with_metadata({b"clarity.clipped": str(clipped)})
    return pa.table([*columns, *extra.columns], schema=fields)


def clipped_of(images: pa.Table) -> int:
    """How many images that ``read_images`` gave hold values above the range of the model."""
    return int((images.schema.metadata or {}).get(b"clarity.clipped", 0))


def read_all(
    dataset: Dataset, listing: pa.Table, preprocessing: Preprocessing
) -> tuple[np.ndarray, list[str], list[str | None], dict[str, str]]:
    """Every readable image, for training: pixels (N, C, H, W), ids and label names; id -> reason of the others."""
    images = np.empty((len(listing), *preprocessing.image_shape), np.uint8)
    ids, label_names, errors = list[str](), list[str | None](), dict[str, str]()
    for start in range(0, len(listing), 1024):
        shard = read_images(dataset, listing.slice(start, 1024), preprocessing)
        good = shard["error"].is_null()
        bad, shard = shard.filter(pc.invert(good)), shard.filter(good)
        errors.update(zip(bad["image_id"].to_pylist(), bad["error"].to_pylist()))
        images[len(ids) : len(ids) + len(shard)] = schema.matrix(shard["image"]).reshape(-1, *images.shape[1:])
        ids += shard["image_id"].to_pylist()
        label_names += shard["label_name"].to_pylist()
    return images[: len(ids)], ids, label_names, errors


SOURCES: dict[str, Source] = {
    "digits": Source(
        "5,000 digits of MNIST that ship with the package",
        lambda dataset: list_parquet(replace(dataset, data=DIGITS)),
        lambda dataset, rows: read_parquet(replace(dataset, data=DIGITS), rows),
        default_preprocessing=Preprocessing("L", 28, 28),
        needs_data=False,
    ),
    "mnist": Source(
        "torchvision's layout, MNIST/raw/*-ubyte[.gz]",
        list_mnist,
        read_mnist,
        default_preprocessing=Preprocessing("L", 28, 28),
        remote=False,
    ),
    "folder": Source(
        "class folders of images, with or without train/, val/ and test/ above them, or images beside a labels.csv",
        list_folder,
        read_files,
        folder_splits,
        columns=("image", "label", "split"),
    ),
    "parquet": Source(
        "a Parquet file or a directory of them, with a column image; optional label, image_id, split",
        list_parquet,
        read_parquet,
        parquet_splits,
        columns=("image", "label", "image_id", "split"),
        attributes=parquet_attributes,
    ),
    "celeba_hair": Source(
        "official layout, img_align_celeba/, list_attr_celeba.txt, list_eval_partition.txt",
        list_celeba,
        read_files,
        lambda dataset: set(PARTITIONS.values()),
        Preprocessing("RGB", 64, 64, center_crop=148),
        attributes=lambda dataset: celeba_attributes(str(dataset.data)),
    ),
}
