"""Choosing among the documents of all parts, in corpus order: caps, duplicates, what is held out.

Everything here depends on the order, so it runs in one place, on arrays; texts are touched only
where they are written out. Writes the held-out files and the quarantine, and keeps the accounts.
Knows neither tokenizers nor blocks. Costs what `Duplicates` costs, and one byte per document for
as long as choices are kept.
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from altiplano.config.data import CleanSection, InstructionSource, TextSource
from altiplano.data.cleaning.duplicates import Duplicates
from altiplano.data.flow.account import Account
from altiplano.data.flow.parts import Fate, ReadBatch, read_batch
from altiplano.data.flow.tokenize import most_of
from altiplano.data.tokens.pack import Sequences
from altiplano.errors import DataError

QUARANTINE = "quarantine.jsonl"
DUPLICATE = "duplicate"
Source = TextSource | InstructionSource


@dataclass(frozen=True)
class Choice:
    """Which rows of one batch of a part are trained on."""

    source: Source
    part: Path
    index: int
    rows: npt.NDArray[np.bool_]
    """[n]."""

    def load(self) -> ReadBatch:
        """The batch."""
        return read_batch(self.part, self.index)


class Selector:
    """Takes the batches of all sources one after the other; a context manager."""

    def __init__(self, sources: Sequence[Source], clean: CleanSection, output: Path) -> None:
        """Prepare to choose.

        Args:
            sources: all there are.
            clean: what counts as a duplicate.
            output: existing directory for `held_out.<language>.jsonl` and the quarantine.
        """
        self.accounts = {source.label: Account(source.language) for source in sources}
        self._taken: Counter[str] = Counter()
        self._duplicates = Duplicates(clean)
        self._output = output
        self._files: dict[str, IO[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Selector":
        self._open(QUARANTINE)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def is_full(self, source: Source) -> bool:
        """Whether a source has reached its cap."""
        most = most_of(source)
        return most is not None and self._taken[source.label] >= most

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents kept so far."""
        return sum(account.bytes for account in self.accounts.values())

    def require_some(self, source: Source) -> None:
        """Check that a source that was read gave anything.

        Raises:
            DataError: it held no document, or only such as cannot be read.
        """
        if not self._taken[source.label]:
            unreadable = self.accounts[source.label].dropped.total()
            kind = "text" if isinstance(source, TextSource) else "instruction record"
            raise DataError(
                f"{source.label} holds no usable {kind} ({unreadable} skipped): "
                f"give a source that does, or take it out"
            )

    def choose(self, source: Source, part: Path, index: int) -> Choice:
        """Judge the next batch; batches must come in corpus order."""
        batch = read_batch(part, index)
        read = self._within_cap(source, batch.fate)
        passed = (batch.fate == Fate.KEPT) | (batch.fate == Fate.HELD_OUT)
        candidates = read & passed
        first = np.zeros_like(read)
        if candidates.any():
            signatures = None if batch.signature is None else batch.signature[read[passed]]
            first[candidates] = self._duplicates.filter(batch.key[candidates], signatures)
        kept = first & (batch.fate == Fate.KEPT)
        held_out = first & (batch.fate == Fate.HELD_OUT)
        self._hold_out(source, batch, held_out)
        reasons = self._quarantine(source, batch, read & ~first)
        self._count(source, batch, kept, held_out, reasons)
        return Choice(source, part, index, kept)

    def _within_cap(self, source: Source, fate: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Rows up to the last document that the source's cap allows."""
        documents = (fate != Fate.UNREADABLE) & (fate != Fate.INCOMPLETE)
        most = most_of(source)
        number = self._taken[source.label] + np.cumsum(documents)
        self._taken[source.label] = int(number[-1])
        if most is None:
            return np.ones(len(fate), np.bool_)
        # Reading ends with the last document, so what cannot be read behind it is not met.
        return (number < most) | ((number == most) & (fate != Fate.UNREADABLE))

    def _hold_out(self, source: Source, batch: ReadBatch, rows: npt.NDArray[np.bool_]) -> None:
        if rows.any():
            file = self._open(f"held_out.{source.language}.jsonl")
            for text in batch.strings("text", rows):
                # Escaped: some readers take U+2028 inside a text for a line end.
                file.write(json.dumps({"text": text, "language": source.language}) + "\n")

    def _quarantine(
        self, source: Source, batch: ReadBatch, rows: npt.NDArray[np.bool_]
    ) -> list[tuple[int, str]]:
        """Write what is left out.

        Returns:
            Fate and reason of each.
        """
        if not rows.any():
            return []
        columns = [batch.strings(name, rows) for name in ("reason", "origin", "detail", "text")]
        left_out = []
        for fate, reason, origin, detail, text in zip(batch.fate[rows], *columns, strict=True):
            if fate in (Fate.KEPT, Fate.HELD_OUT):
                reason, detail = DUPLICATE, "the same content, or nearly, came before"
            line = {
                "reason": reason,
                "origin": origin,
                "detail": detail,
                "text": text,
                "source": source.label,
            }
            self._open(QUARANTINE).write(json.dumps(line, ensure_ascii=False) + "\n")
            left_out.append((int(fate), reason))
        return left_out

    def _count(
        self,
        source: Source,
        batch: ReadBatch,
        kept: npt.NDArray[np.bool_],
        held_out: npt.NDArray[np.bool_],
        left_out: Sequence[tuple[int, str]],
    ) -> None:
        account = self.accounts[source.label]
        account.documents += int(kept.sum())
        account.held_out += int(held_out.sum())
        account.characters += int(batch.characters[kept].sum())
        account.bytes += int(batch.bytes[kept].sum())
        account.tokens += int(batch.token_counts[kept].sum())
        account.notes.update(filter(None, batch.strings("reason", kept)))
        for fate, reason in left_out:
            counter = account.notes if fate == Fate.INCOMPLETE else account.dropped
            counter[reason] += 1

    def _open(self, name: str) -> IO[str]:
        """The file of this name, opened when it is first needed."""
        if name not in self._files:
            file = (self._output / name).open("w", encoding="utf-8")
            self._files[name] = self._stack.enter_context(file)
        return self._files[name]


def copies_of(choice: Choice, rows: npt.NDArray[np.bool_], account: Account) -> Sequences:
    """The sequences of some rows of a choice's batch, counted as copies in the account."""
    sequences = choice.load().sequences(rows)
    account.copies += int(rows.sum())
    account.stored_tokens += len(sequences.ids)
    return sequences
