"""Shards, the files of a token store: written under their hash, fetched once from remote storage.

Knows bytes and checksums, not what the flags in them mean. A remote shard is copied to
`cache_root()` by one process of a machine while the others wait; whole or not at all.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from altiplano.errors import ArtifactError, DataError
from altiplano.storage import is_remote, open_binary

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Shard:
    """One file: tokens [n, T], little-endian, followed by flags uint8 [n, T]."""

    name: str
    blocks: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes one shard beside its place; `finish` gives it its name.

    Tokens go to the disk as they come; the flags, which stand behind all of them, are kept until
    the end (a third of a shard at most).
    """

    def __init__(self, directory: Path, number: int) -> None:
        self._path = directory / f"shard-{number:05d}.bin"
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._flags: list[np.ndarray] = []
        self.blocks = 0

    def add(self, tokens: np.ndarray, flags: np.ndarray) -> None:
        """Append blocks; tokens already have their type on disk."""
        self._write(tokens)
        self._flags.append(flags)
        self.blocks += len(flags)

    def finish(self) -> Shard:
        """Write the flags, see that all is on the disk, and give the file its name."""
        for flags in self._flags:
            self._write(flags)
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        return Shard(self._path.name, self.blocks, size, self._hash.hexdigest())

    def discard(self) -> None:
        """Give the half-written file up."""
        self._file.close()
        self._partial.unlink()

    def _write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data.cast("B")
        self._file.write(data)
        self._hash.update(data)


def sizes_in(directory: str) -> dict[str, int]:
    """Bytes of each shard in a local directory or below an fsspec URL.

    Raises:
        DataError: it cannot be listed.
    """
    if not is_remote(directory):
        files = Path(directory).glob("shard-*.bin")
        return {file.name: file.stat().st_size for file in files}
    import fsspec

    filesystem, inner = fsspec.core.url_to_fs(directory)
    filesystem.invalidate_cache(inner)
    try:
        listing = filesystem.ls(inner, detail=True)
    except OSError as error:
        raise DataError(f"cannot list {directory}: {error}; its index could be read") from None
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listing}


def hash_file(path: Path) -> str:
    """sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_root() -> Path:
    """Where remote shards are kept: `$ALTIPLANO_CACHE/shards`, else below `~/.cache/altiplano`."""
    root = os.environ.get("ALTIPLANO_CACHE") or Path.home() / ".cache" / "altiplano"
    return Path(root) / "shards"


def fetch(url: str, shard: Shard, *, store_id: str) -> Path:
    """A local copy of a remote shard; fetched if this machine has none.

    Several processes may ask at once: one fetches, the others wait for it.

    Args:
        url: of the store.
        shard: as the index describes it.
        store_id: names the store's content, so that a changed store is another one.

    Raises:
        ArtifactError: what arrived is not what the index says.
        DataError: it cannot be read.
    """
    path = cache_root() / store_id / shard.name
    if _is_whole(path, shard):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")):
        if not _is_whole(path, shard):
            _download(f"{url}/{shard.name}", path, shard)
    return path


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes


def _download(url: str, path: Path, shard: Shard) -> None:
    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".partial")
    with open_binary(url) as source, partial.open("wb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        partial.unlink()
        raise ArtifactError(
            f"{url} arrived with sha256 {digest.hexdigest()[:16]}, its index says "
            f"{shard.sha256[:16]}: it was changed after it was written; restore it, or prepare "
            f"the data again"
        )
    partial.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system lets go of it when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
