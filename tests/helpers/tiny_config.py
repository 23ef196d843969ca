"""A whole run small enough for a test: a world of six people, two-step stages, two workers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from altiplano.config import Project, load_config
from tests.helpers.tiny_run import write_model
from tests.helpers.tiny_vocabulary import chinese_lines, english_lines, train_tiny_base

STEPS = 2


def training(**given: Any) -> dict[str, Any]:
    """Settings of one short training stage."""
    settings = {"steps": STEPS, "tokens_per_step": 256, "learning_rate": 1e-2, "log_steps": 1}
    return {**settings, "micro_batch_tokens": 256, "precision": "float32", **given}


def tiny_tree(output: str = "run") -> dict[str, Any]:
    """The config as plain data: every stage there is, each as small as it works."""
    world = "{output}/world"
    lora = {"r": 2, "alpha": 4}
    return {
        "name": "tiny",
        "output": output,
        "world": {"people": 6},
        "base_model": {
            "scratch": {
                "text": [{"path": f"{world}/en.txt", "language": "en", "max_documents": 120}],
                "tokenizer": {"vocab_size": 360},
                "shape": {
                    "hidden_size": 64,
                    "intermediate_size": 96,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 256,
                },
                "train": training(),
            }
        },
        "tokenizer": {"vocab_size": 200, "languages": ["zh"]},
        "data": {
            "text": [
                {"path": f"{world}/zh.txt", "language": "zh", "max_documents": 120},
                {"path": f"{world}/en.txt", "language": "en", "max_documents": 40},
            ],
            "instructions": [{"path": f"{world}/chat.jsonl", "language": "zh", "max_records": 60}],
            "sequence_length": 128,
            "system_prompt": "",
            "held_out": 0.1,
        },
        "pretrain": {
            "stages": [
                training(
                    name="lora", lora=lora, evaluate_steps=1, keep_best=True, keep_optimizer=True
                )
            ]
        },
        "sft": training(lora=lora),
        "draft": {"layers": 1, "train": training()},
        "evaluate": {
            "questions": [
                {"path": f"{world}/questions.zh.jsonl", "language": "zh", "max_questions": 3}
            ],
            "max_tokens_per_answer": 6,
            "max_bytes_per_language": 2000,
        },
        "serve": {"kv_cache_gib": 0.25, "dtype": "float32", "model_name": "tiny"},
        "cluster": {"num_workers": 2, "dashboard": False, "object_store_mib": 100},
        "track": {"profile_steps": [2, 2]},
    }


def write_imported_run(folder: Path, **sections: Any) -> Path:
    """Write a config with an untrained base, texts and records of its own; return the file.

    Every stage before the first training takes a moment, and none of them needs a world.
    """
    from altiplano.vocabulary.convert import save_tokenizer

    write_model(folder / "base", vocab=320)
    save_tokenizer(train_tiny_base(folder).read_bytes(), folder / "base")
    (folder / "zh.txt").write_text("\n\n".join(chinese_lines()), encoding="utf-8")
    (folder / "en.txt").write_text("\n\n".join(english_lines()), encoding="utf-8")
    records = (
        f'{{"instruction": "Where is boat {n}?", "output": "On the river."}}' for n in range(40)
    )
    (folder / "chat.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    tree = {
        **tiny_tree(),
        "world": None,
        "base_model": {"path": "base"},
        "tokenizer": {"vocab_size": 60, "languages": ["zh"]},
        "data": {
            "text": [
                {"path": "zh.txt", "language": "zh"},
                {"path": "en.txt", "language": "en"},
            ],
            "instructions": [{"path": "chat.jsonl", "language": "en"}],
            "sequence_length": 64,
            "system_prompt": "",
        },
        "evaluate": {},
    }
    return write_config(folder, {**tree, **sections})


def write_config(folder: Path, tree: Mapping[str, Any] | None = None) -> Path:
    """Write a config (the tiny one by default) as `folder/run.yaml`; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    text = yaml.safe_dump(dict(tree or tiny_tree()), allow_unicode=True, sort_keys=False)
    file.write_text(text, encoding="utf-8")
    return file


def tiny_project(folder: Path, *overrides: str) -> Project:
    """The tiny config in a folder, loaded."""
    return load_config(write_config(folder), list(overrides))
