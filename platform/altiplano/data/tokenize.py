"""Tokenising by Ray Data: rows of JSON in, arrays of ids out, in the order they came.

Deliberately knows nothing of sources or blocks: a caller gives rows and a function that turns one
batch of them into an Arrow table on a worker. Costs one Ray Data execution (under a second) per
`CHARACTERS_PER_RUN`, and holds that much text in the object store at a time.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

CHARACTERS_PER_RUN = 32 << 20
CHARACTERS_PER_BLOCK = 1 << 20
"""Text one Ray task tokenises."""

Row = dict[str, Any]


def encode_rows(
    rows: Iterable[Row],
    encode: "Callable[[pa.Table], pa.Table]",
    *,
    characters_per_block: int = CHARACTERS_PER_BLOCK,
) -> Iterator[Row]:
    """Run `encode` over the rows on the cluster; results come in the rows' order.

    So what is written does not depend on the number of blocks or workers.

    Args:
        rows: each with a string column `text`; all with the same columns.
        encode: from a table of rows to a table with as many; runs in Ray workers.
        characters_per_block: text of one task.

    Yields:
        The encoded rows; list columns as numpy arrays.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    held = 0
    for block in _by_characters(rows, characters_per_block):
        tables.append(pa.Table.from_pylist(block))
        held += sum(len(row["text"]) for row in block)
        if held >= CHARACTERS_PER_RUN:
            yield from _run(tables, encode)
            tables, held = [], 0
    if tables:
        yield from _run(tables, encode)


def _run(tables: "list[pa.Table]", encode: "Callable[[pa.Table], pa.Table]") -> Iterator[Row]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_arrow(tables).map_batches(
        encode, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        yield from _rows_of(table)


def _rows_of(table: "pa.Table") -> Iterator[Row]:
    """Rows of a table without turning every id into a Python integer."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
            columns[name] = np.split(values, ends[:-1])
        else:
            columns[name] = column.to_pylist()
    for index in range(table.num_rows):
        yield {name: column[index] for name, column in columns.items()}


def _by_characters(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    block: list[Row] = []
    held = 0
    for row in rows:
        block.append(row)
        held += len(row["text"])
        if held >= most:
            yield block
            block, held = [], 0
    if block:
        yield block
