"""What a user is told of a data set before a model is trained on it."""

from pathlib import Path

import pytest
from pictures import write_images

from clarity import data
from clarity.data.review import review


def lines_of(root: Path) -> list[str]:
    dataset = data.open_dataset("folder", root, "train")
    return review(data.list_images(dataset), data.list_images(data.held_out_of(dataset)))


def test_review_of_a_sound_data_set_says_nothing() -> None:
    dataset = data.open_dataset("digits")
    assert review(data.list_images(dataset), data.list_images(data.held_out_of(dataset))) == []
    assert review(data.list_images(dataset), None) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/a/1.png", "train/b/1.png", "train/b/2.png"], "note: one image only of a: add images, or leave"),
        (
            ["train/a/1.png", "train/c/1.png", "train/c/2.png"],
            "note: no held-out image of c: its accuracy stays unknown",
        ),
        (["train/a/1.png", "val/z/1.png"], "note: no image to train on of b, z, which is"),
        (["train/a/1.png"], "note: 2 held-out images with a label only"),
        (["train/a/1.png", "train/A/1.png"], "note: classes whose names differ in case only: A, a"),
        (["train/a/1.png", "loose.png"], "left out: 1 image beside train/, val/"),
        (["train/a/1.png", "train/.x/1.png"], "left out: 1 hidden file"),
    ],
)
def test_review_says_what_is_dropped_or_doubtful_in_a_line_each(names: list[str], said: str, tmp_path: Path) -> None:
    write_images(tmp_path, *names, "val/a/1.png", "val/b/1.png")
    assert [line for line in lines_of(tmp_path) if line.startswith(said)]


def test_review_says_once_that_no_held_out_image_has_a_label(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png", "test/3.png")
    (line,) = lines_of(tmp_path)
    assert line.startswith("note: no held-out image has a label: accuracies stay unknown")
