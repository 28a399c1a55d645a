"""Image files to pixels and back: decoding within safe limits, orientation, crop, resize, and PNG files."""

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

#: What is decoded, and nothing else: some of Pillow's other formats start programs.
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
MAX_PIXELS = 64 << 20
MAX_BYTES = 1 << 30

#: Largest values of images of 8, 10, 12, 14 and 16 bits, whatever the bits of the file that holds them.
RANGES = (255, 1023, 4095, 16383, 65535)

ORIENTATION_TAG = 0x0112  # of EXIF: how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """Why one image cannot be used: what was expected, what was found, what to do. Becomes the row's ``error``."""


def square_of(image_shape: tuple[int, int, int], max_side: int) -> int:
    """Pixels a side of the squares whose means make an image (C, H, W) at most ``max_side`` pixels high and wide."""
    return math.ceil(max(image_shape[1:]) / max_side)


def shrunk_shape(image_shape: tuple[int, int, int], square: int) -> tuple[int, int, int]:
    """Shape of the means of squares of an image (C, H, W), those at its edges cut, as of an average pooling."""
    channels, height, width = image_shape
    return channels, math.ceil(height / square), math.ceil(width / square)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's pixels, the same in training and explaining; stored in model.json.

    In this order: first frame; orientation by EXIF; wider integers and floats scaled to 8 bits; transparency on
    white; mode (grey: ITU-R 601-2 luma); centre crop; resize (bilinear, antialiased, the aspect is not kept).
    """

    mode: str  # "L" (grey, C=1) or "RGB" (C=3)
    height: int  # H in pixels
    width: int  # W in pixels
    #: side of the centred square taken first, from images that are not (height, width) already
    center_crop: int | None = None
    #: what is white in grey images of more than 8 bits, as larger values are; None: 65535 for 16 bits, 255 for 32
    max_value: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("L", "RGB"):
            raise ValueError(f"expected mode 'L' (grey) or 'RGB' (colour), found {self.mode!r}: choose one of them")
        for name, most in (("height", 8192), ("width", 8192), ("center_crop", 8192), ("max_value", (1 << 31) - 1)):
            value = getattr(self, name)
            unset = (name == "center_crop" and not value) or (name == "max_value" and value is None)
            if not unset and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"expected {name} of 1 to {most}, found {value!r}: choose one in that range")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (1 if self.mode == "L" else 3, self.height, self.width)

    def apply(self, image: bytes | np.ndarray | Image.Image) -> np.ndarray:
        """The pixels of one image, uint8 (C, H, W).

        Args:
            image: a file's bytes or a PIL image, of any size; or an array of exactly the model's size, (C, H, W),
                (H, W, C) or, for one channel, (H, W): uint8, integers in [0, 255], uint16, or floats in [0, 1].

        Raises:
            UnreadableImage: it is none, or cannot be used; says why.
        """
        return self.apply_within_range(image)[0]

    def apply_within_range(self, image: bytes | np.ndarray | Image.Image) -> tuple[np.ndarray, bool]:
        """As ``apply``; and whether no value is above the range of the model, ``max_value``."""
        if isinstance(image, np.ndarray):
            return self.from_array(image)
        picture = image if isinstance(image, Image.Image) else open_image(image)
        picture = decode(upright, picture)
        largest = max_value_of(picture)
        within = largest is None or self.max_value is None or largest <= self.max_value
        pixels = np.asarray(decode(lambda: self.fit(convert(picture, self.mode, self.max_value))))
        if self.mode == "L":
            return pixels.reshape(self.image_shape), within
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), within

    def to_json(self) -> dict[str, Any]:
        """The fields, for model.json."""
        return {name: value for name, value in asdict(self).items() if name != "max_value" or value is not None}

    @classmethod
    def from_json(cls, fields: Any) -> "Preprocessing":
        """The inverse of ``to_json``; ValueError for other fields or a value out of its range."""
        names = cls.__dataclass_fields__
        if not isinstance(fields, dict) or not {"mode", "height", "width"} <= fields.keys() <= names.keys():
            raise ValueError(f"expected preprocessing with {', '.join(names)}, found {fields!r}: restore the file")
        return cls(**fields)

    def fit(self, picture: Image.Image) -> Image.Image:
        """The picture cropped and resized to the size of the model."""
        width, height = picture.size
        if (width, height) == (self.width, self.height):
            return picture
        if side := self.center_crop:
            if side > min(width, height):
                raise UnreadableImage(
                    f"expected at least {side} x {side} pixels for the centre crop, found {width} x {height}: "
                    "leave it out, or train with a smaller centre crop"
                )
            left, top = round((width - side) / 2), round((height - side) / 2)
            picture = picture.crop((left, top, left + side, top + side))
        return picture.resize((self.width, self.height), Image.Resampling.BILINEAR)

    def from_array(self, array: np.ndarray) -> tuple[np.ndarray, bool]:
        """The pixels of an array of the model's size, and whether no value is above the range of the model."""
        channels, height, width = self.image_shape
        if array.shape != self.image_shape and array.shape == (height, width, channels):
            array = array.transpose(2, 0, 1)
        elif channels == 1 and array.shape == (height, width):
            array = array[None]
        if array.shape != self.image_shape:
            raise UnreadableImage(
                f"expected an array of shape {self.image_shape}, found {array.shape}: resize it, or give a PIL image, "
                "which is cropped and resized as in training"
            )
        wide = array.dtype.kind in "iu" and array.dtype.itemsize > 1 and self.max_value is not None
        within = not wide or int(array.max()) <= self.max_value  # type: ignore[operator]
        return np.ascontiguousarray(to_uint8(array, self.max_value)), within


