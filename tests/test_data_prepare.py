"""Preparing data on a Ray cluster: the same bytes however it is split, and counts that add up."""

import json
from pathlib import Path

import numpy as np
import pytest

from altiplano.config.schema import InstructionSource, TextSource
from altiplano.data import chat
from altiplano.data.prepare import TEMPLATE_FILE, prepare_chat, prepare_text
from altiplano.data.preview import preview_chat, preview_text
from altiplano.data.sources import is_held_out
from altiplano.data.store import TokenStore
from altiplano.errors import DataError
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    train_tiny_addition,
    train_tiny_base,
)

Corpus = dict[str, list[str]]


def same(path: str) -> str:
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    merged = merge_sentencepiece(train_tiny_base(directory), [train_tiny_addition(directory)])
    save_tokenizer(merged.proto, directory / "merged")
    return directory / "merged"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return {
        "en": list(dict.fromkeys(english_lines(150))),
        "zh": list(dict.fromkeys(chinese_lines(150))),
    }


@pytest.fixture(scope="module")
def text_sources(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[TextSource]:
    directory = tmp_path_factory.mktemp("corpus")
    for language, lines in corpus.items():
        (directory / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return [
        TextSource(path=str(directory / f"{language}.txt"), language=language, format="lines")
        for language in corpus
    ]


def files_of(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def run_text(
    sources: list[TextSource], tokenizer_dir: Path, output: Path, **settings: object
) -> dict[str, object]:
    output.mkdir(exist_ok=True)
    given = {"sequence_length": 32, "held_out": 0.1, "on_error": "fail"} | settings
    return prepare_text(sources, same, tokenizer_dir, output=output, **given)


def run_chat(
    records: list[object], tokenizer_dir: Path, output: Path, **settings: object
) -> dict[str, object]:
    output.mkdir(exist_ok=True)
    source = output.with_suffix(".json")
    source.write_text(json.dumps(records), encoding="utf-8")
    given = {
        "template": "llama-2",
        "system_prompt": "",
        "sequence_length": 64,
        "overlong": "truncate_prompt",
        "on_error": "fail",
    } | settings
    sources = [InstructionSource(path=str(source), language="zh")]
    return prepare_chat(sources, same, tokenizer_dir, output=output, **given)


def test_text_becomes_blocks_without_loss(
    text_sources: list[TextSource],
    corpus: Corpus,
    tokenizer_dir: Path,
    tmp_path: Path,
    ray_cluster: object,
) -> None:
    metrics = run_text(text_sources, tokenizer_dir, tmp_path)
    vocabulary = Vocabulary(tokenizer_dir)
    train = {
        language: [line for line in lines if not is_held_out(line, 0.1)]
        for language, lines in corpus.items()
    }
    expected = [
        [vocabulary.bos_id, *vocabulary.encode(line), vocabulary.eos_id]
        for line in train["en"] + train["zh"]
    ]
    store = TokenStore.open(tmp_path / "train")
    batch = store.batch(np.arange(store.num_blocks))
    ids = batch.input_ids[batch.segment_ids > 0]
    assert ids.tolist() == [id_ for document in expected for id_ in document]
    assert metrics["tokens"] == store.num_tokens == len(ids)
    assert metrics["targets"] == store.num_targets
    assert metrics["blocks"] == store.num_blocks

    held = {
        language: (tmp_path / f"held_out.{language}.jsonl").read_text().splitlines()
        for language in corpus
    }
    for language, lines in corpus.items():
        texts = [json.loads(line)["text"] for line in held[language]]
        assert texts and sorted(texts + train[language]) == sorted(lines)
        assert metrics["languages"][language]["documents"] == len(train[language])
        assert metrics["languages"][language]["characters"] == sum(map(len, train[language]))
    assert metrics["documents_read"] == sum(map(len, corpus.values()))
    assert metrics["documents_kept"] == sum(map(len, train.values()))
    assert metrics["documents_held_out"] == sum(map(len, held.values()))


def test_same_bytes_whatever_the_parallelism(
    text_sources: list[TextSource], tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    """One Ray block of everything, and about thirty of a few lines each."""
    metrics = [
        run_text(text_sources, tokenizer_dir, tmp_path / str(size), characters_per_block=size)
        for size in (1 << 20, 300)
    ]
    assert metrics[0] == metrics[1]
    one, many = files_of(tmp_path / str(1 << 20)), files_of(tmp_path / "300")
    assert set(one) == {
        "held_out.en.jsonl",
        "held_out.zh.jsonl",
        *(f"train/{name}" for name in ("index.json", "loss.bin", "segments.bin", "tokens.bin")),
    }
    assert one == many


def test_skipped_documents_add_up(tokenizer_dir: Path, tmp_path: Path, ray_cluster: object) -> None:
    rows = [json.dumps({"text": line}) for line in chinese_lines(40)]
    rows[3], rows[20], rows[30] = "{", '{"body": 1}', '{"text": "\\ud83d"}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = TextSource(path=str(tmp_path / "a.jsonl"), language="zh")
    metrics = run_text([source], tokenizer_dir, tmp_path / "out", on_error="skip", held_out=0.2)
    assert metrics["documents_dropped"] == {"invalid_json": 1, "invalid_unicode": 1, "no_text": 1}
    assert metrics["documents_read"] == 40
    assert metrics["documents_kept"] + metrics["documents_held_out"] + 3 == 40
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        run_text([source], tokenizer_dir, tmp_path / "out")


def test_nothing_left_to_train_on(tokenizer_dir: Path, tmp_path: Path, ray_cluster: object) -> None:
    line = next(line for line in chinese_lines() if is_held_out(line, 0.4))
    (tmp_path / "a.txt").write_text(line, encoding="utf-8")
    source = TextSource(path=str(tmp_path / "a.txt"), language="zh")
    with pytest.raises(DataError, match=r"no document is left to train on \(1 held out\)"):
        run_text([source], tokenizer_dir, tmp_path / "out", held_out=0.4)


def chat_records() -> list[object]:
    pairs = zip(chinese_lines(60), chinese_lines(60, seed=1), strict=True)
    return [{"instruction": question, "output": answer} for question, answer in pairs]


def test_records_are_whole_in_the_store(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    metrics = run_chat(chat_records(), tokenizer_dir, tmp_path / "a")
    vocabulary = Vocabulary(tokenizer_dir)
    store = TokenStore.open(tmp_path / "a" / "train")
    batch = store.batch(np.arange(store.num_blocks))
    found = []
    for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
        found += [tuple(ids[segments == number]) for number in range(1, segments.max() + 1)]
    expected = []
    for record in chat_records():
        messages = [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        ]
        tokens = chat.encode_spans(chat.render(messages, "llama-2"), vocabulary)
        expected.append(tuple(tokens.ids))
    assert sorted(found) == sorted(expected)
    assert metrics["documents_kept"] == 60
    assert metrics["fill_rate"] > 0.7
    # Every answer's EOS is learnt: as many EOS labels as records.
    assert (batch.labels == vocabulary.eos_id).sum() == 60
    stored = (tmp_path / "a" / TEMPLATE_FILE).read_text(encoding="utf-8")
    assert stored == chat.jinja_template("llama-2", "", vocabulary.control_pieces)


def test_chat_has_the_same_bytes_whatever_the_parallelism(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    metrics = [
        run_chat(chat_records(), tokenizer_dir, tmp_path / name, characters_per_block=size)
        for name, size in (("one", 1 << 20), ("many", 500))
    ]
    assert metrics[0] == metrics[1]
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


def test_overlong_records(tokenizer_dir: Path, tmp_path: Path, ray_cluster: object) -> None:
    records = [
        *chat_records(),
        {"instruction": "河流" * 200, "output": "苹果。"},
        {"instruction": "河流", "output": "苹果。" * 200},
    ]
    cut = run_chat(records, tokenizer_dir, tmp_path / "cut")
    assert cut["prompts_truncated"] == 1
    assert cut["documents_dropped"] == {"answer_too_long": 1}
    assert cut["documents_kept"] == 61
    dropped = run_chat(records, tokenizer_dir, tmp_path / "drop", overlong="drop")
    assert dropped["documents_dropped"] == {"too_long": 2}
    assert dropped["documents_read"] == 62
    with pytest.raises(DataError, match=r"record 61: the record has \d+ tokens, a block has 64"):
        run_chat(records, tokenizer_dir, tmp_path / "fail", overlong="fail")
    with pytest.raises(DataError, match="no record is left"):
        run_chat(records[-1:], tokenizer_dir, tmp_path / "none")


def test_preview_shows_pieces_and_eos(
    text_sources: list[TextSource],
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preview_text(text_sources, same, tokenizer_dir, records=2)
    shown = capsys.readouterr().out
    assert "EOS is </s> (id 2)" in shown
    assert shown.count("tokens, ") == 4
    (tmp_path / "a.json").write_text(json.dumps(chat_records()), encoding="utf-8")
    preview_chat(
        [InstructionSource(path=str(tmp_path / "a.json"), language="zh")],
        same,
        tokenizer_dir,
        template="llama-2",
        system_prompt="",
        records=3,
    )
    shown = capsys.readouterr().out
    assert shown.count("</s>│") == 3
    assert "record 3" in shown and "record 4" not in shown
