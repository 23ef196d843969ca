"""Files by local path, glob or fsspec URL.

Knows paths and bytes, not what is stored. Local paths never touch fsspec, so they cost nothing;
remote ones import the protocol's own library.
"""

import glob
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from altiplano.errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CHUNK_BYTES = 1 << 20
_REMOTE_BLOCK_BYTES = 8 << 20
"""Fetched at a time; more would be fetched in vain behind the end of a chunk."""


def is_remote(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path


def expand(path: str) -> list[str]:
    """Files that a path, glob or URL names, sorted.

    Raises:
        DataError: nothing is there.
    """
    if is_remote(path):
        found = _expand_remote(path)
    elif Path(path).is_file():
        found = [path]
    elif Path(path).is_dir():
        raise DataError(f"{path} is a directory: name its files, for instance {path}/*.txt")
    else:
        found = [name for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    if not found:
        raise DataError(f"no file at {path}: check the path in the config")
    return sorted(found)


def _expand_remote(path: str) -> list[str]:
    with _remote(path) as (filesystem, inner):
        filesystem.invalidate_cache()
        found = filesystem.glob(inner, detail=True)
        files = [name for name, about in found.items() if about["type"] == "file"]
        if found and not files:
            raise DataError(f"{path} is a directory: name its files, for instance {path}/*.txt")
        return [filesystem.unstrip_protocol(name) for name in files]


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open one file for reading bytes; it can seek.

    Raises:
        DataError: it cannot be opened.
    """
    handle: Any
    if is_remote(path):
        with _remote(path) as (filesystem, inner):
            handle = filesystem.open(inner, "rb", block_size=_REMOTE_BLOCK_BYTES)
    else:
        try:
            handle = open(path, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    with handle:
        yield handle


def size_of(path: str) -> int:
    """Bytes of one file.

    Raises:
        DataError: it is not there.
    """
    if is_remote(path):
        with _remote(path) as (filesystem, inner):
            return int(filesystem.size(inner))
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def _remote(path: str) -> Iterator[tuple["AbstractFileSystem", str]]:
    """File system and inner path of a URL; what goes wrong with them is a `DataError`."""
    import fsspec

    try:
        yield fsspec.core.url_to_fs(path)
    except DataError:
        raise
    except ImportError as error:
        is_s3 = path.startswith(("s3://", "s3a://"))
        advice = "pip install altiplano[s3]" if is_s3 else str(error)
        raise DataError(
            f"cannot read {path}, its protocol's library is missing: {advice}"
        ) from None
    # Every protocol's library has a family of errors of its own.
    except Exception as error:
        raise DataError(f"cannot read {path}: {error or type(error).__name__}") from error


def delete_folder(path: str) -> None:
    """Delete a folder that has done its work, or an fsspec URL's; what cannot be deleted stays."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(DataError), _remote(path) as (filesystem, inner):
        filesystem.rm(inner, recursive=True)


def sha256_of(path: str | Path) -> str:
    """Hash of a file's bytes, read in chunks (about 1.5 GB/s from a warm disk).

    A local file that has not changed since it was hashed in this process is not read again.
    """
    if is_remote(str(path)):
        return _hash(str(path))
    try:
        state = Path(path).stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return _hash_local(str(path), state.st_size, state.st_mtime_ns)


def identity_of(path: str) -> str:
    """Hash that changes when a file does: of its bytes, or of what a remote store says of it.

    A store's word (entity tag, size, time) is taken, because reading a corpus over a network to
    see whether it changed would cost as much as using it.
    """
    if not is_remote(path):
        return sha256_of(path)
    with _remote(path) as (filesystem, inner):
        return hashlib.sha256(f"{inner} {filesystem.checksum(inner)}".encode()).hexdigest()


@lru_cache(maxsize=4096)
def _hash_local(path: str, size: int, changed_ns: int) -> str:
    return _hash(path)


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
