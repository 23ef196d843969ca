"""Chunks of files: every form reads the same however it is cut, and bad files are named."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.data.reading import files, jsonfiles, ranges
from altiplano.data.reading.files import Chunk, Form, Problems, plan_chunks, read_plain, read_values
from altiplano.data.reading.problems import QUARANTINE_CHARACTERS
from altiplano.errors import DataError

if TYPE_CHECKING:
    from tests.helpers.s3 import Bucket


Found = list[tuple[Any, str]]
FEW = st.integers(1, 40)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def plain(path: Path | str, form: Form, chunk_bytes: int = files.CHUNK_BYTES) -> Found:
    chunks = plan_chunks(str(path), form, chunk_bytes=chunk_bytes)
    return [found for chunk in chunks for found in read_plain(chunk, Problems("fail"))]


def values(
    path: Path | str,
    form: Form | None = None,
    columns: list[str] | None = None,
    chunk_bytes: int = files.CHUNK_BYTES,
    problems: Problems | None = None,
    **settings: Any,
) -> Found:
    chunks = plan_chunks(str(path), form or "auto", chunk_bytes=chunk_bytes, **settings)
    collected = problems or Problems("fail")
    return [found for chunk in chunks for found in read_values(chunk, collected, columns)]


# Cutting.


@given(
    content=st.text("ab文\n\n\n\r \t\u3000", max_size=60),
    form=st.sampled_from(["lines", "paragraphs", "file"]),
    bom=st.booleans(),
    chunk_bytes=FEW,
    read_bytes=FEW,
    piece_bytes=st.integers(8, 30),
)
def test_texts_are_the_same_however_a_file_is_cut(
    content: str,
    form: Form,
    bom: bool,
    chunk_bytes: int,
    read_bytes: int,
    piece_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    raw = b"\xef\xbb\xbf" * bom + content.encode()
    path = written(tmp_path_factory.mktemp("cut") / "a.txt", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", piece_bytes)
        whole = plain(path, form)
        patch.setattr(ranges, "READ_BYTES", read_bytes)
        assert plain(path, form, chunk_bytes) == whole
    assert "".join("".join(text for text, _ in whole).split()) == "".join(content.split())
    for text, origin in whole:
        assert 0 < len(text.encode()) <= piece_bytes
        at = int(origin.removeprefix(f"{path} at byte "))
        assert raw[at:].decode().lstrip().startswith(text[0])


@given(rows=st.lists(st.text("ab文\n\r", max_size=20), max_size=8), chunk_bytes=FEW, read_bytes=FEW)
def test_json_lines_are_the_same_however_a_file_is_cut(
    rows: list[str],
    chunk_bytes: int,
    read_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = written(tmp_path_factory.mktemp("cut") / "a.jsonl", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "READ_BYTES", read_bytes)
        found = values(path, chunk_bytes=chunk_bytes)
    assert [value for value, _ in found] == rows
    assert found == values(path)


def test_paragraphs_lines_and_files(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\r\n一\r\n二\r\n\r\n \t\r\n三\r\n")
    assert plain(path, "lines") == [
        ("一", f"{path} at byte 2"),
        ("二", f"{path} at byte 7"),
        ("三", f"{path} at byte 18"),
    ]
    assert [text for text, _ in plain(path, "paragraphs")] == ["一\n二", "三"]
    assert [text for text, _ in plain(path, "file")] == ["一\n二\n\n \t\n三"]


def test_chunks_cover_a_file_and_forms_that_cannot_be_cut_stay_whole(tmp_path: Path) -> None:
    path = str(written(tmp_path / "a.txt", "x" * 25))
    assert plan_chunks(path, "lines", chunk_bytes=10) == [
        Chunk(path, "lines", 0, 10),
        Chunk(path, "lines", 10, 20),
        Chunk(path, "lines", 20, 25),
    ]
    assert plan_chunks(path, "file", chunk_bytes=10) == [Chunk(path, "file")]
    assert plan_chunks(path, "json", chunk_bytes=10) == [Chunk(path, "json")]
    assert plan_chunks(str(written(tmp_path / "b.txt", "")), "lines") == []


def test_auto_goes_by_each_suffix(tmp_path: Path) -> None:
    for name in ("a.json", "b.jsonl", "c.text"):
        written(tmp_path / name, "1")
    pattern = f"{tmp_path}/*"
    assert [c.form for c in plan_chunks(pattern, "auto")] == ["json", "jsonl", "paragraphs"]
    assert [c.form for c in plan_chunks(pattern, "auto", otherwise="json")][2] == "json"


def test_a_giant_line_comes_in_pieces(tmp_path: Path) -> None:
    """Nothing lost, whole characters, and no piece above the limit."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(20):
            file.write("山".encode() * 400_000)
    for form in ("lines", "paragraphs", "file"):
        pieces = [text for text, _ in plain(path, form, 5_000_000)]
        assert sum(map(len, pieces)) == 8_000_000
        assert all(len(text.encode()) <= files.PIECE_BYTES for text in pieces)
        assert set("".join(pieces)) == {"山"}


