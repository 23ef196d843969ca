"""Instruction records: every published shape becomes a conversation, every other says why not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.config.data import InstructionSource
from altiplano.data.reading.problems import Problems
from altiplano.data.reading.records import Record, plan_records, read_records
from altiplano.errors import DataError

TURNS = [
    {"role": "user", "content": "问"},
    {"role": "assistant", "content": "答"},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "no"},
]
SYSTEM = {"role": "system", "content": "be brief"}


def same(path: str) -> str:
    return path


def read(source: InstructionSource, problems: Problems, chunk_bytes: int = 1 << 20) -> list[Record]:
    chunks = plan_records(source, same, chunk_bytes=chunk_bytes)
    return [record for chunk in chunks for record in read_records(source, chunk, problems)]


def read_one(record: object, tmp_path: Path) -> list[dict[str, str]]:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    (found,) = read(InstructionSource(path=str(path), language="zh"), Problems("fail"))
    assert found.language == "zh" and found.origin == f"{path} record 1"
    return found.messages


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": TURNS, "conversations": None},
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "gpt", "value": "答"},
                {"from": "user", "value": "more?"},
                {"from": "chatgpt", "value": "no"},
            ]
        },
        {"input": ["问", "more?"], "output": ["答", "no"]},
        {"instruction": "more?", "input": "", "output": "no", "history": [["问", "答"]]},
    ],
)
def test_every_shape_of_one_conversation(record: object, tmp_path: Path) -> None:
    assert read_one(record, tmp_path) == TURNS


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, *TURNS]},
        {"messages": TURNS, "system": "be brief"},
        {"messages": [SYSTEM, *TURNS], "system": "not this one"},
        {"input": ["问", "more?"], "output": ["答", "no"], "system": "be brief"},
    ],
)
def test_system_message(record: object, tmp_path: Path) -> None:
    assert read_one(record, tmp_path) == [SYSTEM, *TURNS]


def test_blank_system_message_is_none(tmp_path: Path) -> None:
    assert read_one({"messages": [SYSTEM | {"content": " "}, *TURNS]}, tmp_path) == TURNS
    assert read_one({"messages": TURNS, "system": ""}, tmp_path) == TURNS


def test_alpaca_joins_instruction_and_input(tmp_path: Path) -> None:
    record = {"instruction": "Sort:", "input": "b\na", "output": "a\nb"}
    assert [m["content"] for m in read_one(record, tmp_path)] == ["Sort:\nb\na", "a\nb"]
    record = {"instruction": None, "input": "only an input", "output": "yes"}
    assert read_one(record, tmp_path)[0]["content"] == "only an input"


USER, ANSWER = TURNS[:2]


@pytest.mark.parametrize(
    ("bad", "reason", "said"),
    [
        ("text", "not_a_record", r"a str is no record: expected `instruction` and `output`"),
        ({"prompt": "a", "x": ""}, "not_a_record", r"it has prompt \(empty: x\); expected `inst"),
        ({"instruction": "a", "output": " "}, "no_answer", "does not end in an answer"),
        ({"instruction": "a"}, "no_answer", "does not end in an answer: it has instruction"),
        ({"messages": [*TURNS, USER]}, "no_answer", "does not end in an answer: it has messages"),
        ({"messages": []}, "no_answer", "does not end in an answer"),
        ({"messages": [SYSTEM]}, "no_answer", "does not end in an answer"),
        ({"messages": [ANSWER]}, "roles_out_of_order", "the turns are assistant: expected user"),
        (
            {"messages": [USER, USER, ANSWER]},
            "roles_out_of_order",
            "the turns are user, user, assistant: expected",
        ),
        ({"messages": [*TURNS[:2], SYSTEM, *TURNS[2:]]}, "roles_out_of_order", "system"),
        ({"messages": [USER | {"content": ""}, ANSWER]}, "empty_turn", r"turn 1 \(user\) has no"),
        ({"instruction": "", "input": " ", "output": "a"}, "empty_turn", r"turn 1 \(user\)"),
        ({"messages": [USER | {"content": 1}, ANSWER]}, "wrong_type", r"turn 1 \(user\) is a int"),
        ({"messages": "hello"}, "wrong_type", "`messages` is a str, not a list of turns"),
        ({"conversations": ["hello"]}, "wrong_type", "turn 1 of `conversations` is a str, not an"),
        ({"instruction": ["a"], "output": "b"}, "wrong_type", "the question is a list, not a text"),
        ({"instruction": "a", "output": 5}, "wrong_type", r"turn 2 \(assistant\) is a int"),
        ({"input": ["a"], "output": "b"}, "wrong_type", "`input` is a list and `output` a str"),
        ({"instruction": "a", "output": "b", "history": "c"}, "wrong_type", "`history` is a str"),
        ({"input": ["a", "b"], "output": ["c"]}, "list_too_short", "2 questions and `output` 1"),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "list_too_short",
            r"pair 1 of `history` is not \[question, answer\]",
        ),
        (
            {"conversations": [{"from": "tool", "value": "a"}]},
            "unknown_role",
            "turn 1 of `conversations` has from, value and speaks as 'tool'; expected",
        ),
        ({"messages": [{"content": "a"}]}, "unknown_role", "has content and speaks as None"),
        ({"instruction": "a\ud83d", "output": "b"}, "invalid_unicode", r"turn 1 \(user\) holds a"),
    ],
)
def test_unusable_records_say_why(bad: object, reason: str, said: str, tmp_path: Path) -> None:
    """With the place; when they are skipped the good ones around them are still read."""
    good = {"messages": TURNS}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([good, bad, good]))
    source = InstructionSource(path=str(path), language="zh")
    with pytest.raises(DataError, match=rf"a\.json record 2: .*{said}.*data\.on_error: skip"):
        read(source, Problems("fail"))
    problems = Problems("skip")
    assert [record.messages for record in read(source, problems)] == [TURNS, TURNS]
    (dropped,) = problems.dropped
    assert dropped.reason == reason and dropped.origin == f"{path} record 2"
    shown = json.dumps(bad, ensure_ascii=False).encode("utf-8", "replace").decode()
    assert dropped.text.startswith(shown[:20])


KEYS = "messages conversations input output instruction history system role content from value"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=json_values)
def test_anything_is_a_conversation_or_a_problem(
    value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(value) + "\n")
    problems = Problems("skip")
    found = read(InstructionSource(path=str(path), language="zh"), problems)
    assert len(found) + len(problems.dropped) == 1
    for record in found:
        assert record.messages[-1]["role"] == "assistant"
        assert all(message["content"].strip() for message in record.messages)


def test_json_lines_in_chunks(tmp_path: Path) -> None:
    rows = [{"instruction": f"问{n}", "output": "答" * n} for n in range(1, 30)]
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    source = InstructionSource(path=str(path), language="zh")
    whole = read(source, Problems("fail"))
    assert [record.messages[1]["content"] for record in whole] == [row["output"] for row in rows]
    assert read(source, Problems("fail"), chunk_bytes=100) == whole
    assert len(plan_records(source, same, chunk_bytes=100)) > 5


def test_parquet_and_dataset(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"conversations": TURNS}, {"conversations": TURNS[:2]}])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    expected = [TURNS, TURNS[:2]]
    for path, form in (("a.parquet", "auto"), ("saved", "dataset")):
        source = InstructionSource(path=str(tmp_path / path), language="zh", format=form)
        assert [record.messages for record in read(source, Problems("fail"))] == expected


def test_shared_records(shared: Path) -> None:
    """Real files: Vicuna's turns in lists; Alpaca records of which a few have no answer."""
    folder = shared / "instruct"

    def counts(name: str) -> tuple[list[Record], Problems]:
        problems = Problems("skip")
        return read(InstructionSource(path=str(folder / name), language="zh"), problems), problems

    found, problems = counts("vicuna_chat_sample.jsonl")
    assert len(found) == 3 and not problems.dropped
    assert min(len(record.messages) for record in found) >= 4
    found, problems = counts("alpaca_chinese_carbonz0_00.json")
    assert len(found) + len(problems.dropped) == 10_021
    assert set(problems.counts) <= {"no_answer", "empty_turn"} and len(found) > 9_900
