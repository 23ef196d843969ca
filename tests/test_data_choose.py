"""Choosing among documents in corpus order, against a plain program that reads one by one."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.config.data import DataSection, TextSource
from altiplano.data.flow.account import summary
from altiplano.data.flow.choose import Selector
from altiplano.data.flow.parts import num_batches
from altiplano.data.flow.tokenize import Job, tokenize_text
from altiplano.data.reading.sources import is_held_out, plan_text
from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.merge import merge_sentencepiece
from tests.helpers.tiny_vocabulary import train_tiny_addition, train_tiny_base

BROKEN = "{"
RULES = DataSection(held_out=0.3, on_error="skip", clean={"min_characters": 3})


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    merged = merge_sentencepiece(train_tiny_base(directory), [train_tiny_addition(directory)])
    save_tokenizer(merged.proto, directory / "merged")
    return directory / "merged"


def one_by_one(lines: list[list[str]], caps: list[int | None]) -> dict[str, list[str]]:
    """What should become of each text: kept, held_out, and dropped by reason."""
    found: dict[str, list[str]] = {"kept": [], "held_out": [], "dropped": []}
    seen = set()
    for texts, cap in zip(lines, caps, strict=True):
        read = 0
        for text in texts:
            if read == cap:
                break
            read += text != BROKEN
            if text == BROKEN:
                found["dropped"].append("invalid_json")
            elif len(text) < 3:
                found["dropped"].append("too_short")
            elif text in seen:
                found["dropped"].append("duplicate")
            else:
                seen.add(text)
                found["held_out" if is_held_out(text, 0.3) else "kept"].append(text)
    return found


@settings(max_examples=40)
@given(
    lines=st.lists(
        st.lists(st.sampled_from([*"abcdefgh", BROKEN]), min_size=1, max_size=30),
        min_size=1,
        max_size=3,
    ),
    caps=st.lists(st.none() | st.integers(1, 20), min_size=3, max_size=3),
    chunk_bytes=st.integers(20, 400),
)
def test_every_document_is_accounted_for(
    tokenizer_dir: Path, lines: list[list[str]], caps: list[int | None], chunk_bytes: int
) -> None:
    texts = [[BROKEN if s == BROKEN else s * (ord(s) - 95) for s in some] for some in lines]
    caps = caps[: len(texts)]
    expected = one_by_one(texts, caps)
    vocabulary = Vocabulary(tokenizer_dir)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sources = []
        for number, (some, cap) in enumerate(zip(texts, caps, strict=True)):
            rows = [text if text == BROKEN else json.dumps({"text": text}) for text in some]
            path = root / f"{number}.jsonl"
            path.write_text("\n".join(rows))
            sources.append(TextSource(path=str(path), language="en", max_documents=cap))
        kept_ids = []
        with Selector(sources, RULES.clean, root) as selector:
            for source in sources:
                for chunk in plan_text(source, str, chunk_bytes=chunk_bytes):
                    outcome = tokenize_text(Job(source, chunk, RULES, str(tokenizer_dir), "", name))
                    assert outcome.error is None and outcome.part is not None
                    for index in range(num_batches(outcome.part)):
                        choice = selector.choose(source, outcome.part, index)
                        kept_ids += choice.load().sequences(choice.rows).ids.tolist()
        metrics = summary(selector.accounts)
        wanted_ids = [
            id_
            for text in expected["kept"]
            for id_ in (vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id)
        ]
        held_file = root / "held_out.en.jsonl"
        held = held_file.read_text().splitlines() if held_file.exists() else []
        quarantine = (root / "quarantine.jsonl").read_text().splitlines()
    assert kept_ids == wanted_ids
    assert [json.loads(line)["text"] for line in held] == expected["held_out"]
    assert [json.loads(line)["reason"] for line in quarantine] == expected["dropped"]
    assert metrics["documents_kept"] == len(expected["kept"])
    assert metrics["documents_held_out"] == len(expected["held_out"])
    assert metrics["documents_dropped"] == dict(Counter(expected["dropped"]))
    assert metrics["documents_read"] == sum(map(len, expected.values()))
    assert metrics["characters"] == sum(map(len, expected["kept"]))
    assert metrics["languages"]["en"]["tokens"] == len(wanted_ids)
