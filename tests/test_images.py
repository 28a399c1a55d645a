"""From bytes and arrays to the pixels of a model."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, encoded, opened, pixels_of, random_pixels
from PIL import Image, ImageOps

from clarity import data
from clarity.images import Preprocessing, UnreadableImage, is_grey, png_chunk


def test_apply_gives_the_pixels_of_an_image_that_fits() -> None:
    grey, colour = random_pixels(0), random_pixels(1, HEIGHT, WIDTH, 3)
    assert np.array_equal(Preprocessing("L", HEIGHT, WIDTH).apply(encoded(grey)), grey[None])
    assert np.array_equal(Preprocessing("RGB", HEIGHT, WIDTH).apply(encoded(colour)), colour.transpose(2, 0, 1))
    assert Preprocessing("RGB", HEIGHT, WIDTH).apply(Image.fromarray(grey)).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_apply_turns_by_exif(orientation: int, kind: str) -> None:
    turned = np.zeros((HEIGHT, WIDTH), np.uint8)
    turned[:4, :4] = 255  # upright: white in the top left corner
    turned[:4, 8:] = 128
    transposes = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's codes of the inverse operations
    stored = Image.fromarray(turned).convert("RGB")
    if (code := transposes[orientation]) is not None:
        stored = stored.transpose(Image.Transpose(code))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    found = Preprocessing("L", HEIGHT, WIDTH).apply(content)[0].astype(int)
    assert np.abs(found - turned).max() <= (20 if kind == "JPEG" else 0)


def test_apply_scales_sixteen_bits() -> None:
    values = np.array([[0, 127, 128, 129, 256, 257], [32767, 32768, 65279, 65280, 65406, 65535]], np.uint16)
    preprocessing = Preprocessing("L", 2, 6)
    expected = np.rint(values / 257).astype(np.uint8)[None]
    assert np.array_equal(preprocessing.apply(encoded(values)), expected)
    assert np.array_equal(preprocessing.apply(encoded(values, "TIFF")), expected)
    assert np.array_equal(preprocessing.apply(values), expected)
    assert np.array_equal(preprocessing.apply(encoded(values, "PPM")), expected)


def test_apply_lays_transparency_on_white() -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, :, 3], pixels[1, 0, 3] = 255, 128
    found = Preprocessing("RGB", 2, 3).apply(encoded(pixels))
    assert found[0].tolist() == [[0, 0, 0], [127, 255, 255]]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode=None).convert("P")
    palette.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    assert Preprocessing("L", 1, 3).apply(encoded(palette, transparency=1)).tolist()[0][0][1] == 255


def test_apply_converts_colours_of_print() -> None:
    cyan = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    assert Preprocessing("RGB", HEIGHT, WIDTH).apply(encoded(cyan, "TIFF"))[:, 0, 0].tolist() == [0, 255, 255]


def test_apply_takes_the_first_frame() -> None:
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH), value, np.uint8)) for value in (200, 50)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert set(Preprocessing("L", HEIGHT, WIDTH).apply(animated).ravel().tolist()) == {200}


def test_apply_crops_the_centre_then_resizes() -> None:
    """As torchvision's Resize(64)(CenterCrop(148)(face)), which PyTorch-VAE uses."""
    face = Image.fromarray(random_pixels(3, 218, 178, 3))
    square = face.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.BILINEAR)
    preprocessing = data.SOURCES["celeba_hair"].default_preprocessing
    assert preprocessing is not None
    assert np.array_equal(preprocessing.apply(face), np.asarray(square).transpose(2, 0, 1))
    assert np.array_equal(preprocessing.apply(square), np.asarray(square).transpose(2, 0, 1)), "of its size: as it is"


def test_apply_takes_arrays_of_exactly_the_models_size() -> None:
    colour = random_pixels(5, HEIGHT, WIDTH, 3)
    rgb, grey = Preprocessing("RGB", HEIGHT, WIDTH), Preprocessing("L", HEIGHT, WIDTH)
    expected = colour.transpose(2, 0, 1)
    assert np.array_equal(rgb.apply(colour), expected)
    assert np.array_equal(rgb.apply(expected), expected)
    assert np.array_equal(rgb.apply(expected / 255), expected)
    assert np.array_equal(rgb.apply((expected / 255).astype(np.float32)), expected)
    assert np.array_equal(rgb.apply(expected.astype(np.int64)), expected)
    assert np.array_equal(grey.apply(colour[..., 0]), colour[None, ..., 0])
    assert np.array_equal(grey.apply(colour[..., :1] > 9), 255 * (colour[None, ..., 0] > 9))
    for wrong in (
        colour[1:],
        colour[..., 0],
        random_pixels(0, WIDTH, HEIGHT, 3),
        random_pixels(0, HEIGHT, WIDTH, 4),
        random_pixels(0, 5),
    ):
        with pytest.raises(UnreadableImage, match=r"expected an array of shape \(3, 8, 12\), found"):
            rgb.apply(wrong)


