"""The token store: fixed-length blocks of token ids on disk, memory-mapped for training.

A directory with `index.json`, `tokens.bin` (uint16 or uint32 [N, T]), `segments.bin` (uint16
[N, T]: 1, 2, ... number the documents of a block, 0 is padding) and `loss.bin` (uint8 [N, T]:
1 marks a training target). Deliberately knows nothing of text, tokenizers or torch. Costs 5 bytes
per token on disk (7 above 65,536 pieces) and one page fault per block read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from altiplano.data.pack import Block
from altiplano.errors import ArtifactError

INDEX = "index.json"
IGNORE_INDEX = -100
"""Label of a position that is no target (PyTorch's cross-entropy ignores it)."""
_FORMAT_VERSION = 1
_FILES = ("tokens", "segments", "loss")


@dataclass(frozen=True)
class Batch:
    """Blocks as a model takes them; every array is int64 [B, T]."""

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    """Restart at 0 in every segment."""
    segment_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    """Already shifted: labels[t] is token t + 1 where that is a target of the same segment."""


@dataclass(frozen=True)
class _Index:
    """What index.json says."""

    format_version: int
    num_blocks: int
    sequence_length: int
    token_dtype: str
    num_tokens: int
    num_targets: int

    def dtypes(self) -> dict[str, np.dtype]:
        """Type of each file, little-endian on every machine."""
        return {
            "tokens": np.dtype(self.token_dtype).newbyteorder("<"),
            "segments": np.dtype("<u2"),
            "loss": np.dtype("u1"),
        }


class TokenStore:
    """A finished store, opened for reading; make one with `TokenStore.open`."""

    def __init__(self, index: _Index, arrays: dict[str, np.ndarray]) -> None:
        self.num_blocks = index.num_blocks
        self.sequence_length = index.sequence_length
        self.num_tokens = index.num_tokens
        """Tokens that are not padding."""
        self.num_targets = index.num_targets
        """Tokens the loss is taken on."""
        self._arrays = arrays

    @classmethod
    def open(cls, directory: Path) -> "TokenStore":
        """Map a store's files.

        Raises:
            ArtifactError: a file is missing, or its size is not what the index says.
        """
        index = _read_index(directory)
        shape = (index.num_blocks, index.sequence_length)
        arrays = {}
        for name, dtype in index.dtypes().items():
            file = directory / f"{name}.bin"
            expected = index.num_blocks * index.sequence_length * dtype.itemsize
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ArtifactError(
                    f"{file} {state}, {expected} are expected: the token store is truncated; "
                    f"delete {directory} and prepare the data again"
                )
            # An empty file cannot be mapped.
            empty = np.empty(shape, dtype)
            arrays[name] = np.memmap(file, dtype, "r", shape=shape) if expected else empty
        return cls(index, arrays)

    def batch(self, indices: npt.NDArray[np.integer]) -> Batch:
        """Read blocks.

        Args:
            indices: [B] block numbers, in any order.
        """
        ids = self._arrays["tokens"][indices].astype(np.int64)
        segments = self._arrays["segments"][indices].astype(np.int64)
        loss = self._arrays["loss"][indices]
        labels = np.full_like(ids, IGNORE_INDEX)
        wanted = (loss[:, 1:] == 1) & (segments[:, 1:] == segments[:, :-1])
        labels[:, :-1] = np.where(wanted, ids[:, 1:], IGNORE_INDEX)
        return Batch(ids, _positions(segments), segments, labels)


class StoreWriter:
    """Writes a store block by block; a context manager.

    The index is written last and only without an error, so a directory with an index is whole.
    """

    def __init__(
        self, directory: Path, *, sequence_length: int, vocab_size: int, pad_id: int
    ) -> None:
        """Create the files.

        Args:
            directory: made if missing.
            sequence_length: T, tokens per block.
            vocab_size: pieces; decides between 2 and 4 bytes per token.
            pad_id: what fills the end of a short block.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._sequence_length = sequence_length
        self._pad_id = pad_id
        self._token_dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._files: dict[str, IO[bytes]] = {}
        self.num_blocks = self.num_tokens = self.num_targets = 0

    def __enter__(self) -> Self:
        for name in _FILES:
            self._files[name] = (self._directory / f"{name}.bin").open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            text = json.dumps(vars(self._index()), indent=2) + "\n"
            (self._directory / INDEX).write_text(text, encoding="utf-8")

    def add(self, block: Block) -> None:
        """Append one block of at most T tokens; the rest is padding."""
        length, room = len(block.ids), self._sequence_length - len(block.ids)
        assert room >= 0, f"block of {length} tokens in a store of {self._sequence_length}"
        dtypes = self._index().dtypes()
        rows = {"tokens": block.ids, "segments": block.segments, "loss": block.loss}
        fill = {"tokens": self._pad_id, "segments": 0, "loss": 0}
        for name, row in rows.items():
            padded = np.pad(row, (0, room), constant_values=fill[name])
            self._files[name].write(padded.astype(dtypes[name]).tobytes())
        self.num_blocks += 1
        self.num_tokens += length
        self.num_targets += int(block.loss.sum())

    @property
    def fill_rate(self) -> float:
        """Share of the positions that are not padding."""
        positions = self.num_blocks * self._sequence_length
        return self.num_tokens / positions if positions else 0.0

    def _index(self) -> _Index:
        return _Index(
            format_version=_FORMAT_VERSION,
            num_blocks=self.num_blocks,
            sequence_length=self._sequence_length,
            token_dtype=self._token_dtype,
            num_tokens=self.num_tokens,
            num_targets=self.num_targets,
        )


def _read_index(directory: Path) -> _Index:
    file = directory / INDEX
    try:
        index = _Index(**json.loads(file.read_text(encoding="utf-8")))
    except OSError:
        raise ArtifactError(
            f"{directory} holds no token store ({INDEX} is missing): prepare the data again"
        ) from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}): prepare the data again") from None
    if index.format_version != _FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {index.format_version}, this Altiplano reads "
            f"{_FORMAT_VERSION}: prepare the data again"
        )
    return index


def _positions(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Position of each token within its segment, [B, T]."""
    steps = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.zeros_like(segments)
    changes = segments[:, 1:] != segments[:, :-1]
    starts[:, 1:] = np.where(changes, steps[:, 1:], 0)
    return steps - np.maximum.accumulate(starts, axis=1)
