"""Tables of labels beside images: labels.csv, metadata.csv and their kin."""

from pathlib import Path

import pytest
from pictures import listed, write_images

from clarity import data


def write_table(root: Path, text: str, name: str = "labels.csv") -> None:
    (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file_name,label\n1.png,cat\n2.png,dog\n3.png,\n"),
        ("metadata.csv", "\ufefffile_name;label\n1.png;cat\n2.png;dog\n3.png;\n"),
        ("labels.tsv", "filename\tclass\n./1.png\tcat\n2\tdog\n"),
        ("labels.csv", "id,category\n1,cat\n2,dog\n"),
        ("labels.csv", "file_name, label\r1.png, cat\r2.png,dog \r3.png, \r"),
        ("metadata.jsonl", '{"file_name": "1.png", "label": "cat"}\n{"file_name": "2.png", "label": "dog"}\n'),
    ],
)
def test_labels_of_a_flat_folder(name: str, text: str, tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png", "3.png")
    write_table(tmp_path, text, name)
    assert listed(tmp_path) == {"1.png": "cat", "2.png": "dog", "3.png": None}


def test_labels_of_a_folder_of_images_beside_the_table(tmp_path: Path) -> None:
    write_images(tmp_path, "images/1.png", "images/2.png")
    write_table(tmp_path, "image,label\n1.png,0\nimages\\2.png,1\n")
    assert listed(tmp_path) == {"images/1.png": "0", "images/2.png": "1"}


def test_labels_beside_each_split(tmp_path: Path) -> None:
    """The layout that Hugging Face calls imagefolder."""
    write_images(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    write_table(tmp_path / "train", "file_name,label\n1.png,cat\n2.png,dog\n", "metadata.csv")
    write_table(tmp_path / "test", "file_name,label\n1.png,dog\n", "metadata.csv")
    assert listed(tmp_path, "train") == {"train/1.png": "cat", "train/2.png": "dog"}
    assert listed(tmp_path, "test") == {"test/1.png": "dog"}


def test_labels_may_name_splits(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png", "3.png")
    write_table(tmp_path, "file_name,label,split\n1.png,a,train\n2.png,b,Val\n3.png,a,train\n")
    assert data.open_dataset("folder", tmp_path, "held-out").split == "validation"
    assert listed(tmp_path, "train") == {"1.png": "a", "3.png": "a"}
    assert listed(tmp_path, "val") == {"2.png": "b"}
    write_images(tmp_path, "4.png")
    listing = data.list_images(data.open_dataset("folder", tmp_path, "train"))
    assert data.left_out(listing) == {"images for which the table of labels names no split": 1}


def test_labels_in_columns_of_other_names(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png")
    write_table(tmp_path, "Photo,breed\n1.png,pug\n2.png,collie\n")
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    with pytest.raises(ValueError, match=r"found no labels.*line names the columns Photo, breed; say .* image=NAME"):
        data.class_names_of(listing)
    named = data.open_dataset("folder", tmp_path, "all", columns={"image": "Photo", "label": "breed"})
    assert data.list_images(named)["label_name"].to_pylist() == ["pug", "collie"]
    with pytest.raises(ValueError, match=r"columns: expected kind in labels.csv, found columns Photo, breed"):
        data.list_images(data.open_dataset("folder", tmp_path, "all", columns={"label": "kind"}))


def test_labels_in_a_column_whose_name_has_spaces_around_it(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png")
    write_table(tmp_path, "id, breed \n1,pug\n2,collie\n")
    named = data.open_dataset("folder", tmp_path, "all", columns={"label": "breed"})
    assert data.list_images(named)["label_name"].to_pylist() == ["pug", "collie"]


def test_labels_find_an_image_by_its_number(tmp_path: Path) -> None:
    """As pandas writes a column of them, without zeros in front."""
    write_images(tmp_path, "a/000.png", "a/007.png", "a/10.png", "b/08.png", "b/8.png")
    write_table(tmp_path, "id,label\n0,cat\n7,dog\n10,owl\n8,pug\n")
    labels = {"a/000.png": "cat", "a/007.png": "dog", "a/10.png": "owl", "b/08.png": None, "b/8.png": None}
    assert listed(tmp_path) == labels, "one number of two images is the name of neither"


@pytest.mark.parametrize("name", ["nan", "NA", "N/A", "null", "None"])
def test_labels_that_pandas_reads_as_missing_are_classes_and_it_is_said(name: str, tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{number}.png" for number in range(4)))
    write_table(tmp_path, f"id,label\n0,{name}\n1,DE\n2,{name}\n3,\n")
    assert list(listed(tmp_path).values()) == [name, "DE", name, None]
    (note,) = data.notes(data.list_images(data.open_dataset("folder", tmp_path, "all")))
    assert note == f"2 images have the label {name!r}, read as a class; if it stands for no label, leave it out"


def test_labels_in_rows_longer_than_the_header(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png")
    write_table(tmp_path, "file_name,label\n1.png,cat,\n2.png,dog,,x\n")
    assert listed(tmp_path) == {"1.png": "cat", "2.png": "dog"}
    write_table(tmp_path, "Photo,breed\n1.png,pug,\n")
    with pytest.raises(ValueError, match=r"columns: expected kind in labels.csv, found columns Photo, breed: choose"):
        data.list_images(data.open_dataset("folder", tmp_path, "all", columns={"label": "kind"}))


def test_labels_count_what_does_not_meet(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png", "3.png")
    write_table(tmp_path, "file_name,label\n1.png,cat\n2.png,-1\n9.png,dog\n8.png,dog\n")
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert listing["label_name"].to_pylist() == ["cat", None, None]
    assert data.left_out(listing) == {"rows of labels.csv without an image": 2}
    assert data.notes(listing) == [
        "1 image has the label -1, which is read as no label",
        "1 image is in no table of labels, and without a label",
    ]


def test_labels_of_a_table_count_more_than_folders_and_it_is_said(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/2.png")
    write_table(tmp_path, "file_name,label\na/1.png,cat\nb/2.png,dog\n")
    assert listed(tmp_path) == {"a/1.png": "cat", "b/2.png": "dog"}
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert data.notes(listing) == ["labels come from labels.csv, not from the names of folders"]


def test_labels_are_those_of_folders_where_a_table_holds_something_else(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "b/2.png")
    write_table(tmp_path, "file_name,license\na/1.png,CC0\n", "metadata.csv")
    assert listed(tmp_path) == {"a/1.png": "a", "b/2.png": "b"}


def test_labels_in_a_table_of_another_name_are_noted(tmp_path: Path) -> None:
    write_images(tmp_path, "train_images/1.png", "train_images/2.png")
    write_table(tmp_path, "image_id,label\n1.png,cat\n", "train.csv")
    write_table(tmp_path / "train_images", "{}", "classes.json")
    (note,) = data.notes(data.list_images(data.open_dataset("folder", tmp_path, "all")))
    assert note.startswith(
        "not read: train.csv, train_images/classes.json; a table of labels is labels.csv (file_name,"
    )


@pytest.mark.parametrize("numbers", ["0,1", "0.0,1.0"])
def test_labels_that_are_whole_numbers_have_no_fraction(numbers: str, tmp_path: Path) -> None:
    """As pandas writes them where one is missing."""
    write_images(tmp_path, "1.png", "2.png", "3.png")
    first, second = numbers.split(",")
    write_table(tmp_path, f"file_name,label\n1.png,{first}\n2.png,{second}\n3.png,\n")
    assert listed(tmp_path) == {"1.png": "0", "2.png": "1", "3.png": None}
    write_table(tmp_path, f"file_name,label\n1.png,{first}\n2.png,v2.0\n3.png,\n")
    assert listed(tmp_path) == {"1.png": first, "2.png": "v2.0", "3.png": None}


@pytest.mark.parametrize(
    ("images", "table", "text"),
    [
        (("train/1.png", "test/2.png"), "labels.csv", "path,label\ntrain/1.png,cat\ntrain/2.png,dog\n"),
        (("train/1.png", "test/2.png"), "train/labels.csv", "path,label\n1.png,cat\n2.png,dog\n"),
    ],
)
def test_labels_of_a_missing_image_are_not_those_of_another(
    images: tuple[str, ...], table: str, text: str, tmp_path: Path
) -> None:
    write_images(tmp_path, *images)
    write_table(tmp_path, text, table)
    assert listed(tmp_path) == {"test/2.png": None, "train/1.png": "cat"}
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert data.left_out(listing) == {f"rows of {table} without an image": 1}


@pytest.mark.parametrize("path", ["/home/me/images/1.png", "./1.png", "images/1", "other/../1.png"])
def test_labels_find_an_image_by_a_path_from_elsewhere(path: str, tmp_path: Path) -> None:
    write_images(tmp_path, "images/1.png")
    write_table(tmp_path, f"path,label\n{path},cat\n")
    assert listed(tmp_path) == {"images/1.png": "cat"}


def test_labels_for_no_image_are_not_used_and_it_is_said(tmp_path: Path) -> None:
    """Such as a table of the names of classes, or of files with another extension."""
    write_images(tmp_path, "0/a.png", "1/b.png")
    write_table(tmp_path, "id,label\n0,cat\n1,dog\n")
    listing = data.list_images(data.open_dataset("folder", tmp_path, "all"))
    assert listing["label_name"].to_pylist() == ["0", "1"]
    (note,) = data.notes(listing)
    assert note.startswith("labels.csv is not used: no name in its column id, such as '0', is that of exactly one")
    write_images(tmp_path / "flat", "1.png", "2.png")
    write_table(tmp_path / "flat", "id,label\n1.jpg,cat\n2.jpg,dog\n")
    with pytest.raises(ValueError, match=r"found no labels.*; labels.csv is not used: .* id, such as '1.jpg', is"):
        data.class_names_of(data.list_images(data.open_dataset("folder", tmp_path / "flat", "all")))


def test_labels_are_no_lists(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png")
    write_table(tmp_path, '{"file_name": "1.png", "label": ["cat", "dog"]}\n', "metadata.jsonl")
    with pytest.raises(ValueError, match=r"found no labels.*; metadata.jsonl gives no labels"):
        data.class_names_of(data.list_images(data.open_dataset("folder", tmp_path, "all")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"file_name,label\n1.png,cat\n1.png,dog\n",
            "several for 1 image, such as 'cat' and 'dog' for 1.png: keep one",
        ),
        (b"file_name,label,label\n1.png,cat,dog\n", "expected one column label, found 2: rename the others"),
        (b"\xff\xfe\x00", "found none that can be read .*: save it as CSV in UTF-8"),
    ],
)
def test_labels_that_contradict_themselves_or_are_no_text_are_refused(
    content: bytes, said: str, tmp_path: Path
) -> None:
    write_images(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        listed(tmp_path)