# Not text, not JSON.


@pytest.mark.parametrize("chunk_bytes", [4, 1000])
def test_bytes_that_are_not_utf8_are_named_or_left_out(chunk_bytes: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", b"good\n  b\xff\xfe\nfine")
    with pytest.raises(DataError, match=r"a.txt: byte 8 is not UTF-8 .0xff.*GB18030.*on_error"):
        plain(path, "lines", chunk_bytes)
    problems = Problems("skip")
    chunks = plan_chunks(str(path), "lines", chunk_bytes=chunk_bytes)
    assert [t for c in chunks for t, _ in read_plain(c, problems)] == ["good", "fine"]
    (dropped,) = problems.dropped
    assert (dropped.reason, dropped.origin) == ("invalid_utf8", str(path))
    assert dropped.text.startswith("b\ufffd")


@pytest.mark.parametrize("chunk_bytes", [3, 1000])
@pytest.mark.parametrize(
    ("bad", "message", "reason"),
    [
        (b'{"text": ', "jsonl:3: not JSON: Expecting value", "invalid_json"),
        (b"\xe5\x93", "jsonl:3: byte 0 is not UTF-8", "invalid_utf8"),
        (b"[" * 5000 + b"]" * 5000, "jsonl:3: JSON nested too deeply", "invalid_json"),
        (b"NUL \x00", "jsonl:3: not JSON", "invalid_json"),
    ],
)
def test_bad_json_lines_are_named_or_left_out(
    bad: bytes, message: str, reason: str, chunk_bytes: int, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n' + bad + b'\n{"b": 2}')
    with pytest.raises(DataError, match=message):
        values(path, chunk_bytes=chunk_bytes)
    problems = Problems("skip")
    found = values(path, chunk_bytes=chunk_bytes, problems=problems)
    assert [value for value, _ in found] == [{"a": 1}, {"b": 2}]
    assert problems.counts == {reason: 1}
    assert problems.dropped[0].origin == f"{path} at byte 15"
    assert len(problems.dropped[0].text) <= QUARANTINE_CHARACTERS


def test_a_place_that_is_no_byte_of_a_file_stays_as_it_is() -> None:
    with pytest.raises(DataError, match="^a.json record 3: wrong; mend it, or set `data.on_error"):
        Problems("fail").report("bad", "a.json record 3", "wrong")


# JSON files, at once and streamed.

RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["text", "other", "item"]), st.text(max_size=5), max_size=3),
    max_size=5,
)


@given(items=RECORDS, shape=st.sampled_from(["list", "inner", "single", "bom"]))
def test_a_streamed_json_file_gives_what_a_parsed_one_does(
    items: list[dict[str, str]], shape: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    value: Any = items
    if shape == "inner":
        value = {"version": 1.5, "data": items, "more": {"data": [1]}}
    elif shape == "single":
        value = {"data": {"text": items}}
    content = "\ufeff" * (shape == "bom") + " " + json.dumps(value, ensure_ascii=False)
    path = written(tmp_path_factory.mktemp("json") / "a.json", content)
    whole = values(path, columns=["data"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonfiles, "WHOLE_BYTES", 4)
        assert values(path, columns=["data"]) == whole
    if shape in ("list", "bom"):
        assert whole == [(item, f"{path} record {n}") for n, item in enumerate(items, 1)]
    if shape == "inner":
        assert [found for found, _ in whole] == [{"data": item} for item in items]


@pytest.mark.parametrize("whole_bytes", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "一"}\n{"text": "二"}', "a.json: not JSON.*name it .jsonl"),
        ('[{"text": "一"}, ', "a.json: not JSON"),
        ("plain text", "a.json: not JSON"),
        ("", "a.json: not JSON"),
        (b'["\xff"]', "a.json: .*UTF-?8"),
    ],
)
def test_bad_json_files_are_named(
    content: str | bytes,
    message: str,
    whole_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jsonfiles, "WHOLE_BYTES", whole_bytes)
    path = written(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message):
        values(path, columns=["text"])
    problems = Problems("skip")
    values(path, columns=["text"], problems=problems)
    assert sum(problems.counts.values()) == 1


