"""Corpus and tokenizer of the data benchmarks, made of the shared real data.

Lines of about 500 bytes, as web corpora have them, of three Chinese books and the CMRC paragraphs,
repeated until the size is reached; a number in front makes every copy a document of its own.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from altiplano.vocabulary.convert import save_tokenizer
from altiplano.vocabulary.merge import merge_sentencepiece
from altiplano.vocabulary.train import train_sentencepiece

_BOOKS = ("hongloumeng.txt", "sanguoyanyi.txt", "luxun_quanji.txt")
_LINE_BYTES = 500
_SENTENCE = re.compile(r"[^。！？]*[。！？]?")


def write_corpus(shared: Path, path: Path, megabytes: float) -> int:
    """Write a text file of about so many MB (10^6 bytes); return its size in bytes."""
    lines = list(_lines(shared))
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            line = f"{number} {lines[number % len(lines)]}\n"
            file.write(line)
            size += len(line.encode())
            number += 1
    return size


def make_tokenizer(shared: Path, directory: Path, *, num_pieces: int = 4000) -> None:
    """Write LLaMA's tokenizer with Chinese pieces trained on the books."""
    directory.mkdir(parents=True)
    addition = directory / "addition.model"
    train_sentencepiece(_lines(shared), vocab_size=num_pieces, output=addition)
    merged = merge_sentencepiece(shared / "tokenizers" / "llama_32000.model", [addition])
    save_tokenizer(merged.proto, directory)


def _lines(shared: Path) -> Iterator[str]:
    """Whole sentences, joined until a line is long enough."""
    for text in _texts(shared):
        held = ""
        for sentence in _SENTENCE.findall(" ".join(text.split())):
            held += sentence
            if len(held.encode()) >= _LINE_BYTES:
                yield held.strip()
                held = ""
        if held.strip():
            yield held.strip()


def _texts(shared: Path) -> Iterator[str]:
    for name in _BOOKS:
        yield (shared / "text" / name).read_text(encoding="utf-8-sig")
    squad = json.loads((shared / "text" / "cmrc2018_dev_squad.json").read_text(encoding="utf-8"))
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"]
