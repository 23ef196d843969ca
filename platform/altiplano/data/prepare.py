"""From sources to a token store: read, split, tokenise on the cluster, pack, write, count.

The same sources give the same bytes whatever the number of workers. Knows the other modules of
this room and the vocabulary; not models. Costs one pass over the sources; memory is bounded by
`tokenize.CHARACTERS_PER_RUN` and the packing window, not by the corpus.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from altiplano.config.schema import InstructionSource, TextSource
from altiplano.console import progress_bar
from altiplano.data import chat
from altiplano.data.pack import Block, IntArray, TokenSequence, pack_records, pack_text
from altiplano.data.sources import (
    OnError,
    Problems,
    Resolve,
    is_held_out,
    read_records,
    read_text,
)
from altiplano.data.store import StoreWriter
from altiplano.data.tokenize import CHARACTERS_PER_BLOCK, Row, encode_rows
from altiplano.errors import DataError
from altiplano.vocabulary.load import Vocabulary

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN = "train"
"""Folder of the token store in the output."""
TEMPLATE_FILE = "chat_template.jinja"
_Place = tuple[str, str]
"""Directory and fingerprint of a vocabulary."""
Overlong = Literal["fail", "drop", "truncate_prompt"]


@dataclass
class _Counts:
    """What became of the documents; read = kept + held out + all dropped."""

    problems: Problems
    kept: int = 0
    held_out: int = 0
    languages: dict[str, Counter[str]] = field(default_factory=dict)

    def keep(self, row: Row, num_tokens: int) -> None:
        """Count a document that goes into the store."""
        self.kept += 1
        self.languages.setdefault(row["language"], Counter()).update(
            documents=1, characters=row["characters"], bytes=row["bytes"], tokens=num_tokens
        )

    def metrics(self, writer: StoreWriter) -> dict[str, Any]:
        """Everything as JSON-able values."""
        dropped = dict(sorted(self.problems.skipped.items()))
        return {
            "documents_read": self.kept + self.held_out + sum(dropped.values()),
            "documents_kept": self.kept,
            "documents_held_out": self.held_out,
            "documents_dropped": dropped,
            "characters": sum(counts["characters"] for counts in self.languages.values()),
            "bytes": sum(counts["bytes"] for counts in self.languages.values()),
            "tokens": writer.num_tokens,
            "targets": writer.num_targets,
            "blocks": writer.num_blocks,
            "fill_rate": round(writer.fill_rate, 4),
            "languages": {name: dict(counts) for name, counts in sorted(self.languages.items())},
        }


def prepare_text(
    sources: Sequence[TextSource],
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    sequence_length: int,
    held_out: float,
    on_error: OnError,
    output: Path,
    characters_per_block: int = CHARACTERS_PER_BLOCK,
) -> dict[str, Any]:
    """Write `train/` (a token store) and `held_out.<language>.jsonl` ({"text", "language"}).

    Each document becomes BOS, its tokens and EOS. Ray must be initialised.

    Args:
        sources: corpora, in order.
        resolve: from config paths to absolute ones.
        vocabulary_dir: tokenizer directory that every worker can read.
        sequence_length: tokens per block.
        held_out: share of the documents kept out of training.
        on_error: stop at a document that cannot be read, or skip and count it.
        output: existing directory.
        characters_per_block: text of one Ray task; the result does not depend on it.

    Returns:
        Counts of documents (read = kept + held out + dropped), characters, bytes, tokens, targets
        and blocks; fill rate; counts per language.

    Raises:
        DataError: a source cannot be used, or nothing is left to train on.
    """
    vocabulary = _checked_vocabulary(vocabulary_dir)
    counts = _Counts(Problems(on_error))
    with ExitStack() as stack:
        rows = _training_rows(sources, resolve, held_out, counts, _HeldOut(output, stack))
        encode = functools.partial(_encode_texts, place=_place(vocabulary))
        encoded = encode_rows(rows, encode, characters_per_block=characters_per_block)
        documents = _count_documents(encoded, counts)
        writer = _write(pack_text(documents, sequence_length), output, sequence_length, vocabulary)
    if counts.kept == 0:
        raise DataError(
            f"no document is left to train on ({counts.held_out} held out): "
            f"give more text or lower `data.held_out`"
        )
    return counts.metrics(writer)


def prepare_chat(
    sources: Sequence[InstructionSource],
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    template: str,
    system_prompt: str,
    sequence_length: int,
    overlong: Overlong,
    on_error: OnError,
    output: Path,
    characters_per_block: int = CHARACTERS_PER_BLOCK,
) -> dict[str, Any]:
    """Write `train/` (a token store) and `chat_template.jinja`.

    The loss is on every answer and its EOS. Records are never split. Ray must be initialised.

    Args:
        sources, resolve, vocabulary_dir: as of `prepare_text`, with instruction files.
        template: key of `chat.TEMPLATES`.
        system_prompt: system message of records that bring none.
        sequence_length: tokens per block.
        overlong: what to do with a record longer than a block.
        on_error: stop at a record that cannot be read, or skip and count it.
        output: existing directory.
        characters_per_block: text of one Ray task; the result does not depend on it.

    Returns:
        Counts as of `prepare_text`, and how many prompts were truncated.

    Raises:
        DataError: a source cannot be used, a record is too long and `overlong` is `fail`, an
            answer does not end in EOS, or nothing is left.
    """
    vocabulary = _checked_vocabulary(vocabulary_dir)
    counts = _Counts(Problems(on_error))
    encode = functools.partial(
        _encode_chats,
        place=_place(vocabulary),
        template=template,
        system_prompt=system_prompt,
        sequence_length=sequence_length,
        overlong=overlong,
    )
    rows = _chat_rows(sources, resolve, counts.problems)
    encoded = encode_rows(rows, encode, characters_per_block=characters_per_block)
    truncated: Counter[str] = Counter()
    if overlong == "fail":
        encoded = _refuse_overlong(encoded, sequence_length)
    records = _count_records(encoded, counts, truncated, vocabulary.eos_id)
    writer = _write(pack_records(records, sequence_length), output, sequence_length, vocabulary)
    if counts.kept == 0:
        raise DataError(
            f"no record is left to train on (dropped: {dict(counts.problems.skipped)}): "
            f"give more records or raise `data.sequence_length` ({sequence_length})"
        )
    jinja = chat.jinja_template(template, system_prompt, vocabulary.control_pieces)
    (output / TEMPLATE_FILE).write_text(jinja, encoding="utf-8")
    return counts.metrics(writer) | {"prompts_truncated": truncated["truncated"]}


class _HeldOut:
    """Files of held-out documents, opened when their language first comes."""

    def __init__(self, output: Path, stack: ExitStack) -> None:
        self._output, self._stack = output, stack
        self._files: dict[str, IO[str]] = {}

    def add(self, text: str, language: str) -> None:
        """Write one document."""
        if language not in self._files:
            path = self._output / f"held_out.{language}.jsonl"
            self._files[language] = self._stack.enter_context(path.open("w", encoding="utf-8"))
        # Escaped: some readers take U+2028 inside a text for a line end.
        self._files[language].write(json.dumps({"text": text, "language": language}) + "\n")


def _training_rows(
    sources: Sequence[TextSource],
    resolve: Resolve,
    share: float,
    counts: _Counts,
    held_out: _HeldOut,
) -> Iterator[Row]:
    """Rows of the training split; the rest goes to the held-out files."""
    for source in sources:
        for document in read_text(source, resolve, problems=counts.problems):
            if is_held_out(document.text, share):
                counts.held_out += 1
                held_out.add(document.text, document.language)
            else:
                yield {"text": document.text, "language": document.language}


def _chat_rows(
    sources: Sequence[InstructionSource], resolve: Resolve, problems: Problems
) -> Iterator[Row]:
    for source in sources:
        for record in read_records(source, resolve, problems=problems):
            yield {
                "text": json.dumps(record.messages, ensure_ascii=False),
                "language": record.language,
                "origin": record.origin,
            }


def _encode_texts(table: "pa.Table", place: _Place) -> "pa.Table":
    """Tokens of a batch of documents, in a Ray worker."""
    import pyarrow as pa

    vocabulary = _open_vocabulary(place)
    texts = table["text"].to_pylist()
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    ids = [[bos, *encoded, eos] for encoded in vocabulary.encode_batch(texts)]
    return pa.table(
        {
            "ids": pa.array(ids, pa.list_(pa.int32())),
            "language": table["language"],
            "characters": [len(text) for text in texts],
            "bytes": [len(text.encode()) for text in texts],
        }
    )


def _encode_chats(
    table: "pa.Table",
    place: _Place,
    template: str,
    system_prompt: str,
    sequence_length: int,
    overlong: Overlong,
) -> "pa.Table":
    """Tokens of a batch of records, in a Ray worker; `fate` says what became of each."""
    import pyarrow as pa

    vocabulary = _open_vocabulary(place)
    nothing = TokenSequence(np.empty(0, np.int32), np.empty(0, np.uint8))
    rows = []
    for text in table["text"].to_pylist():
        messages = json.loads(text)
        spans = chat.render(messages, template, system_prompt, vocabulary.control_pieces)
        record, fate = chat.encode_spans(spans, vocabulary), "whole"
        length = len(record.ids)
        if length > sequence_length:
            fate = "too_long"
            if overlong == "truncate_prompt":
                cut = chat.fit(messages, template, system_prompt, vocabulary, sequence_length)
                record, fate = (nothing, "answer_too_long") if cut is None else (cut, "truncated")
        content = "".join(message["content"] for message in messages)
        rows.append(
            {
                "ids": record.ids,
                "loss": record.loss,
                "fate": fate,
                "length": length,
                "characters": len(content),
                "bytes": len(content.encode()),
            }
        )
    types = {"ids": pa.list_(pa.int32()), "loss": pa.list_(pa.uint8())}
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    return pa.table(columns | {"language": table["language"], "origin": table["origin"]})


def _count_documents(encoded: Iterator[Row], counts: _Counts) -> Iterator[IntArray]:
    with progress_bar() as progress:
        task = progress.add_task("tokenise text", total=None, detail="")
        for row in encoded:
            counts.keep(row, len(row["ids"]))
            progress.update(task, advance=1)
            yield row["ids"]
        progress.update(task, total=counts.kept)


def _refuse_overlong(encoded: Iterator[Row], sequence_length: int) -> Iterator[Row]:
    """Stop at the first record that does not fit a block."""
    for row in encoded:
        if row["fate"] == "too_long":
            raise DataError(
                f"{row['origin']}: the record has {row['length']} tokens, a block has "
                f"{sequence_length}: raise `data.sequence_length`, or set `data.overlong` to "
                f"`truncate_prompt` or `drop`"
            )
        yield row


def _count_records(
    encoded: Iterator[Row], counts: _Counts, truncated: Counter[str], eos_id: int
) -> Iterator[TokenSequence]:
    """Records that fit, checked; the others are counted by their fate."""
    with progress_bar() as progress:
        task = progress.add_task("tokenise records", total=None, detail="")
        for row in encoded:
            progress.update(task, advance=1)
            if row["fate"] in ("too_long", "answer_too_long"):
                counts.problems.skipped[row["fate"]] += 1
                continue
            record = TokenSequence(row["ids"], row["loss"])
            chat.require_eos(record, eos_id)
            truncated[row["fate"]] += 1
            counts.keep(row, len(record.ids))
            yield record
        progress.update(task, total=progress.tasks[task].completed)


def _write(
    blocks: Iterator[Block], output: Path, sequence_length: int, vocabulary: Vocabulary
) -> StoreWriter:
    pad_id = vocabulary.pad_id if vocabulary.pad_id >= 0 else vocabulary.eos_id
    writer = StoreWriter(
        output / TRAIN,
        sequence_length=sequence_length,
        vocab_size=vocabulary.size,
        pad_id=pad_id,
    )
    with writer:
        for block in blocks:
            writer.add(block)
    return writer


def _checked_vocabulary(directory: Path) -> Vocabulary:
    vocabulary = Vocabulary(directory)
    if vocabulary.bos_id < 0 or vocabulary.eos_id < 0:
        raise DataError(
            f"the tokenizer {directory} has BOS id {vocabulary.bos_id} and EOS id "
            f"{vocabulary.eos_id}: documents need both to be told apart"
        )
    return vocabulary


def _place(vocabulary: Vocabulary) -> _Place:
    return str(vocabulary.source), vocabulary.fingerprint


@functools.lru_cache(maxsize=2)
def _open_vocabulary(place: _Place) -> Vocabulary:
    """Open a vocabulary once per worker; a changed one under the same name is opened anew."""
    return Vocabulary(place[0])
