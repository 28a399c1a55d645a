"""Sources on an object store that is slow, fails or forbids."""

import errno
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from object_store import Fault, ObjectStore, copy_tree
from pictures import GREY, encoded, opened, parquet_table, pixels_of, random_pixels, write_images

from clarity import data, storage


def test_folder_on_an_object_store_is_that_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat é/1 +&?.png", "train/dog/100%41.png", "test/dog/2.png", "train/dog/bad.png")
    (tmp_path / "train/dog/bad.png").write_bytes(b"no image")
    copy_tree(tmp_path, store.uri("photos"))
    tables = []
    for place in (tmp_path, store.uri("photos")):
        dataset, listing = opened("folder", place)
        tables.append((listing, data.read_images(dataset, listing, GREY)))
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1].equals(tables[1][1])
    assert tables[0][1]["error"].null_count == 2


def test_parquet_on_an_object_store_is_that_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(parquet_table(25, label=list(range(25))), tmp_path / f"{number}.parquet", row_group_size=10)
    copy_tree(tmp_path, store.uri("tables"))
    for suffix in ("", "/0.parquet"):
        tables = []
        for place in (f"{tmp_path}{suffix}", store.uri(f"tables{suffix}")):
            dataset, listing = opened("parquet", place, "all")
            tables.append((listing, data.read_images(dataset, listing.slice(7, 15), GREY)))
        assert tables[0][0].equals(tables[1][0])
        assert tables[0][1].equals(tables[1][1])


@pytest.mark.parametrize("kind", ["503", "cut"])
def test_reading_survives_a_store_that_fails_for_a_while(kind: str, store: ObjectStore, tmp_path: Path) -> None:
    pq.write_table(parquet_table(25), tmp_path / "x.parquet", row_group_size=10)
    storage.write_bytes(store.uri("x.parquet"), (tmp_path / "x.parquet").read_bytes())
    dataset, listing = opened("parquet", store.uri("x.parquet"), "all")
    store.faults.append(Fault(kind, "GET", "x.parquet", times=4))
    shard = data.read_images(dataset, listing, GREY)
    assert shard["error"].null_count == 25
    assert np.array_equal(pixels_of(shard)[:, 0], [random_pixels(number) for number in range(25)])
    assert not store.faults[0].times


@pytest.mark.parametrize("source", ["folder", "parquet"])
@pytest.mark.parametrize(("kind", "match", "said"), [("503", "", "try again later"), ("403", "a/2", "rights to them")])
def test_a_store_that_is_down_or_refuses_is_not_the_images_fault(
    source: str, kind: str, match: str, said: str, store: ObjectStore, tmp_path: Path
) -> None:
    """The shard fails and is read again later; no row says that its image is broken."""
    uri = store.uri(f"{kind}/{source}")
    for name in ("a/1.png", "a/2.png"):
        storage.write_bytes(storage.join(uri, name), encoded(random_pixels(0)))
    pq.write_table(parquet_table(3), tmp_path / "x.parquet")
    storage.write_bytes(storage.join(uri, "a/2.parquet"), (tmp_path / "x.parquet").read_bytes())
    dataset, listing = opened(source, uri, "all")
    store.faults += [Fault(kind, method, match, times=10_000) for method in ("GET", "HEAD")]
    with pytest.raises(storage.StorageError, match=said) as error:
        data.read_images(dataset, listing, GREY)
    assert error.value.transient


def test_an_object_that_was_deleted_or_never_fetched_is_an_error_row(store: ObjectStore) -> None:
    for name in ("a/1.png", "a/2.png", "a/3.png"):
        storage.write_bytes(store.uri(f"deleted/{name}"), encoded(random_pixels(0)))
    dataset, listing = opened("folder", store.uri("deleted"), "all")
    storage.delete(store.uri("deleted/a/2.png"))
    storage.write_bytes(store.uri("deleted/a/3.png"), storage.LFS_POINTER)
    errors = data.read_images(dataset, listing, GREY)["error"].to_pylist()
    assert errors[0] is None and "No such file" in errors[1] and "a Git LFS pointer" in errors[2]


@pytest.mark.parametrize("source", ["folder", "parquet"])
@pytest.mark.parametrize("gone", ["", "a"])
def test_a_share_that_was_unmounted_is_not_the_images_fault(source: str, gone: str, tmp_path: Path) -> None:
    root = tmp_path / "share"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(encoded(random_pixels(0)))
    pq.write_table(parquet_table(3), root / "a" / "x.parquet")
    dataset, listing = opened(source, str(root), "all")
    (root / gone).rename(tmp_path / "elsewhere")
    (root / gone).mkdir()  # the empty directory on which it was mounted
    with pytest.raises(storage.StorageError, match="No such file") as error:
        data.read_images(dataset, listing, GREY)
    assert error.value.transient
    (root / gone).rmdir()
    (tmp_path / "elsewhere").rename(root / gone)
    assert data.read_images(dataset, listing, GREY)["error"].null_count == len(listing)


def test_a_device_that_fails_is_not_the_images_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encoded(random_pixels(0)))
    dataset, listing = opened("folder", str(tmp_path), "all")

    def read_local(path: str) -> bytes:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", path)

    monkeypatch.setattr(storage, "read_local", read_local)
    with pytest.raises(storage.StorageError, match="not connected"):
        data.read_images(dataset, listing, GREY)
