"""The command line: every verb and option of the contract, exit codes, the tokenizer tools."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from altiplano.vocabulary.load import Vocabulary
from tests.helpers.bytelevel import train_byte_base
from tests.helpers.command import altiplano, refusal
from tests.helpers.tiny_config import write_config
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    train_tiny_addition,
    train_tiny_base,
)

REFERENCE = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
REFERENCE_WITH_PAD = "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", ["CONFIG", "--from", "--until", "--dry-run", "--address", "OVERRIDES"]),
        (
            "tokenizer train",
            [
                "--input",
                "--vocab-size",
                "--output",
                "--base",
                "--text-key",
                "--model-type",
                "--character-coverage",
                "--normalization",
                "--no-split-digits",
                "--max-piece-length",
                "--words",
                "--max-lines",
                "--seed",
            ],
        ),
        (
            "tokenizer merge",
            [
                "--base",
                "--add",
                "--scores",
                "--pad-piece",
                "--output",
                "--keep",
                "--drop",
                "--min-count",
                "--text",
                "--words",
            ],
        ),
        ("tokenizer report", ["TOKENIZERS", "--text", "--bytes", "--json", "--plot"]),
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


def test_the_filters_of_a_merge_reach_it(tmp_path: Path) -> None:
    zh, terms = tmp_path / "zh.txt", tmp_path / "terms.txt"
    zh.write_text("\n\n".join(chinese_lines()), encoding="utf-8")
    terms.write_text("河流小船\n", encoding="utf-8")
    base, addition = train_tiny_base(tmp_path), train_tiny_addition(tmp_path)
    merge = ("tokenizer", "merge", "--base", base, "--add", addition, "--text", zh)

    every = altiplano(*merge, "--output", tmp_path / "every", "--words", terms)
    frequent = altiplano(*merge, "--output", tmp_path / "frequent", "--min-count", 100)
    assert every.exit_code == frequent.exit_code == 0, every.output + frequent.output
    assert "words 1" in every.stdout and "pruned" not in every.stdout
    assert "pruned" in frequent.stdout and "tokens per character" in frequent.stdout
    whole, fewer = Vocabulary(tmp_path / "every"), Vocabulary(tmp_path / "frequent")
    pieces = [whole.piece(id_) for id_ in whole.encode("有河流小船")]
    assert "河流小船" in pieces
    assert 320 < fewer.size < whole.size


def test_reference_scores_say_how_far_the_forms_differ(tmp_path: Path) -> None:
    zh = tmp_path / "zh.txt"
    zh.write_text("\n\n".join(chinese_lines(20)), encoding="utf-8")
    base, addition = train_tiny_base(tmp_path), train_tiny_addition(tmp_path)
    merge = ("tokenizer", "merge", "--scores", "reference", "--base", base, "--add", addition)
    assert "--text FILE counts" in altiplano(*merge, "--output", tmp_path / "a").stdout
    told = altiplano(*merge, "--output", tmp_path / "b", "--text", zh)
    assert "of 20 lines" in told.stdout, told.output


def test_a_byte_level_base_is_extended_at_once(tmp_path: Path) -> None:
    zh, en = tmp_path / "zh.jsonl", tmp_path / "en.txt"
    lines = [json.dumps({"body": line}, ensure_ascii=False) for line in chinese_lines()]
    zh.write_text("\n".join(lines), encoding="utf-8")
    en.write_text("\n".join(english_lines()), encoding="utf-8")
    base = train_byte_base(tmp_path / "base")
    made = altiplano(
        "tokenizer", "train", "--input", zh, "--text-key", "body", "--base", base,
        "--vocab-size", 60, "--output", tmp_path / "grown",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert " new pieces = " in made.stdout and "tokens per character" in made.stdout
    told = altiplano(
        "tokenizer", "report", f"old={base}", f"new={tmp_path / 'grown'}", "--text", f"en={en}",
        "--text", f"zh={zh}", "--text-key", "body", "--json", tmp_path / "report.json",
        "--plot", tmp_path / "report.png",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "200 of 200" in told.stdout
    coverage = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["coverage"]
    assert coverage["en"]["new"]["lines_as_first"] == 200
    assert coverage["zh"]["new"]["tokens"] < coverage["zh"]["old"]["tokens"] / 2
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


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
    assert "give --text" in refusal(*merge, base, "--add", base, "--min-count", 2)
    assert "--keep" in refusal(*merge, base, "--add", base, "--keep", "latin")
    assert "drop `keep`" in refusal(
        *merge, base, "--add", base, "--scores", "reference", "--keep", "cjk"
    )
    assert "tokenizer merge" in refusal(*train, 60, "--input", zh, "--min-count", 2)
    assert "no directory of a byte-level BPE" in refusal(*train, 60, "--input", zh, "--base", base)
    assert "two are called base.model" in refusal("tokenizer", "report", base, base, "--text", zh)
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
    assert f" = {size}\n" in result.stdout and sha256 in result.stdout


def test_verify_recomputes_and_names_what_differs(tmp_path: Path) -> None:
    from altiplano.artifact import Manifest, write_artifact

    for name in ("good", "bad"):
        with write_artifact(tmp_path / name, Manifest("world", name, {}, {})) as folder:
            (folder / "a.txt").write_text("a")
    assert altiplano("verify", tmp_path / "good").exit_code == 0
    (tmp_path / "bad" / "a.txt").write_text("b")
    message = refusal("verify", tmp_path / "good", tmp_path / "bad", tmp_path / "none")
    assert "a.txt was changed" in message and "none does not exist" in message
