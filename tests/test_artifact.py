"""Artifacts: whole or refused by name; caching by content; mismatches name both sides."""

import json
from pathlib import Path

import pytest

from altiplano.artifact import (
    Manifest,
    open_artifact,
    require_same_tokenizer,
    require_same_weights,
    write_artifact,
)
from altiplano.errors import ArtifactError, MismatchError


def make(path: Path, text: str = "hello", kind: str = "tokens") -> Manifest:
    manifest = Manifest(kind, path.name, {"a": 1}, {})
    with write_artifact(path, manifest) as folder:
        (folder / "data.txt").write_text(text)
        (folder / "logs").mkdir()
        (folder / "logs" / "log.txt").write_text("seen")
    return manifest


def test_a_written_artifact_opens_with_its_manifest(tmp_path: Path) -> None:
    written = make(tmp_path / "a")
    opened = open_artifact(tmp_path / "a", "tokens").manifest
    assert opened == written
    assert opened.files["data.txt"]["bytes"] == 5
    assert opened.versions["altiplano"]


def test_the_fingerprint_is_of_content_without_logs(tmp_path: Path) -> None:
    first, same = make(tmp_path / "a"), make(tmp_path / "b")
    (tmp_path / "c").mkdir()
    other = make(tmp_path / "c" / "a", "hullo")
    assert first.fingerprint == same.fingerprint != other.fingerprint
    files = {name: value for name, value in first.files.items() if not name.startswith("logs")}
    assert Manifest("tokens", "a", {}, {}, files=files).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda a: (a / "data.txt").write_text("hellO"), "data.txt was changed"),
        (lambda a: (a / "data.txt").write_text("hell"), "data.txt has 4 bytes, expected 5"),
        (lambda a: (a / "data.txt").unlink(), "data.txt is missing"),
        (lambda a: (a / "manifest.json").write_text("{"), "cannot be read"),
        (lambda a: (a / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda a: (a / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_spoiled_artifacts_are_refused_by_name(tmp_path: Path, spoil, expected: str) -> None:
    make(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "a")
    assert expected in str(caught.value) and str(tmp_path / "a") in str(caught.value)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99"):
        open_artifact(tmp_path / "a")


def test_a_failed_write_leaves_the_old_artifact(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    with (
        pytest.raises(OSError, match="disk"),
        write_artifact(tmp_path / "a", Manifest("tokens", "a", {}, {})) as folder,
    ):
        (folder / "data.txt").write_text("new")
        raise OSError("disk full")
    open_artifact(tmp_path / "a")
    assert (tmp_path / "a" / "data.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_half_written_artifact_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    with pytest.raises(ArtifactError, match=r"a\.partial is half-written"):
        open_artifact(tmp_path / "a")


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", kind="adapter")
    with pytest.raises(ArtifactError, match="kind adapter, model is needed"):
        open_artifact(tmp_path / "a", "model")


def test_mismatches_name_both_sides_and_the_mend() -> None:
    left = Manifest("model", "a", {}, {}, tokenizer_fingerprint="1" * 64, vocab_new=49954)
    right = Manifest("model", "b", {}, {}, tokenizer_fingerprint="2" * 64, vocab_new=32000)
    require_same_tokenizer(("model", left), ("same", left))
    with pytest.raises(MismatchError) as caught:
        require_same_tokenizer(("adapter x", left), ("model y", right))
    for part in ("adapter x", "model y", "1" * 16, "2" * 16, "49954", "32000", "altiplano run"):
        assert part in str(caught.value)


def test_an_adapter_of_another_model_is_refused() -> None:
    model = Manifest("model", "m", {}, {}, weights_fingerprint="a" * 64)
    adapter = Manifest("adapter", "x", {}, {}, metrics={"base_weights_fingerprint": "b" * 64})
    with pytest.raises(MismatchError) as caught:
        require_same_weights(("adapter x", adapter), ("model m", model))
    assert "a" * 16 in str(caught.value) and "b" * 16 in str(caught.value)
