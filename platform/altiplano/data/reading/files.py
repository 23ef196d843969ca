"""Files of every form, cut into chunks that can be read anywhere, one by one.

The chunks depend on the files only, and read one after the other they give the same whatever their
size. Knows forms and places, not what a text or a record is. Costs one pass over the bytes, about
5 ns each for lines of 500 bytes, and the memory of a piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from altiplano.data.reading import jsonfiles, tables
from altiplano.data.reading.problems import (
    QUARANTINE_CHARACTERS,
    Dropped,
    OnError,
    Problems,
    at_byte,
)
from altiplano.data.reading.ranges import LINES, PARAGRAPHS, read_range
from altiplano.storage import expand, open_binary, size_of

__all__ = [
    "Chunk",
    "Dropped",
    "Form",
    "OnError",
    "Problems",
    "plan_chunks",
    "read_plain",
    "read_values",
]

Form = Literal["lines", "paragraphs", "file", "jsonl", "json", "parquet", "dataset"]

CHUNK_BYTES = 4 << 20
"""A chunk of a file that can be cut is about this long: a tenth of a second of work or two."""
_CHUNKS_PER_FILE = 1024
"""Of very large files the chunks are larger, so that there are not more."""
PIECE_BYTES = 4 << 20
"""A longer document of plain text is read in pieces, each a document of its own."""
_SEPARATORS = {"lines": LINES, "paragraphs": PARAGRAPHS, "file": None}
_SUFFIXES: dict[str, Form] = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Chunk:
    """A part of one file that can be read on its own, on any machine of the cluster."""

    path: str
    form: Form
    start: int = 0
    """Bytes (lines, paragraphs, jsonl), row groups (parquet) or rows (dataset)."""
    stop: int | None = None
    """One past the end; None for the end of the file."""
    subset: str | None = None
    """Of a dataset."""
    split: str = "train"
    """Of a dataset."""


def plan_chunks(
    path: str,
    form: Form | Literal["auto"],
    *,
    otherwise: Form = "paragraphs",
    chunk_bytes: int = CHUNK_BYTES,
    subset: str | None = None,
    split: str = "train",
) -> list[Chunk]:
    """Chunks of everything a path names, in order.

    Args:
        path: file, glob or URL; for `dataset` a folder or a hub id.
        form: how it is read; `auto` goes by each file's suffix.
        otherwise: what `auto` takes other suffixes for.
        chunk_bytes: least size of a chunk. `file` and `json` are never cut.
        subset, split: of a dataset.

    Raises:
        DataError: nothing is there, or it cannot be opened.
    """
    if form == "dataset":
        rows = tables.dataset_ranges(path, subset, split, chunk_bytes)
        return [Chunk(path, form, start, stop, subset, split) for start, stop in rows]
    return [
        chunk
        for name in expand(path)
        for chunk in _plan_file(
            name, _form_of(name, otherwise) if form == "auto" else form, chunk_bytes
        )
    ]


def _plan_file(path: str, form: Form, chunk_bytes: int) -> list[Chunk]:
    if form in ("file", "json"):
        return [Chunk(path, form)]
    if form == "parquet":
        ranges = tables.parquet_ranges(path, chunk_bytes)
        return [Chunk(path, form, start, stop) for start, stop in ranges]
    size = size_of(path)
    step = max(chunk_bytes, size // _CHUNKS_PER_FILE)
    return [Chunk(path, form, start, min(size, start + step)) for start in range(0, size, step)]


def _form_of(path: str, otherwise: Form) -> Form:
    return _SUFFIXES.get(PurePosixPath(path).suffix, otherwise)


def read_values(
    chunk: Chunk, problems: Problems, columns: Sequence[str] | None = None
) -> Iterator[tuple[Any, str]]:
    """Values of a chunk of jsonl, json, parquet or dataset, with where they stand.

    Args:
        chunk: what to read.
        problems: stops at lines that are not JSON, or collects them.
        columns: of tables only these are read, and they must be there; of a JSON object whose first
            such key holds a list, every item comes as an object of its own.
    """
    if chunk.form == "jsonl":
        return jsonfiles.read_json_lines(chunk.path, chunk.start, chunk.stop, problems)
    if chunk.form == "json":
        return jsonfiles.read_json(chunk.path, columns, problems)
    if chunk.form == "parquet":
        return tables.read_parquet(chunk.path, chunk.start, chunk.stop, columns)
    assert chunk.form == "dataset", chunk
    return tables.read_dataset(
        chunk.path, chunk.subset, chunk.split, chunk.start, chunk.stop, columns
    )


def read_plain(chunk: Chunk, problems: Problems) -> Iterator[tuple[str, str]]:
    """Texts of a chunk of lines, paragraphs or file, stripped, with where they stand.

    Blank ones are left out; line ends are `\\n`.
    """
    separator = _SEPARATORS[chunk.form]
    with open_binary(chunk.path) as handle:
        for offset, raw in read_range(handle, separator, chunk.start, chunk.stop, PIECE_BYTES):
            body = raw.lstrip()
            at = offset + len(raw) - len(body)
            try:
                text = body.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                problems.report(
                    "invalid_utf8",
                    chunk.path,
                    f"byte {at + error.start} is not UTF-8 ({body[error.start]:#04x}); "
                    f"of another encoding? `iconv -f GB18030 -t UTF-8` converts one",
                    body[: 4 * QUARANTINE_CHARACTERS].decode("utf-8", "replace"),
                )
                continue
            if text:
                if "\r" in text:
                    text = text.replace("\r\n", "\n")
                yield text, at_byte(chunk.path, at)
