"""From bytes and arrays to the pixels of a model."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, encoded, random_pixels
from PIL import Image

from clarity import data
from clarity.images import Preprocessing, UnreadableImage


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
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    found = Preprocessing("L", HEIGHT, WIDTH).apply(buffer.getvalue())[0].astype(int)
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
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    assert Preprocessing("L", 1, 3).apply(buffer.getvalue()).tolist()[0][0][1] == 255


def test_apply_converts_colours_of_print() -> None:
    cyan = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    buffer = io.BytesIO()
    cyan.save(buffer, "TIFF")
    assert Preprocessing("RGB", HEIGHT, WIDTH).apply(buffer.getvalue())[:, 0, 0].tolist() == [0, 255, 255]


def test_apply_takes_the_first_frame() -> None:
    frames = [Image.fromarray(np.full((HEIGHT, WIDTH), value, np.uint8)) for value in (200, 50)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert set(Preprocessing("L", HEIGHT, WIDTH).apply(buffer.getvalue()).ravel().tolist()) == {200}


def test_apply_crops_the_centre_then_resizes() -> None:
    """As torchvision's Resize(64)(CenterCrop(148)(face)), which PyTorch-VAE uses."""
    face = Image.fromarray(random_pixels(3, 218, 178, 3))
    square = face.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.BILINEAR)
    preprocessing = data.SOURCES["celeba_hair"].default_preprocessing
    assert preprocessing is not None
    assert np.array_equal(preprocessing.apply(face), np.asarray(square).transpose(2, 0, 1))


def test_apply_takes_an_image_of_the_right_size_without_cropping() -> None:
    face = random_pixels(4, 64, 64, 3)
    assert np.array_equal(Preprocessing("RGB", 64, 64, center_crop=148).apply(encoded(face)), face.transpose(2, 0, 1))


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
