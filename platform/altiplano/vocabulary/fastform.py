"""What a directory says of its Hugging Face tokenizer: `tokenizer.json`, its config, its template.

Knows files, not text. Cost: 128,000 tokens parse in 0.2 s.
"""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from altiplano.errors import ArtifactError

FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_NAMES = ("unk_token", "bos_token", "eos_token", "pad_token")
"""transformers' names of the special tokens that are asked for."""


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; nothing when there is none.

    Raises:
        ArtifactError: it cannot be parsed.
    """
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not valid JSON ({error}). Make the tokenizer again, or fetch it again (a "
            "Git LFS pointer is a common cause)."
        ) from error
    return content


def open_fast(source: Path | dict[str, Any]) -> Tokenizer:
    """A tokenizer from a `tokenizer.json` or its content: control pieces in a text are text.

    Raises:
        ArtifactError: `tokenizers` cannot read it.
    """
    try:
        if isinstance(source, Path):
            fast = Tokenizer.from_file(os.fspath(source))
        else:
            fast = Tokenizer.from_str(json.dumps(source))
    except Exception as error:  # tokenizers raises bare Exception
        name = source if isinstance(source, Path) else FAST_FILE
        raise ArtifactError(
            f"{name} is not a usable tokenizer.json ({error}). Make the tokenizer again."
        ) from error
    fast.encode_special_tokens = True
    fast.no_padding()
    fast.no_truncation()
    return fast


def token_text(config: dict[str, Any], name: str) -> str | None:
    """A special token of the config: a string, or an object with `content` in older files."""
    token = config.get(name)
    return token["content"] if isinstance(token, dict) else token


def read_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template: of its own file, else of the config, which may hold several by name."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def added_token(id_: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`: taken whole out of any text, before all else."""
    return {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def is_byte_bpe(fast: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is a BPE over bytes spelled in letters (Llama-3, Qwen)."""
    model = fast.get("model", {})
    return model.get("type", "BPE") == "BPE" and "merges" in model and _has_bytelevel(fast)


def _has_bytelevel(fast: dict[str, Any]) -> bool:
    step = fast.get("pre_tokenizer") or {}
    steps = [step, *step.get("pretokenizers", [])]
    return any(step.get("type") == "ByteLevel" for step in steps)
