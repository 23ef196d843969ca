"""The command line: every verb and option of the contract, exit codes, the tokenizer tools."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from altiplano.cli import app
from tests.helpers.tiny_config import write_config
from tests.helpers.tiny_vocabulary import chinese_lines, english_lines, train_tiny_base

REFERENCE = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
REFERENCE_WITH_PAD = "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"


def altiplano(*arguments: object) -> Result:
    """Run one command in this process."""
    wide = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"}
    return CliRunner(env=wide).invoke(app, [str(word) for word in arguments])


def refusal(*arguments: object) -> str:
    """What a command that must fail says: one message, no traceback."""
    result = altiplano(*arguments)
    assert result.exit_code == 1, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in result.output, result.output
    return result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", ["CONFIG", "--from", "--until", "--dry-run", "--address", "OVERRIDES"]),
        ("tokenizer train", ["--input", "--vocab-size", "--output"]),
        ("tokenizer merge", ["--base", "--add", "--scores", "--pad-piece", "--output"]),
        ("tokenizer report", ["TOKENIZERS", "--text"]),
        ("data prepare", ["CONFIG", "OVERRIDES"]),
        ("data preview", ["CONFIG", "OVERRIDES"]),
        *[
            (verb, ["CONFIG", "OVERRIDES", "--address"])
            for verb in ("extend", "pretrain", "sft", "merge", "draft", "evaluate")
        ],
        ("serve", ["TARGET", "OVERRIDES", "--address"]),
        ("verify", ["ARTIFACTS"]),
        ("plan", ["CONFIG", "--json"]),
        ("chat", ["--url"]),
    ],
)
def test_the_contract_of_verbs(command: str, words: list[str]) -> None:
    result = altiplano(*command.split(), "--help")
    assert result.exit_code == 0
    missing = [word for word in words if word.lower() not in result.stdout.lower()]
    assert not missing, result.stdout


def test_help_loads_nothing_heavy() -> None:
    """What makes --help quick; a time would only measure the machine."""
    code = (
        "import sys; from altiplano.cli import app; app(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'pyarrow', 'sentencepiece', 'matplotlib'}"
        "; sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_usage_exits_with_2() -> None:
    assert altiplano("nonsense").exit_code == 2
    assert altiplano("run").exit_code == 2
    assert altiplano("tokenizer", "train", "--vocab-size", "many").exit_code == 2


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    result = altiplano("run", file, "--dry-run", "sft.steps=7", "--until", "sft")
    assert result.exit_code == 0, result.output
    for stage in ("world", "base-tokenizer", "data-text", "pretrain-lora", "sft"):
        assert stage in result.stdout
    assert "not made yet" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_plan_can_be_read_by_machines(tmp_path: Path) -> None:
    result = altiplano("plan", write_config(tmp_path), "--json")
    assert result.exit_code == 0
    stages = {stage["name"]: stage for stage in json.loads(result.stdout)["stages"]}
    assert {"base", "pretrain-lora", "sft", "draft"} <= set(stages)


def test_stages_are_selected_by_name(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    assert "no stage `nonsense`" in refusal("run", file, "--from", "nonsense")
    message = refusal("run", file, "--from", "sft", "--until", "base")
    assert "--from sft" in message and "--until base" in message


def test_a_verb_without_its_section_says_so(tmp_path: Path) -> None:
    message = refusal("draft", write_config(tmp_path), "draft=null")
    assert "no `draft` section" in message


def test_tokenizers_are_trained_merged_and_compared(tmp_path: Path) -> None:
    zh, en = tmp_path / "zh.txt", tmp_path / "en.txt"
    zh.write_text("\n\n".join(chinese_lines()), encoding="utf-8")
    en.write_text("\n\n".join(english_lines()), encoding="utf-8")
    trained, merged = tmp_path / "trained", tmp_path / "merged"
    base = train_tiny_base(tmp_path)

    made = altiplano("tokenizer", "train", "--input", zh, "--vocab-size", 60, "--output", trained)
    assert made.exit_code == 0, made.output
    done = altiplano(
        "tokenizer", "merge", "--base", base, "--add", trained / "trained.model", "--output", merged
    )
    assert done.exit_code == 0, done.output
    assert "320 + " in done.stdout and "sha256 " in done.stdout
    assert {"tokenizer.model", "tokenizer.json"} <= {path.name for path in merged.iterdir()}
    told = altiplano("tokenizer", "report", base, merged, "--text", zh, "--text", en)
    assert told.exit_code == 0, told.output
    assert "zh.txt" in told.stdout and "en.txt" in told.stdout

    again = refusal("tokenizer", "merge", "--base", base, "--add", base, "--output", merged)
    assert f"{merged} exists" in again
    assert not list(tmp_path.glob("*.partial"))


def test_tokenizer_commands_refuse_what_they_cannot_use(tmp_path: Path) -> None:
    base, output = train_tiny_base(tmp_path), tmp_path / "out"
    zh = tmp_path / "zh.txt"
    zh.write_text("\n\n".join(chinese_lines(20)), encoding="utf-8")
    train = ("tokenizer", "train", "--output", output, "--vocab-size")
    merge = ("tokenizer", "merge", "--output", output, "--base")

    assert "no file at" in refusal(*train, 60, "--input", tmp_path / "none.txt")
    assert "larger than the corpus allows" in refusal(*train, 5000, "--input", zh)
    assert "--model-type" in refusal(*train, 60, "--input", zh, "--model-type", "words")
    assert "--scores" in refusal(*merge, base, "--add", base, "--scores", "equal")
    assert "none.model" in refusal(*merge, base, "--add", tmp_path / "none.model")
    assert "zh.txt" in refusal(*merge, base, "--add", zh)
    assert "latin.txt" in refusal("tokenizer", "report", base, "--text", _latin1(tmp_path))
    assert not output.exists() and not list(tmp_path.glob("*.partial"))


def _latin1(folder: Path) -> Path:
    file = folder / "latin.txt"
    file.write_bytes("café".encode("latin-1"))
    return file


@pytest.mark.parametrize(
    ("pad", "size", "sha256"), [([], 49953, REFERENCE), (["[PAD]"], 49954, REFERENCE_WITH_PAD)]
)
def test_the_reference_merge_is_reproduced(
    shared: Path, tmp_path: Path, pad: list[str], size: int, sha256: str
) -> None:
    base = shared / "tokenizers" / "llama_32000.model"
    addition = shared / "tokenizers" / "chinese_sp_20000.model"
    words = [word for piece in pad for word in ("--pad-piece", piece)]
    result = altiplano(
        "tokenizer", "merge", "--scores", "reference", "--base", base, "--add", addition, *words,
        "--output", tmp_path / "merged",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"= {size} " in result.stdout and sha256 in result.stdout


def test_verify_recomputes_and_names_what_differs(tmp_path: Path) -> None:
    from altiplano.artifact import Manifest, write_artifact

    for name in ("good", "bad"):
        with write_artifact(tmp_path / name, Manifest("world", name, {}, {})) as folder:
            (folder / "a.txt").write_text("a")
    assert altiplano("verify", tmp_path / "good").exit_code == 0
    (tmp_path / "bad" / "a.txt").write_text("b")
    message = refusal("verify", tmp_path / "good", tmp_path / "bad", tmp_path / "none")
    assert "a.txt was changed" in message and "none does not exist" in message
