"""The preview: what is trained, where an answer ends, and what cleaning and fitting did."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from altiplano.config.data import CleanSection, InstructionSource, TextSource
from altiplano.data.preview.pieces import readable_pieces
from altiplano.data.preview.preview import preview_chat, preview_text
from altiplano.data.reading.sources import is_held_out
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.bytelevel import train_byte_base
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    write_tiny_tokenizer,
)


def same(path: str) -> str:
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bytelevel_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_base(tmp_path_factory.mktemp("bytelevel"))


def flat(shown: str) -> str:
    """Output in one line: a shown line end breaks the line."""
    return shown.replace("\n", "")


def shown_chat(
    rows: list[object],
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    **settings: Any,
) -> str:
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    given = {
        "template": "vicuna",
        "system_prompt": "",
        "loss_on": "all_answers",
        "overlong": "truncate_prompt",
        "sequence_length": 64,
        "clean": CleanSection(),
        "records": 3,
    } | settings
    source = InstructionSource(path=str(tmp_path / "a.json"), language="zh")
    preview_chat([source], same, tokenizer_dir, **given)
    return flat(capsys.readouterr().out)


def shown_text(
    documents: list[str],
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    **settings: Any,
) -> str:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
    )
    source = TextSource(path=str(tmp_path / "a.jsonl"), language="zh", name="the corpus")
    given = {"records": 2, "clean": CleanSection()} | settings
    preview_text([source], same, tokenizer_dir, **given)
    return flat(capsys.readouterr().out)


def record(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def test_characters_of_several_tokens_are_shown_as_such(
    tokenizer_dir: Path, bytelevel_dir: Path
) -> None:
    vocabulary = Vocabulary(tokenizer_dir)
    ids = vocabulary.encode("小船 龘🙂\nto")
    assert readable_pieces(ids, vocabulary)[-5:] == ["龘³", "🙂⁴", "↵", "t", "o"]
    half = vocabulary.encode("龘")[-3:-1]
    assert readable_pieces(half, vocabulary) == [vocabulary.piece(id_) for id_ in half]

    vocabulary = Vocabulary(bytelevel_dir)
    shown = readable_pieces(vocabulary.encode("the river 文\n"), vocabulary)
    assert "".join(shown) == "the▁river▁文³↵"
    control = readable_pieces([vocabulary.bos_id, vocabulary.eos_id], vocabulary)
    assert control == [vocabulary.piece(vocabulary.bos_id), vocabulary.piece(vocabulary.eos_id)]


def test_trained_stretches_are_the_answers_with_their_eos(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"input": ["山上", "market"], "output": ["小船", "下雪"]}] * 4
    shown = shown_chat(records, tokenizer_dir, tmp_path, capsys)
    assert "EOS is </s> (id 2), BOS is <s> (id 1)" in shown
    assert "template vicuna, loss on all_answers, blocks of 64 tokens" in shown
    assert "a.json record 3: " in shown and "record 4" not in shown
    trained = [text.replace("│", "") for text in re.findall("⟦(.*?)⟧", shown)][1:]
    assert trained == ["▁小船</s>", "▁下雪</s>"] * 3
    shown = shown_chat(records, tokenizer_dir, tmp_path, capsys, loss_on="last_answer", records=1)
    assert shown.count("⟦") - 1 == 1 and shown.count("</s>│") == 2


def test_fates_of_long_records(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        record("山上" * 200, "小船"),
        record("山上", "小船" * 60),
        {"input": ["山上" * 24, "market"], "output": ["小船" * 12, "下雪"]},
    ]
    shown = shown_chat(records, tokenizer_dir, tmp_path, capsys)
    assert shown.count("(the prompt's middle is cut)") == 2 and "…" in shown
    assert shown.count("(NOT TRAINED: the answer leaves no room for a prompt)") == 1
    shown = shown_chat(
        records, tokenizer_dir, tmp_path, capsys, overlong="split", sequence_length=60
    )
    assert "a.json record 3 part 1 of 2: " in shown and "record 3 part 2 of 2: " in shown
    assert shown.count("(split between turns)") == 2
    shown = shown_chat(records, tokenizer_dir, tmp_path, capsys, overlong="drop")
    assert shown.count("(NOT TRAINED: longer than a block)") == 3


def test_long_sequences_are_shown_by_their_ends(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = shown_text(["下雪" + "小船，" * 1000 + "苹果"], tokenizer_dir, tmp_path, capsys)
    assert re.search(r"下雪│.* … \d+ more … .*苹果│</s>│⟧", shown)
    assert shown.count("小船") < 400


def test_cleaning_is_shown(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = CleanSection(min_characters=5, unicode="NFKC")
    texts = ["山上", "很多小船", "河流，山上有ＡＢ很多", "下雪", "市场里有很多人。"]
    shown = shown_text(texts, tokenizer_dir, tmp_path, capsys, clean=clean)
    assert "cleaned: '河流，山上有ＡＢ很多' became '河流,山上有AB很多'" in shown
    assert shown.count("cleaned: ") == 1
    assert re.search(r"the corpus: 3 left out \(\w+\), the first .*a\.jsonl", shown)

    records = [record("山上\u200b有", "a\u200bb"), "no record", record("山上", "下雪")]
    shown = shown_chat(records, tokenizer_dir, tmp_path, capsys)
    assert "cleaned 2 of 2 messages: '山上\\u200b有' became '山上有'" in shown
    assert "1 left out (not_a_record), the first" in shown and "a str is no record" in shown


def test_held_out_documents_are_not_shown(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = list(dict.fromkeys(chinese_lines(30)))
    trained = [number for number, line in enumerate(lines) if not is_held_out(line, 0.4)]
    shown = shown_text(lines, tokenizer_dir, tmp_path, capsys, held_out=0.4, records=99)
    assert shown.count(" tokens, ") == len(trained) < len(lines)


def test_shared_records_can_be_previewed(
    shared: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real turns in lists, split; every one of the parts that fit ends in EOS."""
    source = InstructionSource(
        path=str(shared / "instruct" / "vicuna_chat_sample.jsonl"), language="zh"
    )
    preview_chat(
        [source],
        same,
        tokenizer_dir,
        template="llama-2",
        system_prompt=None,
        loss_on="all_answers",
        overlong="split",
        sequence_length=1024,
        clean=CleanSection(chinese="simplified"),
        records=2,
    )
    shown = flat(capsys.readouterr().out)
    assert "part 2 of " in shown and "became" in shown
    assert shown.count("</s>│⟧") == shown.count("⟧") - 1
