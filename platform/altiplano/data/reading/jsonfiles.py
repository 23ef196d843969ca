"""Values of JSON files and JSON lines.

A `.json` file up to `WHOLE_BYTES` is parsed at once; a larger one is streamed item by item, so its
memory is that of its largest item. Both give the same values, but for what JSON proper lacks: the
streaming parser refuses NaN and reads a lone surrogate as `?`. Knows JSON, not what its keys mean.
"""

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from altiplano.data.reading.problems import Problems, at_byte
from altiplano.data.reading.ranges import BOM, LINES, read_range
from altiplano.errors import DataError
from altiplano.storage import open_binary

WHOLE_BYTES = 8 << 20
"""A larger `.json` file is streamed."""


def read_json_lines(
    path: str, start: int, stop: int | None, problems: Problems
) -> Iterator[tuple[Any, str]]:
    """Value and origin of every filled line of a byte range."""
    with open_binary(path) as handle:
        for offset, raw in read_range(handle, LINES, start, stop, piece_bytes=None):
            if raw := raw.strip():
                yield from _parse(raw, at_byte(path, offset), problems)


def read_json(
    path: str, columns: Sequence[str] | None, problems: Problems
) -> Iterator[tuple[Any, str]]:
    """Items of a JSON list; else those of the list at the first of `columns`; else the whole.

    An item of such an inner list comes as the whole would be with that item alone.
    """
    with open_binary(path) as handle:
        head = handle.read(WHOLE_BYTES + 1)
        if len(head) <= WHOLE_BYTES:
            values = _parse(head.removeprefix(BOM), path, problems)
            items = ((item, origin) for value, origin in values for item in _items(value, columns))
        else:
            handle.seek(len(BOM) if head.startswith(BOM) else 0)
            is_list = head.removeprefix(BOM).lstrip().startswith(b"[")
            del head
            items = ((item, path) for item in _streamed(handle, path, is_list, columns, problems))
        for number, (item, origin) in enumerate(items, start=1):
            yield item, f"{origin} record {number}"


def _parse(raw: bytes, origin: str, problems: Problems) -> Iterator[tuple[Any, str]]:
    try:
        yield json.loads(raw.decode("utf-8")), origin
    except UnicodeDecodeError as error:
        excerpt = raw.decode("utf-8", "replace")
        problems.report("invalid_utf8", origin, f"byte {error.start} is not UTF-8", excerpt)
    except RecursionError:
        problems.report("invalid_json", origin, "JSON nested too deeply")
    except json.JSONDecodeError as error:
        hint = " (JSON lines? name it .jsonl)" if error.msg == "Extra data" else ""
        line = f" in line {error.lineno}" if error.lineno > 1 else ""
        problems.report("invalid_json", origin, f"not JSON{line}: {error.msg}{hint}", error.doc)


def _items(value: Any, columns: Sequence[str] | None) -> Iterator[Any]:
    if isinstance(value, list):
        yield from value
    elif columns and isinstance(value, dict) and isinstance(value.get(columns[0]), list):
        yield from ({columns[0]: item} for item in value[columns[0]])
    else:
        yield value


def _streamed(
    handle: IO[bytes], path: str, is_list: bool, columns: Sequence[str] | None, problems: Problems
) -> Iterator[Any]:
    import ijson

    try:
        if is_list:
            yield from ijson.items(handle, "item", use_float=True)
            return
        if not columns:
            raise DataError(
                f"{path} is one JSON object of more than {WHOLE_BYTES >> 20} MiB: "
                f"make it a list of records, or JSON lines"
            )
        start, count = handle.tell(), 0
        for item in ijson.items(handle, f"{columns[0]}.item", use_float=True):
            count += 1
            yield {columns[0]: item}
        if count == 0:
            handle.seek(start)
            for item in ijson.items(handle, columns[0], use_float=True):
                if item != []:
                    yield {columns[0]: item}
    except ijson.JSONError as error:
        said = str(error).splitlines()[0]
        hint = " (JSON lines? name it .jsonl)" if "trailing garbage" in said else ""
        problems.report("invalid_json", path, f"not JSON: {said}{hint}")