def open_image(data: bytes) -> Image.Image:
    """An image of which the header alone has been read."""
    if not data:
        raise UnreadableImage("expected an image, found an empty file: copy it again")
    try:
        return decode(Image.open, io.BytesIO(data), "r", list(FORMATS))
    except UnidentifiedImageError:
        start = data[:12]
        if start[:4] in (b"II*\0", b"MM\0*"):
            found = "a TIFF of pixels that are not read, such as floats of several channels or more than 32 bits"
        else:
            found = f"bytes beginning with {start!r}"
        raise UnreadableImage(
            f"expected an image ({', '.join(FORMATS)}), found {found}: convert it or leave it out"
        ) from None


def decode(action: Callable[..., Image.Image], *args: Any) -> Image.Image:
    """Run an operation of Pillow; any exception on broken bytes becomes an UnreadableImage, warnings are ignored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action(*args)
    except (UnreadableImage, UnidentifiedImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise too_large(pixels[0] if pixels else "more") from None
    except Exception as error:
        # Neither an address in memory nor a whole file in the message: a row's reason is the same in each run.
        reason = re.sub(r"\s*<[^>]*>", "", str(error) or type(error).__name__)[:120]
        raise UnreadableImage(f"expected a whole image, found a broken one ({reason}): copy it again") from None


def too_large(found: str) -> UnreadableImage:
    """Why an image is not decoded."""
    return UnreadableImage(f"expected at most {MAX_PIXELS} pixels, found {found}: make the image smaller")


def upright(picture: Image.Image) -> Image.Image:
    """The first frame, decoded, turned as its EXIF orientation says."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise too_large(f"{width} x {height}")
    picture.load()  # which turns a TIFF itself, and forgets its orientation
    try:
        turn = TURNS.get(int(picture.getexif().get(ORIENTATION_TAG, 1)))
    except Exception:  # broken EXIF does not make the pixels unreadable
        turn = None
    return picture if turn is None else picture.transpose(turn)


def max_value_of(picture: Image.Image) -> int | None:
    """The largest value of a decoded grey image of more than 8 bits; None for others."""
    return int(np.asarray(picture).max()) if picture.mode.startswith("I") else None


