"""Files by path, glob and address: found, measured, read, and missed with a message."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from altiplano.errors import DataError
from altiplano.storage import expand, identity_of, is_remote, open_binary, sha256_of, size_of

if TYPE_CHECKING:
    from tests.helpers.s3 import Bucket


def read(path: str) -> bytes:
    with open_binary(path) as handle:
        return handle.read()


def test_local_files_and_their_addresses_are_the_same(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "d.txt").mkdir()
    for pattern in (f"{tmp_path}/*.txt", f"{tmp_path.as_uri()}/*.txt"):
        found = expand(pattern)
        assert [read(path) for path in found] == [b"a.txt", b"b.txt"], "sorted, no directories"
        assert [size_of(path) for path in found] == [5, 5]
        assert [is_remote(path) for path in found] == [is_remote(pattern)] * 2


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_not_there_is_named(remote: bool, tmp_path: Path) -> None:
    root = tmp_path.as_uri() if remote else str(tmp_path)
    with pytest.raises(DataError, match=f"no file at {root}/none.txt: check the path"):
        expand(f"{root}/none.txt")
    with pytest.raises(DataError, match="is a directory: name its files, for instance .*txt"):
        expand(root)
    for reading in (read, size_of, sha256_of):
        with pytest.raises(DataError, match=f"cannot read {root}/none.txt"):
            reading(f"{root}/none.txt")


def test_a_file_is_hashed_again_once_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = sha256_of(path)
    assert sha256_of(path.as_uri()) == first
    path.write_bytes(b"other")
    assert sha256_of(path) != first


def test_objects_are_files(s3_bucket: "Bucket") -> None:
    address = s3_bucket.put("texts/b.txt", "二".encode())
    s3_bucket.put("texts/a.txt", b"0123456789")
    found = expand(f"s3://{s3_bucket.name}/texts/*.txt")
    assert found == [f"s3://{s3_bucket.name}/texts/a.txt", address]
    assert [size_of(path) for path in found] == [10, 3]
    assert sha256_of(address) == sha256_of(address)
    with open_binary(found[0]) as handle:
        handle.seek(4)
        assert handle.read(3) == b"456"
    assert s3_bucket.get("texts/b.txt") == "二".encode()


def test_missing_objects_and_buckets_are_named(s3_bucket: "Bucket") -> None:
    with pytest.raises(DataError, match=f"no file at s3://{s3_bucket.name}/none.txt"):
        expand(f"s3://{s3_bucket.name}/none.txt")
    with pytest.raises(DataError, match=f"cannot read s3://{s3_bucket.name}/none.txt"):
        read(f"s3://{s3_bucket.name}/none.txt")
    with pytest.raises(DataError, match=r"(no file at|cannot read) s3://no-such-bucket/a.txt"):
        expand("s3://no-such-bucket/a.txt")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise ImportError("Install xfs to access it")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://b/a, .* is missing: pip install altiplano\[s3\]"):
        expand("s3://b/a")
    with pytest.raises(DataError, match="gs://b/a, .* is missing: Install xfs to access it"):
        size_of("gs://b/a")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(DataError, match="cannot read nowhere://a/b: .*nowhere"):
        expand("nowhere://a/b")


def test_a_remote_file_changes_its_identity_with_its_content(s3_bucket: "Bucket") -> None:
    first = s3_bucket.put("a.txt", b"one")
    before = identity_of(first)
    assert identity_of(first) == before
    s3_bucket.put("a.txt", b"two")
    assert identity_of(first) != before


def test_a_local_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    left, right = tmp_path / "a", tmp_path / "b"
    left.write_bytes(b"same")
    right.write_bytes(b"same")
    assert identity_of(str(left)) == identity_of(str(right))
    right.write_bytes(b"other")
    assert identity_of(str(left)) != identity_of(str(right))
