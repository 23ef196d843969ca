"""Byte-level BPE bases in a moment: Llama-3's and Qwen's files around tokens trained here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from tests.helpers.tiny_vocabulary import english_lines

Family = Literal["llama3", "qwen"]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX = {"llama3": _WORDS + r"\p{N}{1,3}" + _REST, "qwen": _WORDS + r"\p{N}" + _REST}
_SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_0|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def train_byte_base(
    directory: Path,
    family: Family = "llama3",
    *,
    lines: Iterable[str] | None = None,
    vocab_size: int = 320,
) -> Path:
    """Write a base directory as that family ships it; returns it.

    Args:
        directory: made when missing.
        family: Llama-3 (BOS, `ignore_merges`, digits in threes) or Qwen (NFC, no BOS, single
            digits, an ordinary added token).
        lines: what its tokens are trained on: English, as a base would be.
        vocab_size: tokens without the special ones; 256 are the bytes.
    """
    tokenizer: Any = Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_REGEX[family]), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if family == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(english_lines() if lines is None else lines, trainer)
    tokenizer.add_special_tokens(_SPECIAL[family])
    if family == "qwen":
        tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    else:
        bos = _SPECIAL[family][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = _config(family)
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _config(family: Family) -> dict[str, Any]:
    if family == "llama3":
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": TEMPLATE,
        }
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "chat_template": TEMPLATE,
    }