def is_grey(picture: Image.Image) -> bool:
    """Whether a decoded picture has no colour, also where it is stored as one of colours."""
    if picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I"):
        return True
    red, green, blue = decode(convert, picture, "RGB", None).split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def convert(picture: Image.Image, mode: str, max_value: int | None) -> Image.Image:
    """The decoded picture in mode "L" or "RGB", 8 bits."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture)
        # Pillow scales the wide values of PPM files to 16 bits.
        scaled = to_uint8(values, 65535 if picture.format in ("PPM", "PNG") and max_value is None else max_value)
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            scaled = np.where(values == transparent, np.uint8(255), scaled)
        picture = Image.fromarray(scaled)
    if picture.mode == "LAB":  # which becomes grey by way of RGB alone
        picture = picture.convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


def to_uint8(values: np.ndarray, max_value: int | None) -> np.ndarray:
    """Pixels as 8 bits, rounded: floats of [0, 1], 16-bit integers of [0, 65535], others of [0, 255 or max_value]."""
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if values.dtype == np.uint8:
        return values
    if kind not in "biuf":
        raise UnreadableImage(f"expected pixels of type uint8 or float32, found {values.dtype}: convert them")
    if bad := int(np.size(values) - np.isfinite(values).sum()):
        raise UnreadableImage(f"expected finite pixels, found {bad} of {values.size} NaN or infinite: mend or drop it")
    top = 1 if kind in "bf" else max_value or (65535 if (kind, bits) == ("u", 16) else 255)
    low, high = values.min(), values.max()
    if low < 0 or (high > top and (kind in "bf" or max_value is None)):
        raise UnreadableImage(f"expected {values.dtype} pixels in [0, {top}], found {low} to {high}: scale them")
    return np.rint(np.minimum(values.astype(np.float64), top) * (255 / top)).astype(np.uint8)


def encode_png(images: np.ndarray) -> list[bytes]:
    """PNG files of images (B, C, H, W) uint8, grey or colour; equal images give equal bytes."""
    rows, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"expected pictures of 1 or 3 channels, got {channels}")
    lines = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).reshape(rows, height, width * channels)
    filtered = np.zeros((rows, height, 1 + width * channels), np.uint8)
    filtered[:, :, 1:] = lines
    if channels == 3:
        # Filter 2 of the format, the difference to the line above: photographs shrink by a third. Digits do not.
        filtered[:, 1:, 0] = 2
        filtered[:, 1:, 1:] -= lines[:, :-1]
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    start, end = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header), png_chunk(b"IEND", b"")
    return [start + png_chunk(b"IDAT", zlib.compress(picture, 1)) + end for picture in filtered]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file: length, type, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def decode_png(column: pa.ChunkedArray | pa.Array | list[bytes], image_shape: tuple[int, int, int]) -> np.ndarray:
    """Images (B, C, H, W) uint8 of a column of PNG files without nulls, as the audit's tables hold them."""
    channels, height, width = image_shape
    files = column if isinstance(column, list) else column.to_pylist()
    images = np.empty((len(files), height, width, channels), np.uint8)
    for image, data in zip(images, files):
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            image[...] = np.asarray(picture).reshape(image.shape)
    return images.transpose(0, 3, 1, 2)


def encode_png_column(table: pa.Table, name: str, image_shape: tuple[int, int, int]) -> pa.Table:
    """The table with the raw pixels of column ``name`` encoded as PNG files; null stays null."""
    index = table.column_names.index(name)
    column = table[name].combine_chunks()
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    files = np.full(len(column), None, object)
    if valid.any():
        raw = np.frombuffer(b"".join(column.drop_null().to_pylist()), np.uint8)
        files[valid] = encode_png(raw.reshape(-1, *image_shape))
    return table.set_column(index, table.schema.field(name), pa.array(files, pa.binary()))
