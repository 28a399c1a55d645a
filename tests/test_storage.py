"""storage.py: URIs, listings, atomic writes and bounded retries, on a disk and against a real S3 server on loopback."""

import errno
import os
import pickle
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import ACCESS_KEY, SECRET_KEY, Fault, ObjectStore, leaks

from clarity import storage
from clarity.storage import FileInfo, StorageError

ROOT = Path(__file__).parent.parent
NOBODY = 65534


def run_python(code: str, *arguments: object, nobody: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; ``nobody`` drops its rights first, as a chmod does not stop root."""
    if nobody:
        if os.getuid() != 0:
            pytest.skip("expected root to drop rights from, found another user: run it as root")
        # Imported before the rights are gone, as the checkout may be unreadable for others.
        drop = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
        code = f"import os\nfrom clarity import data, storage\n{drop}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )


# URIs


def test_join_and_name_keep_options_at_the_end_and_question_marks_in_the_path() -> None:
    assert storage.join("s3://b/k?region=eu-west-1", "x", "y.json") == "s3://b/k/x/y.json?region=eu-west-1"
    assert storage.join("s3://b/k/", "x") == "s3://b/k/x"
    assert storage.join("/a/b", "c", "d") == storage.join(Path("/a/b"), "c/d") == "/a/b/c/d"
    assert storage.join("/a/b.parquet", "") == "/a/b.parquet"
    assert storage.join("s3://b/what?.png?region=x", "why?") == "s3://b/what?.png/why??region=x"
    names = ("s3://b/k/what?.png?region=x", "s3://b/k/what?.png", "/a/b?c=d")
    assert [storage.name(uri) for uri in names] == ["what?.png", "what?.png", "b?c=d"]


def test_lies_in_compares_places_not_texts(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for below in ("data", "data/", "data/a", "data/new/audit", "link/a", "data/a/../b"):
        assert storage.lies_in(str(tmp_path / below), str(tmp_path / "data")), below
    for beside in ("database", "", "data/../audit", "audit/data"):
        assert not storage.lies_in(str(tmp_path / beside), str(tmp_path / "data")), beside
    assert storage.lies_in("s3://b/data/audit?region=x", "s3://b/data/")
    assert not storage.lies_in("s3://b/database", "s3://b/data") and not storage.lies_in("s3://b/data", "/data")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("gs://bucket/key", "scheme 'gs'"),
        ("https://host/file", "scheme 'https'"),
        ("file:///tmp/x", "scheme 'file'"),
        ("s3://", "expected s3://bucket/key"),
        ("s3://bucket/key?endpoint_url=host:9000", "expected s3://bucket/key"),
        ("s3://bucket/key?endpoint=http://host", "?endpoint=http://host: write it so"),
        ("s3://AKIAIOSFODNN7EXAMPLE:hushhush@bucket/key", "***@bucket"),
        ("s3://bucket/key?access_key=hushhush", "found s3://bucket/key?***: write it so"),
        ("s3://bucket/key?region=x&secret_key=hushhush&endpoint_url=http://h", "x&***&endpoint_url"),
        (
            "s3://bucket/key?endpoint_url=http://me:hushhush@host:9000",
            "found s3://bucket/key?endpoint_url=http://***@h",
        ),
    ],
)
def test_bad_uris_are_refused_without_repeating_a_secret(uri: str, expected: str) -> None:
    with pytest.raises(ValueError, match="found") as error:
        storage.filesystem(uri)
    assert expected in str(error.value)
    assert "hushhush" not in str(error.value)


@pytest.mark.parametrize("secret", ["test", "minio", "a", "/"])
def test_display_leaves_paths_alone_whatever_the_keys_are(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, secret)
    for path in ("/data/71-test/a", "s3://test/minio/a?region=us-east-1", "/plain/path with spaces", "s3://a/key=3/x"):
        assert storage.display(path) == path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:hush@bucket/key", "s3://***@bucket/key"),
        ("http://host/x?X-Amz-Signature=abc&a=b", "http://host/x?***&a=b"),
        ("s3://b/k?secret_key=hush", "s3://b/k?***"),
        ("key AKIAIOSFODNN7EXAMPLE is unknown", "key *** is unknown"),
        ("denied: FwoGZXIvYXdzEBYaD+/x= is old", "denied: *** is old"),
        ("s3://b/k?x=FwoGZXIvYXdzEBYaD%2B%2Fx%3D", "s3://b/k?x=***"),
        ("s3://b/FwoGZXIvYXdzEBYaD+/x=more", "s3://b/FwoGZXIvYXdzEBYaD+/x=more"),
    ],
)
def test_display_masks_credentials_by_their_form_and_those_of_the_environment_as_whole_words(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEBYaD+/x=")
    assert storage.display(text) == shown


# Local files


def test_write_makes_the_folder_and_gives_the_rights_of_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for content in (b"first", b"second"):
            storage.write_bytes(tmp_path / "sub" / "file", content)
    finally:
        os.umask(before)
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "sub").iterdir()] == [("file", b"second")]
    assert stat.S_IMODE((tmp_path / "sub" / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "sub").stat().st_mode) == 0o750


@pytest.mark.parametrize("scratch", ["_tmp", None])
def test_write_syncs_the_file_before_the_rename_and_the_folder_after(
    scratch: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def renamed(old: str, new: str) -> None:
        events.append(f"rename from {Path(old).parent.name}")
        replace(old, new)

    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(f"fsync {stat.S_ISDIR(os.fstat(fd).st_mode)}"), sync(fd))
    )
    monkeypatch.setattr(os, "replace", renamed)
    for folder in ("out", "_tmp"):
        (tmp_path / folder).mkdir()
    storage.write_bytes(tmp_path / "out" / "file", b"x", scratch=scratch and tmp_path / scratch)
    assert events == ["fsync False", f"rename from {scratch or 'out'}", "fsync True"]
    assert not list((tmp_path / "_tmp").iterdir())


def test_a_scratch_that_was_taken_away_is_not_made_again(tmp_path: Path) -> None:
    for folder in ("out", "none"):
        with pytest.raises(StorageError, match="No such file"):
            storage.write_bytes(tmp_path / folder / "file", b"x", scratch=tmp_path / "_tmp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(tmp_path / "file", b"old")
    tried: list[int] = []

    def fail(_: int) -> None:
        tried.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=os.strerror(code)) as error:
        storage.write_bytes(tmp_path / "file", b"new")
    assert (error.value.errno, error.value.transient, len(tried)) == (code, False, 1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


def test_a_killed_writer_leaves_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([value]) * 3_000_000 for value in (1, 2)]
    storage.write_bytes(path, contents[0])
    code = (
        "import sys; from clarity import storage\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for value in (1, 2): storage.write_bytes(sys.argv[1], bytes([value]) * 3_000_000)"
    )
    for seed in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.02 + random.Random(seed).random() / 10)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert path.read_bytes() in contents
    # What the killed ones left is hidden from every reader of data files.
    assert all(file.name.startswith(".") for file in tmp_path.iterdir() if file != path)


@pytest.mark.parametrize(
    "call",
    [
        "write_bytes(place + '/new', b'x')",
        "read_bytes(place + '/locked/file')",
        "exists(place + '/locked/file')",
        "list_files(place)",
    ],
)
def test_an_unprivileged_user_is_told_at_once(call: str) -> None:
    # A place of its own: pytest's are closed to other users from the top.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        os.mkdir(os.path.join(place, "locked"), 0o700)
        storage.write_bytes(os.path.join(place, "locked", "file"), b"x")
        done = run_python(f"import sys; place = sys.argv[1]\nstorage.{call}", place, nobody=True)
    assert "StorageError: cannot" in done.stderr
    assert "Permission denied: give this user the right" in done.stderr


def test_list_files_survives_links_in_circles(tmp_path: Path) -> None:
    for folder in ("a", "b", "b/deep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(b"12345")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "b" / "other").symlink_to("../a")
    (tmp_path / "a" / "other").symlink_to("../b")
    (tmp_path / "b" / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "file link").symlink_to("a/1.png")
    found = storage.list_files(tmp_path)
    assert found == [
        FileInfo("a/1.png", 5),
        FileInfo("b/1.png", 5),
        FileInfo("b/deep/1.png", 5),
        FileInfo("b/loop", 0),
        FileInfo("file link", 5),
        FileInfo("gone", 0),
    ]


def test_list_files_follows_a_link_out_of_the_folder_and_lists_a_file_as_itself(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.png").write_bytes(b"123")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to("../outside")
    assert storage.list_files(tmp_path / "root") == [FileInfo("cat/x.png", 3)]
    assert storage.list_files(tmp_path / "outside" / "x.png") == [FileInfo("", 3)]


def test_a_pipe_does_not_keep_a_reader_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(StorageError, match="cannot read"):
        storage.read_bytes(tmp_path / "x.png")
    with pytest.raises(StorageError, match="a directory stands where a file is expected"):
        storage.read_bytes(tmp_path)


def test_delete_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "link").symlink_to(tmp_path / "kept")
    storage.delete_tree(tmp_path / "tree")
    storage.delete_tree(tmp_path / "tree")
    storage.delete(tmp_path / "never there")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["kept", "kept/file"]


def test_json_comes_back_and_says_when_it_is_none(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, "\udcff.png"], "ü": float("nan"), "c": (float("inf"), True)}
    storage.write_json(tmp_path / "x.json", value)
    assert storage.read_json(tmp_path / "x.json") == {"a": [1, 2.5, "\udcff.png"], "ü": None, "c": [None, True]}
    storage.write_bytes(tmp_path / "torn.json", b'{"a": [1, 2')
    with pytest.raises(ValueError, match=r"expected JSON in .*torn\.json, found none"):
        storage.read_json(tmp_path / "torn.json")


def test_storage_errors_travel_between_processes() -> None:
    content = ("cannot read x: why: do", "why", errno.EIO, True)
    error = pickle.loads(pickle.dumps(StorageError(*content)))
    assert (str(error), error.reason, error.errno, error.transient) == content


def test_transient_errors_are_tried_again_with_growing_pauses_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    left = [OSError("AWS Error SLOW_DOWN during GetObject"), TimeoutError(errno.ETIMEDOUT, "late"), None]

    def act() -> str:
        if error := left.pop(0):
            raise error
        return "done"

    assert storage.attempt("read", "s3://b/k", act) == "done"
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0
    said = [record.getMessage().rpartition(": ")[0] for record in caplog.records]
    assert said == ["cannot read s3://b/k: SLOW_DOWN", "cannot read s3://b/k: [Errno 110] late"]


@pytest.mark.parametrize("listening", [True, False])
def test_first_contact_with_a_server_that_never_answers_fails_soon(
    listening: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "REQUEST_S", 1.0)
    monkeypatch.setattr(storage, "FIRST_CONTACT_S", 1.5)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(StorageError, match=f"{url} has not answered: check the endpoint_url"):
            storage.read_bytes(f"s3://bucket/key?endpoint_url={url}")
    assert time.monotonic() - begin < 6


# An object store


def test_objects_are_written_listed_read_and_deleted(store: ObjectStore) -> None:
    names = ["a b/ü.json", "a b/percent%20 and ?.png", "a b/sub/x+y=&.txt"]
    for name in names:
        storage.write_bytes(store.uri(f"tree/{name}"), name.encode())
    assert storage.list_files(store.uri("tree")) == [FileInfo(name, len(name.encode())) for name in sorted(names)]
    assert storage.list_files(store.uri("tree/")) == storage.list_files(store.uri("tree"))
    assert storage.list_dirs(store.uri("tree")) == ["a b"]
    for name in names:
        assert storage.read_bytes(storage.join(store.uri("tree"), name)) == name.encode()
    assert [storage.exists(store.uri(key)) for key in ("tree", f"tree/{names[0]}", "tre", "tree/a")] == [1, 1, 0, 0]
    assert [storage.is_dir(store.uri(key)) for key in ("tree", f"tree/{names[0]}")] == [True, False]
    storage.delete(store.uri(f"tree/{names[0]}"))
    storage.delete(store.uri(f"tree/{names[0]}"))
    assert [file.path for file in storage.list_files(store.uri("tree"))] == sorted(names[1:])
    storage.delete_tree(store.uri("tree"))
    storage.delete_tree(store.uri("tree"))
    assert not storage.exists(store.uri("tree"))


def test_the_endpoint_may_stand_in_the_environment(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    storage.write_bytes("s3://bucket/environment/x", b"1")
    assert storage.read_bytes(store.uri("environment/x")) == b"1"


def test_a_commit_is_one_put(store: ObjectStore) -> None:
    storage.write_json(store.uri("audit/_commits/shard-00000.json"), {"rows": 5})
    assert store.requests == [("PUT", "/bucket/audit/_commits/shard-00000.json")]


@pytest.mark.parametrize("kind", ["503", "cut"])
def test_a_store_that_fails_for_a_while_is_asked_again(kind: str, store: ObjectStore) -> None:
    payload = os.urandom(50_000)
    store.faults += [Fault(kind, "PUT", times=4), Fault(kind, "GET", "k1", times=4)]
    store.faults.append(Fault("503", "GET", "list-type", times=4))
    storage.write_bytes(store.uri("flaky/k1"), payload)
    assert storage.read_bytes(store.uri("flaky/k1")) == payload
    assert storage.list_files(store.uri("flaky")) == [FileInfo("k1", len(payload))]
    assert not [fault for fault in store.faults if fault.times]


def test_a_store_that_is_down_is_given_up_after_bounded_attempts(store: ObjectStore) -> None:
    store.faults += [Fault("503", "PUT", times=10_000), Fault("503", "HEAD", times=10_000)]
    with pytest.raises(StorageError, match="it failed 6 times: try again later") as error:
        storage.write_bytes(store.uri("down"), b"x")
    assert error.value.transient
    assert len(store.requests) == storage.ATTEMPTS
    with pytest.raises(StorageError, match="try again later"):
        storage.read_bytes(store.uri("down"))


def test_leaks_finds_what_is_planted(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("nothing here")
    pq.write_table(pa.table({"a": ["b"]}), tmp_path / "clean.parquet")
    assert leaks(tmp_path) == []
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "plan.json").write_text(f'{{"data": "s3://{ACCESS_KEY}@bucket"}}')
    (tmp_path / "log").write_text(urllib.parse.quote(SECRET_KEY, safe=""))
    pq.write_table(pa.table({"a": [SECRET_KEY]}), tmp_path / "cell.parquet", compression="zstd")
    pq.write_table(pa.table({"a": ["b"]}).replace_schema_metadata({"k": SECRET_KEY}), tmp_path / "metadata.parquet")
    names = ["below/plan.json", "cell.parquet", "log", "metadata.parquet"]
    assert leaks(tmp_path) == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("size", [100_000, 25_000_000])
def test_an_upload_cut_in_the_middle_leaves_no_object(size: int, store: ObjectStore) -> None:
    """A single PUT, and an upload in parts of which one never gets through."""
    uri = store.uri(f"torn/{size}")
    match = "partNumber=2" if size > 20_000_000 else ""
    store.faults += [Fault("cut", "PUT", match, times=10_000)]
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(uri, b"x" * size)
    store.faults.clear()
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"y" * size)
    assert storage.read_bytes(uri) == b"y" * size


def test_refusals_are_said_at_once_and_without_the_key(store: ObjectStore) -> None:
    store.faults += [Fault("403", method, times=10_000) for method in ("GET", "PUT", "HEAD")]
    for action in (lambda uri: storage.write_bytes(uri, b"x"), storage.read_bytes, storage.list_files, storage.exists):
        store.requests.clear()
        with pytest.raises(StorageError, match="rights to them") as error:
            action(store.uri("refused"))
        assert (error.value.reason, error.value.transient) == ("ACCESS_DENIED", False)
        assert len(store.requests) == 1
        said = repr(error.value) + str(error.value) + repr(error.value.__cause__) + error.value.reason
        assert ACCESS_KEY not in said and SECRET_KEY not in said


def test_missing_objects_and_buckets_are_said_at_once(store: ObjectStore) -> None:
    for uri in (store.uri("nothing"), store.uri("x").replace("s3://bucket", "s3://other-bucket")):
        with pytest.raises(StorageError, match="check the bucket, the key") as error:
            storage.read_bytes(uri)
        assert (error.value.errno, error.value.transient) == (errno.ENOENT, False)
    with pytest.raises(StorageError, match="cannot list"):
        storage.list_files(store.uri("nothing"))
    with pytest.raises(StorageError, match="NO_SUCH_BUCKET"):
        storage.write_bytes(store.uri("x").replace("s3://bucket", "s3://other-bucket"), b"x")


def test_parquet_is_read_by_row_group_over_the_network(store: ObjectStore, tmp_path: Path) -> None:
    table = pa.table({"x": np.random.default_rng(0).integers(0, 256, 6_000_000, dtype=np.uint8)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2_000_000, compression="none", use_dictionary=False)
    storage.write_bytes(store.uri("x.parquet"), (tmp_path / "x.parquet").read_bytes())
    store.requests.clear()
    with storage.open_parquet(store.uri("x.parquet")) as parquet:
        assert parquet.read_row_group(1)["x"].combine_chunks().equals(table["x"][2_000_000:4_000_000].combine_chunks())
    # 8 MB in int8 pages of one group: the footer, and pieces of 1 MiB of that group alone.
    assert sum(method == "GET" for method, _ in store.requests) <= 12


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_parquet_file_cut_short_is_named(cut: int, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"expected a whole Parquet file, found .*x\.parquet"):
        storage.open_parquet(tmp_path / "x.parquet")


@pytest.mark.parametrize("read", [storage.read_bytes, storage.read_json, storage.open_parquet])
def test_a_git_lfs_pointer_is_named_instead_of_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(storage.LFS_POINTER + b"oid sha256:5eb7\nsize 7507\n")
    with pytest.raises(StorageError, match=r"cannot read .*/x: found a Git LFS pointer to it, which git lfs pull"):
        read(tmp_path / "x")
