"""Safetensors files a piece at a time: the header, a tensor's rows, a new file from streams.

The safetensors library reads and writes whole tensors; growing a 70-billion model needs neither.
The format (8 bytes of header length, a JSON header, raw little-endian values) is small enough to
speak. Knows bytes and shapes, not models. Memory: one buffer of `CHUNK_BYTES`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.errors import ModelError

if TYPE_CHECKING:
    import torch

Chunk = bytes | memoryview
"""Some consecutive bytes of a tensor."""
CHUNK_BYTES = 8 << 20
"""Most that is read at a time."""

_LENGTH_BYTES = 8
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types a matrix may have: safetensors' name -> torch's."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    name: str
    type_name: str
    """As the format writes it: `F32`, `BF16` ..."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the file's beginning."""
    stop: int

    @property
    def dtype(self) -> "torch.dtype":
        """Type of the values.

        Raises:
            ModelError: they are no floats that rows can be added to (quantised weights).
        """
        import torch

        if self.type_name not in _FLOAT_TYPES:
            raise ModelError(
                f"{self.name} in {self.file} is stored as {self.type_name}; rows can be added to "
                f"{', '.join(_FLOAT_TYPES)} only: give the model's unquantised weights"
            )
        dtype: torch.dtype = getattr(torch, _FLOAT_TYPES[self.type_name])
        return dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return self.stop - self.start

    def chunks(self, num_bytes: int | None = None) -> Iterator[memoryview]:
        """The tensor's (first) bytes; each chunk is valid until the next one is asked for."""
        left = self.num_bytes if num_bytes is None else num_bytes
        buffer = memoryview(bytearray(min(CHUNK_BYTES, left)))
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.start)
            for begin in range(0, left, CHUNK_BYTES):
                part = buffer[: min(CHUNK_BYTES, left - begin)]
                _fill(handle.readinto(part), part, self.file)
                yield part

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [stop - start, H] of a matrix, in its own type."""
        import torch

        width = math.prod(self.shape[1:])
        row_bytes = self.num_bytes // self.shape[0]
        data = bytearray((stop - start) * row_bytes)
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.start + start * row_bytes)
            _fill(handle.readinto(data), data, self.file)
        return torch.frombuffer(data, dtype=self.dtype).view(-1, width)


@dataclass(frozen=True)
class Matrix:
    """The first rows of a stored matrix; sliced like a tensor, read when sliced."""

    stored: StoredTensor
    num_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return self.num_rows, self.stored.shape[1]

    def __getitem__(self, rows: slice) -> "torch.Tensor":
        """Rows [n, H] in the stored type."""
        start, stop, step = rows.indices(self.num_rows)
        assert step == 1
        return self.stored.rows(start, stop)


@dataclass(frozen=True)
class Streamed:
    """A tensor to be written: its bytes come in chunks."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: Iterable[Chunk]


def read_header(file: Path) -> list[StoredTensor]:
    """What a safetensors file holds, in order of place.

    Raises:
        ModelError: the file is cut short or is no safetensors file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            header = json.loads(handle.read(min(length, size)))
        begin = _LENGTH_BYTES + length
        header.pop("__metadata__", None)
        tensors = [
            StoredTensor(
                file, name, entry["dtype"], tuple(entry["shape"]),
                *(begin + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file} is not a safetensors file: fetch it again") from None
    tensors.sort(key=lambda tensor: tensor.start)
    wanted = tensors[-1].stop if tensors else begin
    if size < wanted:
        raise ModelError(f"{file} has {size} bytes, its header says {wanted}: fetch it again")
    return tensors


def write_streams(target: Path, tensors: Sequence[Streamed]) -> None:
    """Write a safetensors file without ever holding a tensor; it gets its name when whole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.type_name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # readers map the values: they must be aligned
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as handle:
        handle.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for tensor in tensors:
            written = sum(handle.write(chunk) for chunk in tensor.chunks)
            assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes"
    partial.replace(target)


def _fill(got: int | None, wanted: bytearray | memoryview, file: Path) -> None:
    expected = len(wanted)
    if got != expected:
        raise ModelError(
            f"{file} ended early ({got} of {expected} bytes): it was changed meanwhile"
        )
