"""Rows of Parquet files and Hugging Face datasets.

A part is a range of row groups or of rows, so every part can be read on its own. Only the wanted
columns are read. Knows tables, not what their columns mean. Costs the memory of `BATCH_ROWS` rows
and, for Parquet, of one column chunk's pages.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.errors import DataError
from altiplano.storage import is_remote, open_binary

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 1024
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a folder."""


def parquet_ranges(path: str, part_bytes: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about `part_bytes` (uncompressed) each, at least one group."""
    with _parquet(path) as file:
        sizes = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
    ranges, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and held + size > part_bytes:
            ranges.append((start, number))
            start, held = number, 0
        held += size
    return [*ranges, (start, len(sizes))] if sizes else []


def read_parquet(
    path: str, start: int, stop: int | None, columns: Sequence[str] | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of some row groups, with where they stand.

    Raises:
        DataError: not Parquet, or without one of the columns.
    """
    import pyarrow as pa

    with _parquet(path) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        groups = range(start, file.num_row_groups if stop is None else stop)
        row = sum(file.metadata.row_group(number).num_rows for number in range(start))
        try:
            batches = file.iter_batches(BATCH_ROWS, list(groups), columns=columns)
            for batch in batches:
                yield from _rows(batch, path, row)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: row group {start} cannot be read: {error}") from None


def dataset_ranges(
    path: str, subset: str | None, split: str, part_bytes: int
) -> list[tuple[int, int]]:
    """Ranges of rows of about `part_bytes` each."""
    dataset = _dataset(path, subset, split)
    rows = len(dataset)
    step = max(1, int(part_bytes * rows / max(1, dataset.data.nbytes)))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def read_dataset(
    path: str,
    subset: str | None,
    split: str,
    start: int,
    stop: int | None,
    columns: Sequence[str] | None,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a Hugging Face dataset, with where they stand.

    Raises:
        DataError: it cannot be loaded, or is without the split or one of the columns.
    """
    dataset = _dataset(path, subset, split)
    _check_columns(path, columns, dataset.column_names)
    if columns is not None:
        dataset = dataset.select_columns(list(columns))
    rows = dataset.select(range(start, len(dataset) if stop is None else stop))
    row = start
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
        yield from _rows(table, path, row)
        row += table.num_rows


def _rows(
    table: "pa.Table | pa.RecordBatch", path: str, first: int
) -> Iterator[tuple[dict[str, Any], str]]:
    for number, value in enumerate(table.to_pylist(), start=first + 1):
        yield value, f"{path} record {number}"


def _check_columns(path: str, columns: Sequence[str] | None, found: Sequence[str]) -> None:
    for column in columns or ():
        if column not in found:
            raise DataError(
                f"{path} has no column `{column}`; it has {', '.join(sorted(found))}: "
                f"name one of them in `text_key`"
            )


@contextmanager
def _parquet(path: str) -> Iterator["pq.ParquetFile"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(path) as handle:
        try:
            file = pq.ParquetFile(handle)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a Parquet file: {error}") from None
        yield file


@lru_cache(maxsize=4)
def _dataset(path: str, subset: str | None, split: str) -> "datasets.Dataset":
    """Loaded once per process; a saved one is mapped, so it costs no memory of its own."""
    import datasets

    try:
        if is_remote(path) or any((Path(path) / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load the dataset {path} (subset {subset}, split {split}): {error}"
        ) from None
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise DataError(
            f"the dataset {path} has no split `{split}`; it has {', '.join(sorted(loaded))}: "
            f"name one of them in `split`"
        )
    return loaded[split]
