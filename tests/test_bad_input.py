"""Bad input: one clear message, a non-zero exit, nothing lost. Everything goes through the command.

The commands run in this process and find the session's cluster; only Ctrl-C needs one of its own.
"""

import errno
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from altiplano.artifact import open_artifact
from altiplano.config import load_config
from altiplano.stages.stage import Stage, Work, execute
from tests.helpers.command import Command, altiplano, refusal
from tests.helpers.tiny_config import training, write_imported_run
from tests.helpers.tiny_run import write_model

Spoil = Callable[[Path], Any]


@pytest.fixture
def run(tmp_path: Path, ray_cluster: dict[str, str]) -> Path:
    """Return the config of a run that would work."""
    return write_imported_run(tmp_path)


def until(stage: str, run: Path, *overrides: str) -> tuple[object, ...]:
    return ("run", run, "--until", stage, *overrides)


def put_line(file: str, number: int, line: bytes) -> Spoil:
    """Replace a line of a file (the first is 1)."""

    def spoil(folder: Path) -> None:
        lines = (folder / file).read_bytes().split(b"\n")
        lines[number - 1] = line
        (folder / file).write_bytes(b"\n".join(lines))

    return spoil


def a_directory(folder: Path) -> None:
    (folder / "zh.txt").unlink()
    (folder / "zh.txt").mkdir()


@pytest.mark.parametrize(
    ("spoil", "stage", "expected"),
    [
        (lambda f: (f / "zh.txt").unlink(), "tokenizer", ["no file at", "zh.txt"]),
        (a_directory, "tokenizer", ["zh.txt is a directory"]),
        (lambda f: (f / "zh.txt").write_text(" \n\n"), "tokenizer", ["zh.txt", "no usable text"]),
        (lambda f: (f / "en.txt").write_text(""), "data-text", ["en.txt", "no usable text"]),
        (
            lambda f: (f / "en.txt").write_bytes(b"good\n\nsnow \xff\n\ngood"),
            "data-text",
            ["en.txt: byte 11 is not UTF-8 (0xff)", "data.on_error"],
        ),
        (put_line("chat.jsonl", 3, b'{"instruction":'), "data-chat", ["chat.jsonl:3: not JSON"]),
        (
            put_line("chat.jsonl", 4, b'{"instruction": "a", "output": " "}'),
            "data-chat",
            ["chat.jsonl:4: the conversation does not end in an answer"],
        ),
        (put_line("chat.jsonl", 5, b'{"instruction": "\xc3("}'), "data-chat", ["chat.jsonl:5"]),
        (lambda f: (f / "chat.jsonl").write_text(""), "data-chat", ["no usable instruction"]),
    ],
)
def test_a_bad_corpus_is_named(run: Path, spoil: Spoil, stage: str, expected: list[str]) -> None:
    spoil(run.parent)
    message = refusal(*until(stage, run))
    assert all(words in message for words in expected), message
    assert not (run.parent / "run" / stage).exists()
    assert not list((run.parent / "run").glob("*.partial"))


def test_bad_documents_and_records_are_skipped_and_counted(run: Path) -> None:
    folder = run.parent
    (folder / "en.txt").write_bytes(b"snow \xff\n\n" + (folder / "en.txt").read_bytes())
    put_line("chat.jsonl", 3, b"{")(folder)
    put_line("chat.jsonl", 4, b'{"instruction": "a", "output": ""}')(folder)
    result = altiplano(*until("data-text", run, "data.on_error=skip"))
    assert result.exit_code == 0, result.output
    assert altiplano("data", "prepare", run, "data.on_error=skip").exit_code == 0
    text = open_artifact(folder / "run" / "data-text").manifest.metrics
    chat = open_artifact(folder / "run" / "data-chat").manifest.metrics
    assert text["documents_dropped"] == {"invalid_utf8": 1}
    assert chat["documents_dropped"] == {"invalid_json": 1, "no_answer": 1}
    assert chat["documents_kept"] == 38


