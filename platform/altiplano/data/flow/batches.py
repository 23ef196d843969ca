"""Batches of documents or records: each item judged, those that pass encoded together.

Rules that look at one item alone are applied here: cleaning, the held-out split, what fits a block.
Knows neither files nor other items. Costs about what the tokenizer costs, once more.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from altiplano.config.data import DataSection
from altiplano.data.chat.encode import ChatTemplate, Encoded, encode_record, make_template
from altiplano.data.cleaning.clean import Cleaner
from altiplano.data.cleaning.duplicates import content_digests, held_out_mask, signature
from altiplano.data.flow.parts import Fate, PartWriter, Passed, Row, Tokens, utf8_lengths
from altiplano.data.reading.files import Problems
from altiplano.data.reading.problems import QUARANTINE_CHARACTERS
from altiplano.data.reading.records import Record
from altiplano.data.reading.sources import Document
from altiplano.data.tokens.pack import Sequences
from altiplano.errors import DataError
from altiplano.vocabulary.load import Vocabulary

BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at a time."""
_BETWEEN = "\0"
"""Stands between the messages of a record where its content is one text."""
_WAYS_OUT = (
    "raise `data.sequence_length`, or set `data.overlong` to `truncate_prompt`, `split` or `drop`"
)

Item = TypeVar("Item")
MaskArray = npt.NDArray[np.bool_]


class Batch(ABC, Generic[Item]):
    """Items on their way into a part."""

    def __init__(self, rules: DataSection, vocabulary: Vocabulary) -> None:
        """Start an empty batch; of the section only the rules matter, not the sources."""
        self.rules, self.vocabulary = rules, vocabulary
        self.cleaner = Cleaner(rules.clean)
        self._rows: list[Row] = []
        self._texts: list[str] = []
        """Content of the items that pass."""
        self._joints: list[int] = []
        """How many `_BETWEEN` are in each."""
        self._characters = 0

    @abstractmethod
    def add(self, item: Item) -> None:
        """Judge one item and add its row."""

    @abstractmethod
    def encode(self, texts: Sequence[str], kept: MaskArray) -> Tokens:
        """Tokens of the items that pass; those not kept have none."""

    @property
    def held_out(self) -> float:
        """Share of the items that is held out."""
        return 0.0

    @property
    def is_full(self) -> bool:
        """Whether it is time to write."""
        return self._characters >= BATCH_CHARACTERS

    def note(self, problems: Problems) -> None:
        """Add what the reader had to leave out since the last item."""
        for drop in problems.dropped:
            row = Row(Fate.UNREADABLE, drop.text, drop.origin, drop.reason, drop.detail)
            self._rows.append(row)
        problems.dropped.clear()

    def drop(
        self,
        texts: Sequence[str],
        origin: str,
        reason: str,
        detail: str,
        fate: Fate = Fate.DROPPED,
    ) -> None:
        """Add an item, or with `INCOMPLETE` a part of the one before, that a rule leaves out."""
        self._rows.append(Row(fate, _shown(texts), origin, reason, detail))
        self._characters += sum(map(len, texts))

    def accept(self, texts: Sequence[str], origin: str, reason: str = "") -> None:
        """Add an item that passes: its one text, or the contents of its messages."""
        text = _BETWEEN.join(texts)
        self._rows.append(Row(Fate.KEPT, _shown(texts), origin, reason))
        self._texts.append(text)
        self._joints.append(len(texts) - 1)
        self._characters += len(text)

    def write(self, writer: PartWriter) -> None:
        """Encode and write everything, if there is anything."""
        if not self._rows:
            return
        texts, joints = self._texts, np.array(self._joints, np.int64)
        places = np.flatnonzero([row.fate == Fate.KEPT for row in self._rows])
        digests = content_digests(texts)
        kept = ~held_out_mask(digests, self.held_out)
        for number in np.flatnonzero(~kept):
            row = self._rows[places[number]]
            held_out = row._replace(fate=Fate.HELD_OUT, text=texts[number])
            self._rows[places[number]] = held_out
        near = self.rules.clean.duplicates == "near" and texts
        passed = Passed(
            places,
            digests[:, 0],
            np.fromiter(map(len, texts), np.int64, len(texts)) - joints,
            utf8_lengths(texts) - joints,
            np.stack([signature(text) for text in texts]) if near else None,
            self.encode(texts, kept),
        )
        writer.add(self._rows, passed)


