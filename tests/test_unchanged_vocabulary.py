"""A base whose vocabulary stays is copied until training; what contradicts that is refused."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from altiplano.artifact import open_artifact
from altiplano.config import Project, load_config
from altiplano.errors import ConfigError, ModelError
from altiplano.model.load import weights_fingerprint
from altiplano.pipeline import build_stages, run_stages, select
from tests.helpers.tiny_run import write_model
from tests.helpers.tiny_vocabulary import train_tiny_base

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer, and records."""
    from altiplano.vocabulary.convert import save_tokenizer

    place = tmp_path_factory.mktemp("unchanged")
    write_model(place / "base", vocab=320)
    save_tokenizer(train_tiny_base(place).read_bytes(), place / "base")
    return place


def project(folder: Path, **sections: Any) -> Project:
    """A config that tunes the base on instructions, with sections replaced."""
    tree = {
        "name": "kept",
        "output": "run",
        "base_model": {"path": "base", "shape": SHAPE},
        "tokenizer": {"unchanged": True},
        "data": {"instructions": [{"path": "chat.jsonl", "language": "en"}]},
        "sft": {"rows": "none", "lora": {"r": 2}},
        **sections,
    }
    file = folder / "kept.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_config(file)


def until(made: Project, last: str) -> None:
    """Run the stages up to one."""
    run_stages(made, select(build_stages(made), None, last))


def test_vocabulary_and_weights_stay(folder: Path) -> None:
    made = project(folder)
    assert [stage.name for stage in build_stages(made)] == [
        "base", "tokenizer", "extend", "data-chat", "sft", "merge", "evaluate"
    ]  # fmt: skip
    until(made, "extend")
    base, tokenizer, extend = (
        open_artifact(folder / "run" / name).manifest for name in ("base", "tokenizer", "extend")
    )
    assert tokenizer.tokenizer_fingerprint == base.tokenizer_fingerprint
    assert (extend.vocab_old, extend.vocab_new) == (base.vocab_new, base.vocab_new)
    assert extend.metrics["rows_added"] == 0
    assert weights_fingerprint(folder / "run" / "extend") == weights_fingerprint(folder / "base")
    for file in ("tokenizer.json", "tokenizer.model"):
        assert digest(folder / "run" / "extend" / file) == digest(folder / "run" / "base" / file)


def digest(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_base_of_another_shape_is_not_imported(folder: Path) -> None:
    wrong = {"path": "base", "shape": {**SHAPE, "num_hidden_layers": 3}}
    with pytest.raises(ModelError, match="num_hidden_layers is 2, not 3"):
        until(project(folder, base_model=wrong, output="wrong"), "base")


def test_a_vocabulary_of_another_size_is_refused(folder: Path) -> None:
    wrong = {"pad_piece": "[PAD]", "pieces": 320}
    with pytest.raises(ConfigError, match="has 321 pieces, `tokenizer.pieces` says 320"):
        until(project(folder, tokenizer=wrong, output="other"), "tokenizer")


def test_a_pad_piece_alone_is_an_addition(folder: Path) -> None:
    made = project(folder, tokenizer={"pad_piece": "[PAD]", "pieces": 321}, output="padded")
    until(made, "extend")
    assert open_artifact(folder / "padded" / "extend").manifest.metrics["rows_added"] == 1


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"tokenizer": {}}, "`unchanged: true`"),
        ({"tokenizer": {"unchanged": True, "vocab_size": 50}}, "drop `vocab_size`"),
        ({"tokenizer": {"unchanged": True, "pad_piece": "<p>"}}, "drop `pad_piece`"),
        ({"base_model": {"path": "base", "shape": {"vocab_size": 5}}}, "hidden_size"),
    ],
)
def test_contradictions_are_said(folder: Path, sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        project(folder, **sections)
