"""Where a run's checkpoints lie: a local directory, or a folder at an fsspec URL (s3://...).

A place gives one promise: a checkpoint that it lists was put there whole. Locally that is a rename;
elsewhere `state.json` is uploaded last. Deleting begins with `state.json`, so that a deletion cut
short is no checkpoint either. Knows names and bytes, not which checkpoint is wanted. A remote place
needs scratch space (TMPDIR) for one checkpoint while it writes or reads.
"""

import errno
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from altiplano.errors import TrainingError
from altiplano.storage import is_remote
from altiplano.train.checkpoint import (
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    BrokenStateError,
    Summary,
    parse_summary,
    read_state,
    read_summary,
    state_bytes,
    sync,
    write_state,
)
from altiplano.train.state import TrainState

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_STEP = re.compile(r"step-(\d{8,})")
_WRITING = ".writing-"


class Place(Protocol):
    """A folder of checkpoints, by step."""

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending; whether their bytes are still right is not seen."""

    def summary(self, step: int) -> Summary:
        """What a checkpoint says of itself.

        Raises:
            BrokenStateError: it cannot be read.
        """

    def read(self, step: int) -> TrainState:
        """Read and check a checkpoint.

        Raises:
            BrokenStateError: it is not there or not what was written.
        """

    def write(self, state: TrainState, *, best: bool) -> None:
        """Put a checkpoint where none of its step is: all of it or, on any error, nothing.

        Raises:
            OSError: no space, no network.
        """

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""

    def sweep(self) -> None:
        """Delete what writes and deletions that were killed left behind."""


def open_place(location: str) -> Place:
    """The place at a path or URL; made when first written to.

    Raises:
        TrainingError: the URL's protocol is unknown or its library is missing.
    """
    if not is_remote(location):
        return LocalPlace(Path(location))
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        advice = "pip install altiplano[s3]" if location.startswith("s3") else str(error)
        raise TrainingError(f"checkpoints cannot be kept at {location}: {advice}") from None
    return RemotePlace(filesystem, inner, location)


class LocalPlace:
    """A directory, which may be one that all nodes share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def steps(self) -> list[int]:
        """Directories that have a `state.json`."""
        return sorted(step for step, whole in self._folders().items() if whole)

    def summary(self, step: int) -> Summary:
        """Read `state.json`."""
        return read_summary(self._folder(step))

    def read(self, step: int) -> TrainState:
        """Map the files; workers of one node share the memory."""
        return read_state(self._folder(step))

    def write(self, state: TrainState, *, best: bool) -> None:
        """Write beside the final name, then rename."""
        self._root.mkdir(parents=True, exist_ok=True)
        _require_space(self._root, state)
        final = self._folder(state.step)
        # A worker thought dead may still be writing the same step: each has a folder of its own.
        partial = self._root / f"{_WRITING}{final.name}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
        try:
            write_state(partial, state, best=best)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(self._root)

    def delete(self, step: int) -> None:
        """Delete a directory, `state.json` first."""
        folder = self._folder(step)
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete directories without `state.json` and half-written ones."""
        cut_short = [self._folder(step) for step, whole in self._folders().items() if not whole]
        for folder in (*cut_short, *self._root.glob(f"{_WRITING}*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> dict[int, bool]:
        """Step -> whether its folder has a `state.json`."""
        matches = {folder: _STEP.fullmatch(folder.name) for folder in self._root.glob("step-*")}
        return {int(m[1]): (f / STATE_FILE).exists() for f, m in matches.items() if m}

    def _folder(self, step: int) -> Path:
        return self._root / _folder_name(step)


class RemotePlace:
    """A folder of an fsspec file system."""

    def __init__(self, filesystem: "AbstractFileSystem", root: str, location: str) -> None:
        self._files, self._root, self._location = filesystem, root.rstrip("/"), location

    def steps(self) -> list[int]:
        """Folders that have a `state.json`."""
        return sorted(step for step, names in self._folders().items() if STATE_FILE in names)

    def summary(self, step: int) -> Summary:
        """Fetch `state.json`."""
        file = f"{self._folder(step)}/{STATE_FILE}"
        try:
            return parse_summary(self._files.cat_file(file), self._files.unstrip_protocol(file))
        except FileNotFoundError:
            raise BrokenStateError(f"{self._files.unstrip_protocol(file)} is missing") from None

    def read(self, step: int) -> TrainState:
        """Fetch the files, then map them; their space is free again when the state is."""
        folder = self._folder(step)
        self.summary(step)  # another format may have other files
        with tempfile.TemporaryDirectory(prefix="altiplano-checkpoint-") as scratch:
            for name in (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE):
                try:
                    self._files.get_file(f"{folder}/{name}", f"{scratch}/{name}")
                except FileNotFoundError:
                    missing = self._files.unstrip_protocol(f"{folder}/{name}")
                    raise BrokenStateError(f"{missing} is missing") from None
            return read_state(Path(scratch))

    def write(self, state: TrainState, *, best: bool) -> None:
        """Write to scratch space, then upload, `state.json` last."""
        folder = self._folder(state.step)
        self._files.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="altiplano-checkpoint-") as scratch:
            _require_space(Path(scratch), state)
            write_state(Path(scratch), state, best=best)
            for name in (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE):
                self._files.put_file(f"{scratch}/{name}", f"{folder}/{name}")

    def delete(self, step: int) -> None:
        """Delete a folder, `state.json` first."""
        folder = self._folder(step)
        names = self._folders().get(step, set())
        if STATE_FILE in names:
            self._files.rm_file(f"{folder}/{STATE_FILE}")
        for name in names - {STATE_FILE}:
            self._files.rm_file(f"{folder}/{name}")

    def sweep(self) -> None:
        """Delete folders without `state.json`."""
        for step, names in self._folders().items():
            if STATE_FILE not in names:
                self.delete(step)

    def _folders(self) -> dict[int, set[str]]:
        """Step -> names of the files in its folder."""
        self._files.invalidate_cache()
        folders: dict[int, set[str]] = {}
        for path in self._files.find(self._root):
            folder, _, name = path.removeprefix(f"{self._root}/").partition("/")
            if match := _STEP.fullmatch(folder):
                folders.setdefault(int(match[1]), set()).add(name)
        return folders

    def _folder(self, step: int) -> str:
        return f"{self._root}/{_folder_name(step)}"


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _require_space(directory: Path, state: TrainState) -> None:
    """Refuse before writing: a disk filled to the brim also ends whatever else writes to it."""
    need, have = state_bytes(state), shutil.disk_usage(directory).free
    if need > have:
        message = f"{os.strerror(errno.ENOSPC)}: {_size(need)} needed, {_size(have)} free"
        raise OSError(errno.ENOSPC, message, str(directory))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
