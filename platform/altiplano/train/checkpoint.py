"""One checkpoint: a directory of two safetensors files and `state.json`, which is written last.

`state.json` holds the step, the run's progress and every file's size and checksum, so a directory
that has one was written whole, and reading tells whether it still is. Nothing is sharded: any
number of workers reads it, under any strategy. Knows one local directory; which of many is read or
deleted is `train/checkpoints.py`. Size: three times the trained tensors. Writing needs no memory
beside the state; reading checks every byte once and then maps the files.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.errors import TrainingError
from altiplano.train.state import TrainState

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 2
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
"""Keys are `moment:name`, as in `exp_avg:model.norm.weight`."""
STATE_FILE = "state.json"
_CHUNK_BYTES = 4 << 20


class BrokenStateError(TrainingError):
    """A checkpoint's files are missing, cut short or changed: an earlier one may still be whole."""


@dataclass(frozen=True)
class FileSum:
    """What a file must be."""

    bytes: int
    xxh3_128: str
    """Not for security: it is fifteen times as fast as sha256 and finds every accident."""


@dataclass(frozen=True)
class Summary:
    """What `state.json` says."""

    step: int
    progress: dict[str, Any]
    best: bool
    """Whether no earlier checkpoint of the run was better."""
    files: dict[str, FileSum]


def state_bytes(state: TrainState) -> int:
    """Size of a state's tensors, which is that of its files but for their headers."""
    moments = [tensor for of_one in state.moments.values() for tensor in of_one.values()]
    tensors = [*state.weights.values(), *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_state(directory: Path, state: TrainState, *, best: bool = False) -> None:
    """Write a state into an empty directory; on return it has reached the disk.

    Raises:
        OSError, SafetensorError: the disk is full or broken.
    """
    from safetensors.torch import save_file

    moments = {
        f"{moment}:{name}": tensor
        for name, of_one in state.moments.items()
        for moment, tensor in of_one.items()
    }
    files = {}
    for file, tensors in ((WEIGHTS_FILE, state.weights), (OPTIMIZER_FILE, moments)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / file)
        sync(directory / file)
        files[file] = _sum_of(directory / file)
    summary = asdict(Summary(state.step, state.progress, best, files))
    text = json.dumps({"format_version": FORMAT_VERSION, **summary}, indent=1)
    (directory / STATE_FILE).write_text(text, encoding="utf-8")
    sync(directory / STATE_FILE)
    sync(directory)


def read_state(directory: Path) -> TrainState:
    """Read a state; its tensors are private views of the files, which workers of a node share.

    Copy them at once: on a network file system they end when another node deletes the files.

    Raises:
        BrokenStateError: the files are not what was written; says which and how.
        TrainingError: a newer Altiplano wrote it.
    """
    summary = read_summary(directory)
    for name, expected in summary.files.items():
        _check_file(directory / name, expected)
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _load(directory / OPTIMIZER_FILE).items():
        moment, _, name = key.partition(":")
        moments.setdefault(name, {})[moment] = tensor
    return TrainState(summary.step, _load(directory / WEIGHTS_FILE), moments, summary.progress)


def read_summary(directory: Path) -> Summary:
    """What a directory's `state.json` says; its files are not looked at.

    Raises:
        BrokenStateError, TrainingError: as `parse_summary`.
    """
    file = directory / STATE_FILE
    try:
        return parse_summary(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise BrokenStateError(f"{file} is missing") from None


def parse_summary(text: bytes, where: str) -> Summary:
    """Read the bytes of a `state.json`.

    Args:
        where: its path, for messages.

    Raises:
        BrokenStateError: it was cut short or edited.
        TrainingError: a newer Altiplano wrote it.
    """
    try:
        raw = json.loads(text)
        version = int(raw.pop("format_version"))
        if version > FORMAT_VERSION:
            raise TrainingError(
                f"{where} has checkpoint format {version}, this Altiplano reads {FORMAT_VERSION}: "
                f"use the Altiplano that wrote it, or delete it to start anew"
            )
        raw["files"] = {name: FileSum(**about) for name, about in raw["files"].items()}
        return Summary(**raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, TrainingError):
            raise
        raise BrokenStateError(f"{where} cannot be read ({error})") from None


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(file: Path) -> "dict[str, torch.Tensor]":
    from safetensors.torch import load_file

    return load_file(file)


def _check_file(file: Path, expected: FileSum) -> None:
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            raise BrokenStateError(f"{file} has {size} bytes, {expected.bytes} were written")
        if _sum_of(file) != expected:
            raise BrokenStateError(f"{file} was changed: its checksum is not what was written")
    except FileNotFoundError:
        raise BrokenStateError(f"{file} is missing") from None


def _sum_of(file: Path) -> FileSum:
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as handle:
        while got := handle.readinto(buffer):
            digest.update(buffer[:got])
            size += got
    return FileSum(size, digest.hexdigest())