def test_a_giant_object_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfiles, "WHOLE_BYTES", 1)
    with pytest.raises(DataError, match="a.json is one JSON object.* make it a list of records"):
        values(written(tmp_path / "a.json", '{"messages": []}'))


# Tables.


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten rows in row groups of two."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({"text": [f"第{n}行" for n in range(10)], "n": list(range(10))})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=2)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(("chunk_bytes", "count"), [(1, 5), (1 << 20, 1)])
def test_parquet_is_read_by_row_groups(table: Path, chunk_bytes: int, count: int) -> None:
    assert len(plan_chunks(str(table), "auto", chunk_bytes=chunk_bytes)) == count
    found = values(table, columns=["text"], chunk_bytes=chunk_bytes)
    assert found == [({"text": f"第{n}行"}, f"{table} record {n + 1}") for n in range(10)]
    assert values(table, chunk_bytes=chunk_bytes)[9][0] == {"text": "第9行", "n": 9}


def test_what_is_wrong_with_a_table_is_said(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column `body`; it has n, text: name one of them"):
        values(table, columns=["body"])
    with pytest.raises(DataError, match="b.parquet is not a Parquet file"):
        values(written(tmp_path / "b.parquet", "PAR1 and no more"))
    raw = bytearray(table.read_bytes())
    raw[4:200] = b"\xff" * 196
    with pytest.raises(DataError, match="c.parquet: row group 0 cannot be read"):
        values(written(tmp_path / "c.parquet", bytes(raw)))


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("with_splits", [False, True])
def test_saved_datasets_are_read_by_rows(
    chunk_bytes: int, with_splits: bool, tmp_path: Path
) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"第{n}行" for n in range(10)], "n": [0] * 10})
    saved = datasets.DatasetDict({"dev": rows}) if with_splits else rows
    saved.save_to_disk(str(tmp_path / "set"))
    path, settings = tmp_path / "set", {"split": "dev"} if with_splits else {}
    chunks = plan_chunks(str(path), "dataset", chunk_bytes=chunk_bytes, **settings)
    assert len(chunks) == 10 if chunk_bytes == 1 else len(chunks) < 10
    found = values(path, "dataset", ["text"], chunk_bytes, **settings)
    assert found == [({"text": f"第{n}行"}, f"{path} record {n + 1}") for n in range(10)]


def test_what_is_wrong_with_a_dataset_is_said(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["一"]})
    path = tmp_path / "set"
    datasets.DatasetDict({"dev": rows, "all": rows}).save_to_disk(str(path))
    with pytest.raises(DataError, match="has no split `train`; it has all, dev: name one"):
        values(path, "dataset")
    with pytest.raises(DataError, match="has no column `body`; it has text"):
        values(path, "dataset", ["body"], split="dev")
    with pytest.raises(DataError, match=r"cannot load the dataset .*none .subset None, split"):
        values(tmp_path / "none", "dataset")


def test_a_folder_of_files_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", '{"text": "一"}\n{"text": "二"}')
    found = values(tmp_path / "set", "dataset", ["text"])
    assert [value for value, _ in found] == [{"text": "一"}, {"text": "二"}]
    (tmp_path / "bad").mkdir()
    written(tmp_path / "bad" / "train.jsonl", '{"text": ')
    with pytest.raises(DataError, match="cannot load the dataset .*bad"):
        values(tmp_path / "bad", "dataset")


# Object storage.


@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
def test_objects_are_read_in_chunks(
    s3_bucket: "Bucket",
    table: Path,
    chunk_bytes: int,
) -> None:
    text = s3_bucket.put("a.txt", "一\n二\n\n三\n".encode())
    assert [found for found, _ in plain(text, "lines", chunk_bytes)] == ["一", "二", "三"]
    rows = s3_bucket.put("a.jsonl", b'{"a": 1}\n{"a": 2}\nx')
    with pytest.raises(DataError, match="a.jsonl:3: not JSON"):
        values(rows, chunk_bytes=chunk_bytes)
    stored = s3_bucket.put("a.parquet", table.read_bytes())
    assert len(values(stored, columns=["text"], chunk_bytes=chunk_bytes)) == 10