def test_reasons_are_the_same_in_each_run() -> None:
    class Broken(Image.Image):
        def load(self) -> Any:
            raise OSError(f"cannot read {object()!r} now")

    picture = Broken()
    picture._size = (WIDTH, HEIGHT)
    with pytest.raises(UnreadableImage, match=r"found a broken one \(cannot read now\): copy it again"):
        Preprocessing("L", HEIGHT, WIDTH).apply(picture)


def test_preprocessing_comes_back_from_json() -> None:
    preprocessing = Preprocessing("RGB", HEIGHT, WIDTH, 7)
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    assert preprocessing.image_shape == (3, HEIGHT, WIDTH)
    assert Preprocessing("L", HEIGHT, WIDTH).image_shape == (1, HEIGHT, WIDTH)
    for fields in (
        {"mode": "L"},
        {"mode": "L", "height": 1, "width": 1, "code": "x"},
        [1],
        None,
        {"mode": "L", "height": 2, "width": "x"},
    ):
        with pytest.raises(ValueError, match="expected"):
            Preprocessing.from_json(fields)


def tiff(pixels: np.ndarray, photometric: int, sample_format: int) -> bytes:
    """An uncompressed TIFF (H, W, C) of kinds that Pillow does not write; formats are 1 unsigned, 2 signed, 3 float."""
    height, width, channels = pixels.shape
    fields = {256: width, 257: height, 259: 1, 262: photometric, 277: channels, 278: height, 279: pixels.nbytes}
    start = 8 + 2 + 12 * 10 + 4
    lists = {258: 8 * pixels.dtype.itemsize, 339: sample_format}
    entries, extra = [], b""
    for tag in sorted({*fields, *lists, 273}):
        if tag == 273:
            entries.append(struct.pack("<HHII", tag, 4, 1, start + 4 * channels))
        elif tag in lists and channels > 2:
            entries.append(struct.pack("<HHII", tag, 3, channels, start + len(extra)))
            extra += struct.pack(f"<{channels}H", *[lists[tag]] * channels)
        else:
            entries.append(struct.pack("<HHII", tag, 4, 1, fields.get(tag, lists.get(tag, 0))))
    extra = extra.ljust(4 * channels, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, 10) + b"".join(entries) + bytes(4) + extra + pixels.tobytes()


def png_with_transparency(pixels: np.ndarray, value: int) -> bytes:
    """A grey PNG in which one value is transparent."""
    content = encoded(pixels)
    start = content.index(b"IDAT") - 4
    return content[:start] + png_chunk(b"tRNS", struct.pack(">H", value)) + content[start:]


