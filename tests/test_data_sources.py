"""Reading corpora and records: every form, and every kind of bad input by its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.schema import InstructionSource, TextSource
from altiplano.data import sources
from altiplano.data.sources import (
    Problems,
    is_held_out,
    read_records,
    read_text,
    training_texts,
)
from altiplano.errors import DataError


def same(path: str) -> str:
    return path


def texts(path: Path | str, **settings: object) -> list[str]:
    source = TextSource(path=str(path), language="zh", **settings)
    return [document.text for document in read_text(source, same)]


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
    rows = written(tmp_path / "a.jsonl", '\ufeff{"text": "一"}\r\n\n{"text": "二"}')
    assert texts(rows) == ["一", "二"]
    listed = written(tmp_path / "a.json", '[{"body": {"text": "一"}}, {"body": {"text": "二"}}]')
    assert texts(listed, text_key="body.text") == ["一", "二"]
    squad = {"data": [{"paragraphs": [{"context": "甲"}, {"context": "乙"}]}, {"paragraphs": []}]}
    nested = written(tmp_path / "b.json", json.dumps(squad))
    assert texts(nested, text_key="data.paragraphs.context") == ["甲", "乙"]


def test_globs_urls_and_limits(tmp_path: Path) -> None:
    written(tmp_path / "b.txt", "二")
    written(tmp_path / "a.txt", "一\n\n三")
    assert texts(tmp_path / "*.txt") == ["一", "三", "二"]
    assert texts((tmp_path / "a.txt").as_uri()) == ["一", "三"]
    assert texts(tmp_path / "*.txt", max_documents=2) == ["一", "三"]


@pytest.mark.parametrize(
    ("name", "content", "message", "reason"),
    [
        ("a.txt", b"good\n\xff\xfe\n", "txt: byte 5 is not UTF-8 .0xff", "invalid_utf8"),
        ("a.jsonl", '{"text": "一"}\n{"text": \n', "jsonl:2: not JSON", "invalid_json"),
        ("a.jsonl", b'{"text": "a"}\n{"\xff"}', "jsonl:2: byte 2 is not UTF-8", "invalid_utf8"),
        ("a.jsonl", '{"text": "一"}\n{"b": 1}', "jsonl:2 has no text at `text` .*b", "no_text"),
        ("a.jsonl", '{"text": "一"}\n[1]', "jsonl:2 has no text at `text` .*list", "no_text"),
        ("a.jsonl", '{"text": "一"}\n{"text": "\\ud83d"}', "jsonl:2: a lone", "invalid_unicode"),
        ("a.json", '[{"text": "一"}, {"b": ""}]', "json record 2 has no text", "no_text"),
    ],
)
def test_bad_documents_stop_or_are_counted(
    name: str, content: str | bytes, message: str, reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        texts(path, format="auto" if name != "a.txt" else "lines")
    problems = Problems("skip")
    source = TextSource(
        path=str(path), language="zh", format="auto" if name != "a.txt" else "lines"
    )
    assert len(list(read_text(source, same, problems=problems))) == 1
    assert dict(problems.skipped) == {reason: 1}


def test_json_lines_named_json_get_a_hint(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '{"text": "一"}\n{"text": "二"}')
    with pytest.raises(DataError, match=r"a\.json:2: not JSON.*name it \.jsonl"):
        texts(path)


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_empty_corpus_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no usable text"):
        texts(written(tmp_path / "a.txt", content))


def test_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file at"):
        texts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a directory"):
        texts(tmp_path)


@given(
    lines=st.lists(st.text("ab文字🙂 \n", max_size=30), min_size=1, max_size=6),
    limit=st.integers(8, 20),
)
def test_endless_lines_come_in_pieces_of_whole_characters(
    lines: list[str], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = "\n".join(lines) + "end"
    path = written(tmp_path_factory.mktemp("long") / "a.txt", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", limit)
        pieces = texts(path, format="lines")
    assert "".join("".join(pieces).split()) == "".join(content.split())
    assert all(len(piece.encode()) < 2 * limit for piece in pieces)


def test_giant_line_is_read(tmp_path: Path) -> None:
    """One line of many pieces: nothing lost, and no piece above the limit."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(20):
            file.write("山".encode() * 400_000)
    pieces = texts(path)
    assert sum(map(len, pieces)) == 8_000_000
    assert len(pieces) > 4


@given(text=st.text(), share=st.floats(0, 0.5))
def test_split_follows_content_only(text: str, share: float) -> None:
    same_text = "\r\n ".join(text.split())
    assert is_held_out(text, share) == is_held_out(same_text, share)
    assert not is_held_out(text, 0)
    if is_held_out(text, share):
        assert is_held_out(text, min(1.0, share * 2)), "a larger share keeps what a smaller held"


def test_split_is_about_the_share_asked_for() -> None:
    held = sum(is_held_out(f"document {number}", 0.1) for number in range(5000))
    assert 400 < held < 600


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


def records(path: Path, **settings: object) -> list[list[dict[str, str]]]:
    source = InstructionSource(path=str(path), language="zh", **settings)
    return [record.messages for record in read_records(source, same)]


TURNS = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "问", "output": "答"},
        {"instruction": "问", "input": None, "output": "答", "language": "zh"},
        {"instruction": "", "input": "问", "output": "答"},
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_record_forms(record: dict[str, object], name: str, tmp_path: Path) -> None:
    content = json.dumps([record] if name == "a.json" else record)
    assert records(written(tmp_path / name, content)) == [TURNS]


def test_input_follows_the_instruction_and_turns_keep_their_order(tmp_path: Path) -> None:
    system = {"role": "system", "content": "简短"}
    rows = [
        {"instruction": "译", "input": "hello", "output": "你好"},
        {"messages": [system, *TURNS, *TURNS]},
    ]
    first, second = records(written(tmp_path / "a.json", json.dumps(rows)))
    assert first[0]["content"] == "译\nhello"
    assert second == [system, *TURNS, *TURNS]
    assert len(records(tmp_path / "a.json", max_records=1)) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"instruction": "问"},
        {"instruction": "问", "output": " "},
        {"instruction": "问", "output": 3},
        {"output": "答"},
        {"messages": TURNS[:1]},
        {"messages": [TURNS[1], TURNS[0]]},
        {"messages": [*TURNS, {"role": "user", "content": "还"}]},
        {"messages": [TURNS[0], {"role": "assistant", "content": ""}]},
        {"messages": [TURNS[0], {"role": "tool", "content": "答"}]},
        {"messages": [TURNS[0], {"role": "assistant"}]},
        {"messages": []},
        {"messages": "问"},
        "问",
    ],
)
def test_records_without_an_answer(bad: object, tmp_path: Path) -> None:
    rows = [{"instruction": "问", "output": "答"}, bad]
    path = written(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: an instruction record without an answer"):
        records(path)
    problems = Problems("skip")
    source = InstructionSource(path=str(path), language="zh")
    assert len(list(read_records(source, same, problems=problems))) == 1
    assert dict(problems.skipped) == {"no_answer": 1}


def test_files_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no usable instruction record"):
        records(written(tmp_path / "a.json", "[]"))


def test_shared_records_and_paragraphs_are_read(shared: Path) -> None:
    squad = shared / "text" / "cmrc2018_dev_squad.json"
    assert len(texts(squad, text_key="data.paragraphs.context")) == 848
    source = InstructionSource(path=str(shared / "instruct" / "alpaca_zh_demo.json"), language="zh")
    problems = Problems("skip")
    kept = len(list(read_records(source, same, problems=problems)))
    assert kept + problems.skipped["no_answer"] == 1000
    assert kept > 990
