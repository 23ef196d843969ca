"""Vocabularies trained in a moment from sentences made by code: no foreign text is needed."""

import random
from pathlib import Path

from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.train import train_sentencepiece

_ENGLISH = ("the river", "a small boat", "runs", "to", "mountain", "market", "under", "snow")
_CHINESE = ("河流", "小船", "山上", "下雪", "市场里", "有", "很多", "人", "和", "苹果", "。", "，")


HARD_TEXTS = [
    "a  b   c",
    " leading",
    "line\n\nline\n",
    "\ttab",
    "雪山上的小船",
    "龘𠮷 Ａ１",
    "👩‍👩‍👧 é e\u0301",
    "▁ ▁",
]
"""Texts that tokenizers and their fast forms tend to disagree on."""


def english_lines(count: int = 200, seed: int = 0) -> list[str]:
    """Lines of six English words or phrases."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_ENGLISH, k=6)) + "." for _ in range(count)]


def chinese_lines(count: int = 200, seed: int = 0) -> list[str]:
    """Lines of eight Chinese words."""
    rng = random.Random(seed)
    return ["".join(rng.choices(_CHINESE, k=8)) for _ in range(count)]


def train_tiny_base(directory: Path) -> Path:
    """A LLaMA-style English base of 320 pieces."""
    output = directory / "base.model"
    train_sentencepiece(english_lines(), vocab_size=320, output=output, purpose="base")
    return output


def train_tiny_addition(directory: Path) -> Path:
    """A Chinese addition of 60 pieces."""
    output = directory / "addition.model"
    train_sentencepiece(chinese_lines(), vocab_size=60, output=output)
    return output


def write_tiny_tokenizer(directory: Path) -> Path:
    """The directory of the tiny base with the tiny addition merged in."""
    merged = merge_sentencepiece(train_tiny_base(directory), [train_tiny_addition(directory)])
    save_tokenizer(merged.proto, directory / "merged")
    return directory / "merged"
