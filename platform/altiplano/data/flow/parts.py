"""Parts: what one task makes of one chunk of a source, kept in a file until the stage is done.

A part is an Arrow file with one row per document in the order they were read, the dropped ones
included, so that the driver can apply what depends on the order (caps, duplicates) afterwards. A
part that is there under its final name is whole. Knows neither sources nor templates. Costs about
the bytes of the texts and their tokens on disk; reading maps the file.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from altiplano.data.tokens.pack import Sequences

if TYPE_CHECKING:
    import pyarrow as pa


class Fate(IntEnum):
    """What a task decided about a document."""

    KEPT = 0
    HELD_OUT = 1
    DROPPED = 2
    """By a rule: it was read, so it counts towards the source's cap."""
    UNREADABLE = 3
    INCOMPLETE = 4
    """No document of its own: something of the one before it was left out."""


class Row(NamedTuple):
    """What a task says about one document."""

    fate: Fate
    text: str
    """Whole where it is held out, else what the quarantine would show of it."""
    origin: str
    reason: str = ""
    """Why it was dropped, or what was done to keep it; empty otherwise."""
    detail: str = ""


@dataclass(frozen=True)
class Tokens:
    """Token sequences of some rows, in order."""

    sequences: Sequences
    per_row: npt.NDArray[np.int64]
    """[n]: how many sequences each row has."""


@dataclass(frozen=True)
class Passed:
    """What is known of the rows that are kept or held out, [m] of them."""

    places: npt.NDArray[np.int64]
    """Which rows of the batch they are."""
    keys: npt.NDArray[np.uint64]
    """Content keys."""
    characters: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    signatures: npt.NDArray[np.uint32] | None
    """[m, permutations], where near-duplicates are looked for."""
    tokens: Tokens


@dataclass(frozen=True)
class ReadBatch:
    """Some rows of a part, read back; arrays of [n]."""

    table: "pa.RecordBatch"
    fate: npt.NDArray[np.uint8]
    key: npt.NDArray[np.uint64]
    characters: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    signature: npt.NDArray[np.uint32] | None
    """[m, permutations] of the m rows that are kept or held out, where near-duplicates count."""
    tokens: Tokens

    @property
    def token_counts(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, [n]."""
        return _sums(self.tokens.sequences.lengths, self.tokens.per_row)

    def strings(self, column: str, rows: npt.NDArray[np.bool_]) -> list[str]:
        """Values of a text column (`text`, `origin`, `reason`, `detail`) of the chosen rows."""
        chosen: list[str] = self.table[column].filter(_arrow_mask(rows)).to_pylist()
        return chosen

    def sequences(self, rows: npt.NDArray[np.bool_]) -> Sequences:
        """The sequences of the chosen rows, in order."""
        every = self.tokens.sequences
        if rows.all():
            return every
        wanted = np.repeat(rows, self.tokens.per_row)
        tokens = np.repeat(wanted, every.lengths)
        loss = None if every.loss is None else every.loss[tokens]
        return Sequences(every.ids[tokens], every.lengths[wanted], loss)


class PartWriter:
    """Appends batches to an Arrow file; made by `writing`."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._writer: Any = None

    def add(self, rows: Sequence[Row], passed: Passed) -> None:
        """Write some rows, at least one."""
        import pyarrow as pa

        batch = _record_batch(rows, passed)
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._sink, batch.schema)
        self._writer.write_batch(batch)

    def close(self) -> None:
        """Write the footer; a part without rows is an empty file."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def writing(path: Path) -> Iterator[PartWriter]:
    """Write a part beside its place and rename it there once it is whole.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    partial = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as sink:
            writer = PartWriter(sink)
            yield writer
            writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def num_batches(part: Path) -> int:
    """How many batches a part has."""
    with _opened(part) as reader:
        return reader.num_record_batches if reader else 0


def read_batch(part: Path, index: int) -> ReadBatch:
    """One batch of a part, mapped, not copied."""
    with _opened(part) as reader:
        return _batch(reader.get_batch(index))


@contextmanager
def _opened(part: Path) -> Iterator[Any]:
    """The Arrow reader of a part; None for one without rows."""
    import pyarrow as pa

    if part.stat().st_size == 0:
        yield None
        return
    with pa.memory_map(str(part)) as source:
        yield pa.ipc.open_file(source)


def utf8_lengths(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Bytes of each text, [n]; a fifth of the cost of encoding them in Python."""
    import pyarrow as pa

    _, offsets, _ = pa.array(texts, pa.large_string()).buffers()
    return np.diff(np.frombuffer(offsets, np.int64)[: len(texts) + 1])


def _record_batch(rows: Sequence[Row], passed: Passed) -> "pa.RecordBatch":
    import pyarrow as pa

    def of_all(values: npt.NDArray[Any] | int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        column = np.zeros(len(rows), dtype)
        column[passed.places] = values
        return column

    fate, text, origin, reason, detail = zip(*rows, strict=True)
    sequences = passed.tokens.sequences
    per_row = of_all(passed.tokens.per_row, np.int64)
    num_tokens = _sums(sequences.lengths, per_row)
    signatures = passed.signatures
    flat = np.empty(0, np.uint32) if signatures is None else signatures.reshape(-1)
    width = 0 if signatures is None else signatures.shape[1]
    columns = {
        "fate": pa.array(np.array(fate, np.uint8)),
        "key": pa.array(of_all(passed.keys, np.uint64)),
        "characters": pa.array(of_all(passed.characters, np.int64)),
        "bytes": pa.array(of_all(passed.bytes, np.int64)),
        "text": pa.array(text, pa.large_string()),
        "origin": pa.array(origin, pa.large_string()),
        "reason": pa.array(reason, pa.large_string()),
        "detail": pa.array(detail, pa.large_string()),
        "signature": _list_of(flat, of_all(width, np.int64)),
        "lengths": _list_of(sequences.lengths, per_row),
        "ids": _list_of(sequences.ids, num_tokens),
    }
    if sequences.loss is not None:
        columns["loss"] = _list_of(sequences.loss, num_tokens)
    return pa.RecordBatch.from_pydict(columns)


def _batch(table: "pa.RecordBatch") -> ReadBatch:
    lengths, per_row = _flat(table["lengths"])
    ids, _ = _flat(table["ids"])
    names = table.schema.names
    loss = _flat(table["loss"])[0] if "loss" in names else None
    signatures, widths = _flat(table["signature"])
    return ReadBatch(
        table=table,
        fate=table["fate"].to_numpy(),
        key=table["key"].to_numpy(),
        characters=table["characters"].to_numpy(),
        bytes=table["bytes"].to_numpy(),
        signature=signatures.reshape(-1, widths.max()) if len(signatures) else None,
        tokens=Tokens(Sequences(ids, lengths, loss), per_row),
    )


def _list_of(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> "pa.LargeListArray":
    """Lists of `counts` values each, from flat values: pyarrow copies neither."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _flat(column: "pa.LargeListArray") -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of lists end to end, and how many each list has."""
    return column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())


def _sums(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sum of each group of `counts` consecutive values, [n]."""
    ends = np.cumsum(counts)
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return totals[ends] - totals[ends - counts]


def _arrow_mask(rows: npt.NDArray[np.bool_]) -> "pa.BooleanArray":
    import pyarrow as pa

    return pa.array(rows)
