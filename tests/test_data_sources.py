"""Corpora as documents: every form, every kind of bad input by its place, and the split."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.data import CleanSection, InstructionSource, TextSource
from altiplano.data.reading import jsonfiles, sources
from altiplano.data.reading.files import Chunk, Problems
from altiplano.data.reading.sources import (
    Document,
    is_held_out,
    plan_source,
    plan_text,
    read_documents,
    training_texts,
)
from altiplano.errors import DataError


def same(path: str) -> str:
    return path


def documents(
    path: Path | str, problems: Problems | None = None, **settings: Any
) -> list[Document]:
    source = TextSource(path=str(path), language="zh", **settings)
    collected = problems or Problems("fail")
    return [
        document
        for chunk in plan_text(source, same)
        for document in read_documents(source, chunk, collected)
    ]


def texts(path: Path | str, problems: Problems | None = None, **settings: Any) -> list[str]:
    return [document.text for document in documents(path, problems, **settings)]


def trained(*paths: Path | str, **settings: Any) -> list[str]:
    found = [TextSource(path=str(path), language="zh", format="lines") for path in paths]
    return list(training_texts(found, same, **settings))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("auto", ["一\n二", "三"]),
        ("paragraphs", ["一\n二", "三"]),
        ("lines", ["一", "二", "三"]),
        ("file", ["一\n二\n\n\n三"]),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_plain_text(
    form: str, expected: list[str], line_end: str, bom: bytes, tmp_path: Path
) -> None:
    content = bom + "一\n二\n\n \n三\n".replace("\n", line_end).encode()
    found = texts(written(tmp_path / "a.txt", content), format=form)
    assert [text.replace("\n \n", "\n\n") for text in found] == expected


def test_json_lines_and_json(tmp_path: Path) -> None:
    rows = written(tmp_path / "a.jsonl", '\ufeff{"text": "一"}\r\n\n{"text": " 二\\n"}')
    assert texts(rows) == ["一", "二"]
    listed = written(tmp_path / "a.json", '[{"body": {"text": "一"}}, {"body": {"text": "二"}}]')
    assert texts(listed, text_key="body.text") == ["一", "二"]


@pytest.mark.parametrize("whole_bytes", [4, 1 << 20])
def test_lists_on_the_way_to_a_text_are_walked(
    whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonfiles, "WHOLE_BYTES", whole_bytes)
    contexts = [{"context": "甲"}, {"context": " "}, {"context": ["乙", "丙"]}]
    squad = {"version": 1, "data": [{"paragraphs": contexts}, {"paragraphs": []}]}
    path = written(tmp_path / "b.json", json.dumps(squad))
    assert texts(path, text_key="data.paragraphs.context") == ["甲", "乙", "丙"]
    single = written(tmp_path / "c.json", json.dumps({"data": {"text": "丁"}}))
    assert texts(single, text_key="data.text") == ["丁"]


def test_columns_of_tables(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": [{"text": ["一", "二"]}, {"text": []}], "n": [1, 2]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "set"))
    assert texts(tmp_path / "a.parquet", text_key="body.text") == ["一", "二"]
    assert texts(tmp_path / "set", format="dataset", text_key="body.text") == ["一", "二"]
    with pytest.raises(DataError, match="has no column `text`; it has body, n"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet record 1: no text at `body` .it has keys"):
        texts(tmp_path / "a.parquet", text_key="body")


def test_a_dataset_that_is_no_folder_is_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def plan(path: str, form: str, **settings: Any) -> list[Chunk]:
        asked.append((path, settings))
        return []

    monkeypatch.setattr(sources, "plan_chunks", plan)
    source = InstructionSource(
        path="some/set", language="zh", format="dataset", subset="zh", split="test"
    )
    plan_source(source, lambda path: f"/project/{path}", otherwise="json", chunk_bytes=9)
    about = {"otherwise": "json", "chunk_bytes": 9, "subset": "zh", "split": "test"}
    assert asked == [("some/set", about)]


def test_globs_and_urls(tmp_path: Path) -> None:
    written(tmp_path / "b.txt", "二")
    written(tmp_path / "a.txt", "一\n\n三")
    assert texts(tmp_path / "*.txt") == ["一", "三", "二"]
    assert texts((tmp_path / "a.txt").as_uri()) == ["一", "三"]
    assert documents(tmp_path / "b.txt") == [("二", "zh", f"{tmp_path}/b.txt at byte 0")]


@pytest.mark.parametrize(
    ("name", "content", "message", "reason"),
    [
        ("a.txt", b"good\n\xff\xfe\n", "txt: byte 5 is not UTF-8 .0xff", "invalid_utf8"),
        ("a.jsonl", '{"text": "一"}\n{"text": \n', "jsonl:2: not JSON", "invalid_json"),
        ("a.jsonl", b'{"text": "a"}\n{"\xff"}', "jsonl:2: byte 2 is not UTF-8", "invalid_utf8"),
        ("a.jsonl", '{"text": "一"}\n{"b": 1}', "jsonl:2: no text at `text` .*b", "no_text"),
        ("a.jsonl", '{"text": "一"}\n[1]', "jsonl:2: no text at `text` .*list", "no_text"),
        ("a.jsonl", '{"text": "一"}\n{"text": null}', "jsonl:2: no text at `text`", "no_text"),
        ("a.jsonl", '{"text": "一"}\n{"text": "\\ud83d"}', "jsonl:2: a lone", "invalid_unicode"),
        ("a.jsonl", '{"text": "一"}\n{"b": "\\ud83d"}', "jsonl:2: no text", "no_text"),
        ("a.json", '[{"text": "一"}, {"b": ""}]', "json record 2: no text", "no_text"),
    ],
)
def test_bad_documents_stop_or_are_recorded(
    name: str, content: str | bytes, message: str, reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content)
    form = "lines" if name == "a.txt" else "auto"
    with pytest.raises(DataError, match=message):
        texts(path, format=form)
    problems = Problems("skip")
    assert len(texts(path, problems, format=form)) == 1
    assert problems.counts == {reason: 1}
    (dropped,) = problems.dropped
    json.dumps(dropped.text, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff", "[]"])
def test_empty_corpus_is_refused(content: str, tmp_path: Path) -> None:
    path = written(tmp_path / ("a.json" if content == "[]" else "a.txt"), content)
    with pytest.raises(DataError, match="a.* holds no usable text .0 documents skipped"):
        list(training_texts([TextSource(path=str(path), language="zh")], same))


def test_a_corpus_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", b"\xff\n\xff")
    with pytest.raises(DataError, match="no usable text .2 documents skipped"):
        trained(path, on_error="skip")


def test_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file at"):
        texts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a directory"):
        texts(tmp_path)


def test_endless_json_texts_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 4)
    assert texts(written(tmp_path / "a.jsonl", '{"text": "一二三四五六"}')) == ["一二三四", "五六"]


# The split.


@given(text=st.text(), share=st.floats(0, 0.5))
def test_split_follows_content_only(text: str, share: float) -> None:
    same_text = "\r\n ".join(text.split())
    assert is_held_out(text, share) == is_held_out(same_text, share)
    assert not is_held_out(text, 0)
    if is_held_out(text, share):
        assert is_held_out(text, min(1.0, share * 2)), "a larger share keeps what a smaller held"


def test_split_is_about_the_share_asked_for_and_never_changes() -> None:
    held = [number for number in range(5000) if is_held_out(f"document {number}", 0.1)]
    assert 400 < len(held) < 600
    assert held[:4] == [21, 22, 51, 55]


def test_training_texts_leave_out_languages_and_the_held_out(tmp_path: Path) -> None:
    zh = TextSource(
        path=str(written(tmp_path / "zh.txt", "\n".join(f"第{n}句" for n in range(200)))),
        language="zh",
        format="lines",
    )
    en = TextSource(path=str(written(tmp_path / "en.txt", "word")), language="en")
    found = list(training_texts([en, zh], same, languages=["zh"], held_out=0.2))
    assert found == [t for t in texts(zh.path, format="lines") if not is_held_out(t, 0.2)]
    assert 100 < len(found) < 200
    assert list(training_texts([en, zh], same)) == ["word", *texts(zh.path, format="lines")]


def test_training_texts_are_cleaned_before_they_are_split(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\n".join(f"第{n}句\u200b" for n in range(50)) + "\n短")
    clean = CleanSection(min_characters=2)
    found = trained(path, held_out=0.2, clean=clean)
    assert found == [t for t in (f"第{n}句" for n in range(50)) if not is_held_out(t, 0.2)]


def test_the_cap_counts_what_is_read_and_is_each_sources_own(tmp_path: Path) -> None:
    a, b = (written(tmp_path / name, "短\n第一句\n第二句") for name in ("a.txt", "b.txt"))
    capped = [
        TextSource(path=str(path), language="zh", format="lines", max_documents=2)
        for path in (a, b)
    ]
    found = training_texts(capped, same, clean=CleanSection(min_characters=2))
    assert list(found) == ["第一句"] * 2


def test_shared_paragraphs_are_read(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squad = shared / "text" / "cmrc2018_dev_squad.json"
    whole = texts(squad, text_key="data.paragraphs.context")
    assert len(whole) == 848
    monkeypatch.setattr(jsonfiles, "WHOLE_BYTES", 1 << 10)
    assert texts(squad, text_key="data.paragraphs.context") == whole, "streamed"
