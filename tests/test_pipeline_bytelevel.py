"""The line on a byte-level BPE base (Llama-3's kind): tokenizer to merged model."""

import json
from pathlib import Path
from typing import Any

import pytest

from altiplano.artifact import open_artifact
from altiplano.config import Project, load_config
from altiplano.pipeline import build_stages, run_stages
from altiplano.stages.stage import artifact_path
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.bytelevel import Family, train_byte_base
from tests.helpers.tiny_config import tiny_tree, training, write_config
from tests.helpers.tiny_run import write_model
from tests.helpers.tiny_vocabulary import chinese_lines, english_lines

SPARE_ROWS = 24
"""Rows beyond the pieces, as Qwen's checkpoints have."""


def write_run(folder: Path, family: Family) -> Path:
    """A config whose base has a byte-level vocabulary and random weights."""
    base = folder / "base"
    write_model(base, vocab=400)
    train_byte_base(base, family)
    size = Vocabulary(base).size
    config = json.loads((base / "config.json").read_text())
    assert config["vocab_size"] >= size + SPARE_ROWS
    (folder / "zh.txt").write_text("\n\n".join(chinese_lines()), encoding="utf-8")
    (folder / "en.txt").write_text("\n\n".join(english_lines()), encoding="utf-8")
    record = {"instruction": "小船在哪里？", "output": "在河流上。"}
    lines = "".join(json.dumps(record | {"input": str(n)}) + "\n" for n in range(40))
    (folder / "chat.jsonl").write_text(lines, encoding="utf-8")
    lora: dict[str, Any] = {"r": 2, "alpha": 4}
    tree = {
        **tiny_tree(),
        "world": None,
        "base_model": {"path": "base"},
        "tokenizer": {"vocab_size": 60, "languages": ["zh"], "keep": "cjk", "min_count": 5},
        "extend": {"pad_to_multiple": 32},
        "data": {
            "text": [{"path": "zh.txt", "language": "zh"}],
            "replay": {"text": [{"path": "en.txt", "language": "en"}], "share": 0.2},
            "instructions": [{"path": "chat.jsonl", "language": "zh"}],
            "template": "chatml",
            "sequence_length": 64,
        },
        "pretrain": {"stages": [training(name="lora", lora=lora)]},
        "sft": training(lora=lora),
        "draft": {"layers": 1, "train": training()},
        "evaluate": {"prompts": ["小船在哪里？"], "max_tokens_per_answer": 4},
    }
    return write_config(folder, tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, str]) -> Project:
    """Run every stage once."""
    project = load_config(write_run(tmp_path_factory.mktemp("run"), "llama3"))
    run_stages(project, build_stages(project))
    return project


def test_new_pieces_follow_the_old_and_english_stays(finished: Project) -> None:
    metrics = open_artifact(artifact_path(finished, "tokenizer")).manifest.metrics
    old, new = (Vocabulary(artifact_path(finished, name)) for name in ("base", "tokenizer"))
    assert new.family == "bytelevel" and new.size > old.size
    assert [new.piece(i) for i in range(old.size)] == [old.piece(i) for i in range(old.size)]
    assert metrics["tokens_per_character_new"] < metrics["tokens_per_character_old"] / 2, metrics
    assert metrics["other_lines"] > 0 and metrics["other_lines_changed"] == 0


def test_padding_rows_end_with_the_merge(finished: Project) -> None:
    pieces = Vocabulary(artifact_path(finished, "tokenizer")).size
    rows = {
        name: json.loads((artifact_path(finished, name) / "config.json").read_text())["vocab_size"]
        for name in ("extend", "merge", "draft")
    }
    assert rows["extend"] % 32 == 0 and rows["extend"] >= pieces
    assert rows["merge"] == rows["draft"] == pieces
    manifest = open_artifact(artifact_path(finished, "extend")).manifest
    assert manifest.vocab_new == pieces


def test_the_merged_model_is_served_the_ids_it_was_trained_on(finished: Project) -> None:
    from transformers import AutoTokenizer

    merged = artifact_path(finished, "merge")
    served, trained = AutoTokenizer.from_pretrained(merged), Vocabulary(merged)
    for text in (*chinese_lines(5), *english_lines(5), "雪 river 🏔️ naïve"):
        ids = served.encode(text, add_special_tokens=False)
        assert ids == trained.encode(text)
        assert served.decode(ids) == text
    prompt = served.apply_chat_template(
        [{"role": "user", "content": "小船在哪里？"}], tokenize=False, add_generation_prompt=True
    )
    assert "小船在哪里？" in prompt


def test_replay_has_its_share(finished: Project) -> None:
    metrics = open_artifact(artifact_path(finished, "data-text")).manifest.metrics
    languages = metrics["languages"].items()
    tokens = {name: counts["stored_tokens"] for name, counts in languages}
    assert tokens["en"] / sum(tokens.values()) == pytest.approx(0.2, abs=0.03)
    assert sum(tokens.values()) == metrics["tokens"]
