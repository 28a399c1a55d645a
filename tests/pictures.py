"""Images, folders and Parquet files that tests of the sources make for themselves."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from clarity import data, schema
from clarity.images import Preprocessing

HEIGHT, WIDTH = 8, 12
GREY = Preprocessing("L", HEIGHT, WIDTH)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (HEIGHT, WIDTH), dtype=np.uint8)


def pixels_of(images: pa.Table, shape: tuple[int, int, int] = (1, HEIGHT, WIDTH)) -> np.ndarray:
    """The pixels (B, C, H, W) that ``data.read_images`` has read."""
    return schema.matrix(images["image"]).reshape(-1, *shape)


def write_images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(random_pixels(number)))


def write_shapes(root: Path, count: int, size: tuple[int, int]) -> None:
    """Colour images of discs, crosses and squares in random colours, a folder for each class."""
    height, width = size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shapes = {"disc": np.hypot(x, y) < 0.6, "cross": np.minimum(abs(x), abs(y)) < 0.2, "square": np.maximum(x, y) < 0.3}
    for number, colours in enumerate(np.random.default_rng(0).integers(0, 256, (count, 2, 3), dtype=np.uint8)):
        name, inside = list(shapes.items())[number % 3]
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.png").write_bytes(encoded(np.where(inside[..., None], *colours)))


def opened(*arguments: Any, **options: Any) -> tuple[data.Dataset, pa.Table]:
    """A data set and its listing."""
    dataset = data.open_dataset(*arguments, **options)
    return dataset, data.list_images(dataset)


def listed(root: Any, split: str = "all", source: str = "folder") -> dict[str, str | None]:
    listing = opened(source, root, split)[1]
    return dict(zip(listing["image_id"].to_pylist(), listing["label_name"].to_pylist(), strict=True))


def read(root: Any, source: str = "folder", split: str = "all", **options: Any) -> pa.Table:
    """The images of a data set as ``data.read_images`` reads them: grey, HEIGHT x WIDTH."""
    return data.read_images(*opened(source, root, split, **options), GREY)


def parquet_table(count: int, **columns: Any) -> pa.Table:
    images = [{"bytes": encoded(random_pixels(number)), "path": None} for number in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), **columns})