def test_a_grey_picture_is_known_however_it_is_stored() -> None:
    grey, colour = (Image.fromarray(random_pixels(0, HEIGHT, WIDTH, *channels)) for channels in ((), (3,)))
    assert all(is_grey(grey.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F"))
    assert not any(is_grey(colour.convert(mode)) for mode in ("P", "RGB", "RGBA", "CMYK"))


def test_images_stored_with_colours_and_without_any_are_grey(tmp_path: Path) -> None:
    for number in range(200):
        pixels = np.repeat(random_pixels(number, HEIGHT, WIDTH, 1), 3, axis=2)
        if number == 100:
            pixels = random_pixels(number, HEIGHT, WIDTH, 3)
        folder = tmp_path / ("a" if number < 100 else "b")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(encoded(pixels))
    dataset = data.open_dataset("folder", tmp_path, "all")
    listing = data.list_images(dataset)
    for rows, mode in ((listing, "RGB"), (listing.slice(0, 100), "L"), (listing.slice(101), "L")):
        assert data.infer_preprocessing(dataset, rows) == Preprocessing(mode, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_apply_makes_a_transparent_grey_white_at_any_depth(kind: Any) -> None:
    pixels = np.array([[0, 1, 2]], kind)
    found = Preprocessing("L", 1, 3).apply(png_with_transparency(pixels, 1))
    assert found.ravel().tolist() == ([0, 255, 2] if kind == np.uint8 else [0, 255, 0])


@pytest.mark.parametrize("kind", ["<u4", "<i4", "<i2"])
def test_apply_reads_wide_integers_of_files_as_those_of_arrays(kind: str) -> None:
    pixels = np.arange(96).reshape(HEIGHT, WIDTH, 1).astype(kind)
    found = Preprocessing("L", HEIGHT, WIDTH).apply(tiff(pixels, 1, 1 if kind == "<u4" else 2))
    assert np.array_equal(found, pixels.transpose(2, 0, 1))
    assert np.array_equal(found, Preprocessing("L", HEIGHT, WIDTH).apply(pixels[..., 0]))
    with pytest.raises(UnreadableImage, match=r"pixels in \[0, 255\], found 0 to 300: scale them"):
        Preprocessing("L", HEIGHT, WIDTH).apply(tiff(np.where(pixels == 95, 300, pixels).astype(kind), 1, 2))


@pytest.mark.parametrize(("largest", "top"), [(200, 255), (1023, 1023), (4000, 4095), (9000, 16383), (40000, 65535)])
def test_the_range_of_wide_images_is_found_in_training_and_kept(largest: int, top: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, largest, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(ramp // (3 - number)))
    dataset, listing = opened("folder", tmp_path, "all")
    preprocessing = data.infer_preprocessing(dataset, listing)
    assert preprocessing == Preprocessing("L", HEIGHT, WIDTH, max_value=top)
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    expected = np.rint(ramp * (255 / top)).astype(np.uint8)
    assert np.array_equal(preprocessing.apply(encoded(ramp))[0], expected)
    assert np.array_equal(preprocessing.apply(ramp)[0], expected)
    assert data.clipped_of(data.read_images(dataset, listing, preprocessing)) == 0


def test_images_above_the_range_are_clipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(np.full((HEIGHT, WIDTH), 4095, np.uint16)))
    (tmp_path / "1.png").write_bytes(encoded(np.full((HEIGHT, WIDTH), 4096, np.uint16)))
    dataset = data.open_dataset("folder", tmp_path, "all")
    images = data.read_images(dataset, data.list_images(dataset), Preprocessing("L", HEIGHT, WIDTH, max_value=4095))
    assert data.clipped_of(images) == 1
    assert set(pixels_of(images, (1, HEIGHT, WIDTH)).ravel().tolist()) == {255}


def test_models_without_a_range_read_sixteen_bits_as_before() -> None:
    assert Preprocessing.from_json({"mode": "L", "height": 1, "width": 2}).max_value is None
    assert Preprocessing("L", 1, 2).apply(encoded(np.array([[257, 65535]], np.uint16))).ravel().tolist() == [1, 255]


def test_dark_colours_of_sixteen_bits_are_refused_in_training(tmp_path: Path) -> None:
    (tmp_path / "0.tiff").write_bytes(tiff(np.full((HEIGHT, WIDTH, 3), 4095, "<u2"), 2, 1))
    dataset = data.open_dataset("folder", tmp_path, "all")
    with pytest.raises(ValueError, match=r"colours of 16 bits that use their range, found none above 4095"):
        data.infer_preprocessing(dataset, data.list_images(dataset))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.linspace(0, 255, HEIGHT * WIDTH, dtype=np.float32), r"in \[0, 1\], found 0.0 to 255.0: scale them"),
        (np.full(HEIGHT * WIDTH, np.nan, np.float32), "found 96 of 96 NaN or infinite"),
        (np.linspace(-1000, 3000, HEIGHT * WIDTH, dtype=np.int32), r"int32 pixels in \[0, 3000\], found -1000 to 3000"),
    ],
)
def test_images_out_of_range_are_refused_before_training(values: np.ndarray, said: str, tmp_path: Path) -> None:
    for name in ("a/0.tif", "b/1.tif"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(values.reshape(HEIGHT, WIDTH), "TIFF"))
    dataset, listing = opened("folder", tmp_path, "all")
    with pytest.raises(ValueError, match=f"found none that can be read among 2; the first: expected .*{said}"):
        data.infer_preprocessing(dataset, listing)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_the_inferred_size_is_that_after_turning_once(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / f"x.{kind.lower()}").write_bytes(encoded(random_pixels(0, 8, 12, 3), kind, exif=exif))
    dataset = data.open_dataset("folder", tmp_path, "all")
    found = data.infer_preprocessing(dataset, data.list_images(dataset))
    assert found == Preprocessing("RGB", 12, 8)
    upright = Image.open(tmp_path / f"x.{kind.lower()}")
    expected = np.asarray(ImageOps.exif_transpose(upright)).transpose(2, 0, 1)
    assert np.array_equal(found.apply((tmp_path / f"x.{kind.lower()}").read_bytes()), expected)


def test_apply_reads_lab_and_says_what_other_tiffs_are() -> None:
    lab = tiff(random_pixels(0, HEIGHT, WIDTH, 3), 8, 1)
    for mode, channels in (("RGB", 3), ("L", 1)):
        assert Preprocessing(mode, HEIGHT, WIDTH).apply(lab).shape == (channels, HEIGHT, WIDTH)
    floats = tiff(np.random.default_rng(0).random((HEIGHT, WIDTH, 3), np.float32), 2, 3)
    with pytest.raises(UnreadableImage, match="found a TIFF of pixels that are not read, such as floats of several"):
        Preprocessing("RGB", HEIGHT, WIDTH).apply(floats)


def test_a_largest_value_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="expected max_value of 1 to 2147483647, found 0"):
        Preprocessing("L", HEIGHT, WIDTH, max_value=0)