class TextBatch(Batch[Document]):
    """Documents."""

    @property
    def held_out(self) -> float:
        """The config's share."""
        return self.rules.held_out

    def add(self, item: Document) -> None:
        """Clean a document and apply the rules."""
        text = self.cleaner.clean(item.text)
        if why := self.cleaner.reason_to_drop(text):
            self.drop([item.text], item.origin, *why)
        else:
            self.accept([text], item.origin)

    def encode(self, texts: Sequence[str], kept: MaskArray) -> Tokens:
        """BOS, where the vocabulary has one, the document's tokens and EOS."""
        chosen = [text for text, keep in zip(texts, kept, strict=True) if keep]
        ids, lengths = self.vocabulary.encode_flat(chosen)
        sequences = with_ends(
            ids, lengths, bos_id=self.vocabulary.bos_id, eos_id=self.vocabulary.eos_id
        )
        return Tokens(sequences, kept.astype(np.int64))


class RecordBatch(Batch[Record]):
    """Conversations."""

    def __init__(self, rules: DataSection, vocabulary: Vocabulary) -> None:
        super().__init__(rules, vocabulary)
        self._template = _open_template(rules.template, rules.system_prompt, vocabulary)
        self._encoded: list[list[Encoded]] = []

    def add(self, item: Record) -> None:
        """Clean the contents of a record and encode it by the template.

        Raises:
            DataError: it is too long, and `overlong` is `fail`.
        """
        contents = [self.cleaner.clean(message["content"]) for message in item.messages]
        if not all(contents):
            self.drop(contents, item.origin, "empty_turn", "a message has no text after cleaning")
            return
        parts = encode_record(
            [m | {"content": text} for m, text in zip(item.messages, contents, strict=True)],
            self._template,
            self.vocabulary,
            sequence_length=self.rules.sequence_length,
            overlong=self.rules.overlong,
            loss_on=self.rules.loss_on,
        )
        if any(part.kept for part in parts):
            self.accept(contents, item.origin, _treatment(parts))
            self._encoded.append([part for part in parts if part.kept])
            self._drop_parts(parts, contents, item.origin, Fate.INCOMPLETE)
        else:
            self._drop_parts(parts[:1], contents, item.origin, Fate.DROPPED)

    def encode(self, texts: Sequence[str], kept: MaskArray) -> Tokens:
        """The conversations' sequences; all are kept."""
        parts = [part for record in self._encoded for part in record]
        sequences = Sequences(
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
            np.array([len(part.ids) for part in parts], np.int64),
            np.concatenate([np.empty(0, np.uint8), *(part.loss for part in parts)]),
        )
        return Tokens(sequences, np.array([len(record) for record in self._encoded], np.int64))

    def _drop_parts(
        self, parts: Sequence[Encoded], contents: Sequence[str], origin: str, fate: Fate
    ) -> None:
        """Leave out the parts that do not fit a block."""
        for part in parts:
            if not part.kept:
                length = self.rules.sequence_length
                detail = f"the record has {len(part.ids)} tokens, a block has {length}"
                if self.rules.overlong == "fail":
                    raise DataError(f"{origin}: {detail}: {_WAYS_OUT}")
                self.drop(contents, origin, part.fate, detail, fate)


def _shown(texts: Sequence[str]) -> str:
    """What the quarantine shows of an item."""
    text = texts[0] if len(texts) == 1 else "\n".join(texts)
    return text[:QUARANTINE_CHARACTERS]


def with_ends(
    ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], *, bos_id: int, eos_id: int
) -> Sequences:
    """Documents with BOS, unless it is -1, and EOS.

    Args:
        ids: of all documents, end to end.
        lengths: of each document, [n].
        bos_id, eos_id: put before and behind each.
    """
    whole = lengths + 1 + (bos_id >= 0)
    ends = np.cumsum(whole)
    out = np.empty(whole.sum(), np.int32)
    content = np.ones(len(out), np.bool_)
    content[ends - 1] = False
    out[ends - 1] = eos_id
    if bos_id >= 0:
        content[ends - whole] = False
        out[ends - whole] = bos_id
    out[content] = ids
    return Sequences(out, whole)


def _treatment(parts: Sequence[Encoded]) -> str:
    """What was done to keep a record; empty where nothing was."""
    if len(parts) > 1:
        return "split"
    return "" if parts[0].fate == "whole" else parts[0].fate


@functools.lru_cache(maxsize=2)
def _open_template(name: str, system_prompt: str | None, vocabulary: Vocabulary) -> ChatTemplate:
    """One template per worker and vocabulary: checking it takes longer than a batch."""
    return make_template(name, system_prompt, vocabulary)