def test_an_unreadable_corpus_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is simulated."""

    def denied(path: str, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("altiplano.storage.open", denied, raising=False)
    message = refusal(*until("tokenizer", run, "base_model.path=base"))
    assert "cannot read" in message and "Permission denied" in message


@pytest.mark.parametrize(
    ("override", "stage", "expected"),
    [
        ("tokenizer.vocab_size=5000", "tokenizer", ["5000", "larger than the corpus allows"]),
        ("tokenizer.vocab_sizes=50", "tokenizer", ["unknown key", "did you mean `vocab_size`"]),
        ("base_model.path=nowhere", "base", ["nowhere", "does not exist"]),
        ("data.held_out=0.49999", "none", ["no stage `none`", "data-text"]),
        ("cluster.num_workers=900", "pretrain", ["needs 900 CPU", "cluster.num_workers"]),
    ],
)
def test_a_bad_config_is_refused(run: Path, override: str, stage: str, expected: list[str]) -> None:
    message = refusal(*until(stage, run, override, "cluster.wait_s=0"))
    assert all(words in message for words in expected), message


def not_a_llama(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


def as_pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def cut_weights(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (not_a_llama, ["type 'gpt2'", "Llama"]),
        (as_pickle, ["pickle (pytorch_model.bin)", "base_model.allow_pickle"]),
        (cut_weights, ["weights of", "safetensors", "fetch them again"]),
        (lambda b: (b / "model.safetensors").unlink(), ["holds no weights"]),
        (lambda b: (b / "tokenizer.model").unlink(), ["neither", "tokenizer.model"]),
        (lambda b: (b / "tokenizer.model").write_bytes(b"\x00\x01nonsense"), ["tokenizer.model"]),
        (lambda b: (b / "config.json").unlink(), ["has no config.json"]),
        (lambda b: (b / "config.json").write_text("{"), ["config.json is not JSON"]),
    ],
)
def test_a_bad_base_model_is_refused(run: Path, spoil: Spoil, expected: list[str]) -> None:
    spoil(run.parent / "base")
    message = refusal(*until("base", run))
    assert all(words in message for words in expected), message
    assert not (run.parent / "run" / "base").exists()


def test_a_base_with_fewer_rows_than_pieces_is_refused(run: Path) -> None:
    small = write_model(run.parent / "small", vocab=300)
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(small / name, run.parent / "base" / name)
    message = refusal(*until("extend", run))
    assert "300" in message and "320" in message


def test_an_edited_artifact_is_refused_by_name(run: Path) -> None:
    assert altiplano(*until("tokenizer", run)).exit_code == 0
    with (run.parent / "run" / "tokenizer" / "tokenizer.model").open("ab") as handle:
        handle.write(b"x")
    for command in (("extend", run), ("verify", run.parent / "run" / "tokenizer")):
        message = refusal(*command)
        assert "run/tokenizer is not what stage tokenizer wrote: tokenizer.model has" in message


def test_tokens_are_verified_by_their_own_hashes_and_shown(run: Path) -> None:
    assert altiplano(*until("data-text", run)).exit_code == 0
    tokens = run.parent / "run" / "data-text"
    assert altiplano("verify", tokens).exit_code == 0
    shown = altiplano("data", "preview", run, "--records", 1)
    assert shown.exit_code == 0, shown.output
    assert "zh.txt" in shown.stdout and "chat.jsonl" in shown.stdout and "⟦" in shown.stdout


def test_a_stage_without_its_inputs_says_what_to_run(run: Path) -> None:
    message = refusal("extend", run)
    assert "run/base does not exist" in message and "run the stage that makes it" in message


# A full disk.


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_old_artifact(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert altiplano(*until("data-text", run)).exit_code == 0
    artifact = run.parent / "run" / "data-text"
    before = open_artifact(artifact).manifest
    with monkeypatch.context() as patch:
        patch.setattr("altiplano.data.tokens.store.StoreWriter.add", full)
        message = refusal(*until("data-text", run, "data.sequence_length=32"))
    assert "No space left on device" in message and "nothing finished was lost" in message
    assert open_artifact(artifact).manifest == before
    assert not list(artifact.parent.glob("*.partial"))
    assert "cached" in altiplano(*until("data-text", run)).stdout


def test_checkpoints_outlive_a_disk_that_fills_up_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = load_config(write_imported_run(tmp_path))
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()

    def train(work: Work) -> None:
        (work.output / "weights").write_text("trained")
        work.spent.append(checkpoints)

    stage = Stage("trained", "sft", "adapter", {}, train)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("altiplano.artifact._installed_versions", full)
        execute(project, stage)
    assert checkpoints.is_dir()
    execute(project, stage)
    assert not checkpoints.exists()


# Serving.


def test_a_port_in_use_is_named(tmp_path: Path, ray_cluster: dict[str, str]) -> None:
    from tests.helpers.served_run import write_served_run

    served = write_served_run(tmp_path / "served")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal("serve", served, f"serve.port={port}")
    assert f"port {port} on 127.0.0.1 is in use" in message


@pytest.mark.parametrize("target", ["nowhere", ""])
def test_what_cannot_be_served_is_named(tmp_path: Path, target: str) -> None:
    message = refusal("serve", tmp_path / target)
    assert str(tmp_path / target) in message


# Ctrl-C, and two commands in one run.


def test_ctrl_c_in_training_keeps_what_is_done(tmp_path: Path) -> None:
    stage = training(name="lora", lora={"r": 2}, steps=20_000, checkpoint_steps=10)
    run = write_imported_run(tmp_path, pretrain={"stages": [stage]})
    output = tmp_path / "run"
    with Command(tmp_path, *until("pretrain", run)) as command:
        command.wait_until(lambda: any(output.glob(".training/*/states/step-*")))
        message = refusal(*until("pretrain", run))
        assert f"process {command.pid} is writing into {output}" in message
        command.interrupt()
        assert command.exit_code() == 130, command.log
    _interrupted_cleanly(command, output)

    with Command(tmp_path, *until("pretrain", run)) as command:
        command.wait_until(lambda: "resumed after step" in command.log)
        command.interrupt()
        assert command.exit_code() == 130, command.log
    _interrupted_cleanly(command, output)


def test_ctrl_c_in_a_cheap_stage_goes_on_the_next_time(
    tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    run = write_imported_run(tmp_path)
    lines = [f"{number} " + "小船在河上。" * 40 for number in range(30_000)]
    (tmp_path / "zh.txt").write_text("\n\n".join(lines), encoding="utf-8")
    output = tmp_path / "run"
    with Command(tmp_path, *until("tokenizer", run)) as command:
        command.wait_until(lambda: (output / "tokenizer.partial").exists())
        command.interrupt()
        assert command.exit_code() == 130, command.log
    _interrupted_cleanly(command, output)
    assert not (output / "tokenizer").exists()
    shutil.copy2(tmp_path / "en.txt", tmp_path / "zh.txt")
    result = altiplano(*until("tokenizer", run))
    assert result.exit_code == 0, result.output
    assert "cached  base" in result.stdout


def _interrupted_cleanly(command: Command, output: Path) -> None:
    assert command.log.count("error: interrupted") == 1, command.log
    assert "Traceback" not in command.log, command.log
    assert not list(output.glob("*.partial"))
