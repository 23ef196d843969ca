"""Shows what a model will see: documents and records with the trained tokens coloured.

So that a mask, a template or an EOS that is wrong is seen before hours of training. Reads, cleans
and encodes as preparation does, but removes no duplicates. Knows the terminal and this room; needs
no cluster. Costs a tokenizer and a few records.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from rich.text import Text

from altiplano.config.data import CleanSection, InstructionSource, TextSource
from altiplano.console import console
from altiplano.data.chat.encode import Fate, LossOn, Overlong, encode_record, make_template
from altiplano.data.cleaning.clean import Cleaner
from altiplano.data.preview.pieces import readable_pieces
from altiplano.data.reading.problems import Problems
from altiplano.data.reading.records import Record, plan_records, read_records
from altiplano.data.reading.sources import Document, Resolve, is_held_out, plan_text, read_documents
from altiplano.vocabulary.load import Vocabulary

_PIECES_SHOWN = 400
"""Longer sequences are shown by their beginning and end."""
_MOST_READ = 1000
"""Documents looked at per source for the few that are shown; the rest may be left out."""
_CONTEXT_CHARACTERS = 12
_TRAINED, _CONTEXT = ("green", "bold green"), ("dim", "dim italic")
"""Styles of a piece and of a special token."""
_OPEN, _CLOSE, _BAR = "⟦", "⟧", "│"
_MARK, _NOTE = "bold green", "yellow"
_FATES: dict[Fate, str] = {
    "whole": "",
    "truncated": "the prompt's middle is cut",
    "split": "split between turns",
    "too_long": "NOT TRAINED: longer than a block",
    "answer_too_long": "NOT TRAINED: the answer leaves no room for a prompt",
}
assert set(_FATES) == set(get_args(Fate)), "every fate is explained"


def preview_text(
    sources: Sequence[TextSource],
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    records: int,
    clean: CleanSection,
    held_out: float = 0.0,
) -> None:
    """Print the first training documents of every corpus as tokens.

    Args:
        sources: corpora.
        resolve: from config paths to absolute ones.
        vocabulary_dir: tokenizer directory.
        records: documents per corpus.
        clean: how texts are cleaned, and which are left out.
        held_out: share of the documents that are not trained on and so not shown.

    Raises:
        DataError: a source cannot be read.
    """
    vocabulary, cleaner = Vocabulary(vocabulary_dir), Cleaner(clean)
    _explain(vocabulary)
    before = [vocabulary.bos_id] if vocabulary.bos_id >= 0 else []
    for source in sources:
        problems = Problems("skip")
        shown = itertools.islice(
            _trained_texts(source, resolve, cleaner, held_out, problems), records
        )
        for document, text in shown:
            ids = [*before, *vocabulary.encode(text), vocabulary.eos_id]
            loss = [0] * len(before) + [1] * (len(ids) - len(before))
            _show(document.origin, ids, loss, vocabulary)
            _show_cleaning((document.text, text))
        _show_left_out(source.label, problems)


def preview_chat(
    sources: Sequence[InstructionSource],
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    template: str,
    system_prompt: str | None,
    loss_on: LossOn,
    overlong: Overlong,
    sequence_length: int,
    clean: CleanSection,
    records: int,
) -> None:
    """Print the first records of every source as the template renders them.

    Args:
        sources: instruction records.
        resolve: from config paths to absolute ones.
        vocabulary_dir: tokenizer directory.
        template, system_prompt: as of `chat.make_template`.
        loss_on, overlong, sequence_length: as of `chat.encode_record`.
        clean: how contents are cleaned.
        records: records per source.

    Raises:
        DataError: a source cannot be read, or the template cannot be used.
    """
    vocabulary, cleaner = Vocabulary(vocabulary_dir), Cleaner(clean)
    made = make_template(template, system_prompt, vocabulary)
    _explain(vocabulary)
    _print(f"template {template}, loss on {loss_on}, blocks of {sequence_length} tokens")
    for source in sources:
        problems = Problems("skip")
        for record in itertools.islice(_records(source, resolve, problems), records):
            messages = [m | {"content": cleaner.clean(m["content"])} for m in record.messages]
            parts = encode_record(
                messages,
                made,
                vocabulary,
                sequence_length=sequence_length,
                overlong=overlong,
                loss_on=loss_on,
            )
            for number, part in enumerate(parts, start=1):
                _show(
                    record.origin + (f" part {number} of {len(parts)}" if len(parts) > 1 else ""),
                    part.ids.tolist(),
                    part.loss.tolist(),
                    vocabulary,
                    fate=part.fate,
                )
            pairs = zip(record.messages, messages, strict=True)
            _show_cleaning(*((raw["content"], cleaned["content"]) for raw, cleaned in pairs))
        _show_left_out(source.label, problems)


def coloured(ids: Sequence[int], loss: Sequence[int], vocabulary: Vocabulary) -> Text:
    """Pieces separated by thin bars; trained ones green and between ⟦ ⟧, the others dim.

    Args:
        ids: token ids.
        loss: 1 where the token is a training target; as long as `ids`.
        vocabulary: names the pieces.
    """
    control = {*vocabulary.control_pieces}
    pieces: list[tuple[str, str]] = []
    runs = itertools.groupby(zip(ids, loss, strict=True), key=lambda pair: pair[1])
    for trained, run in runs:
        styles = _TRAINED if trained else _CONTEXT
        found = readable_pieces([id_ for id_, _ in run], vocabulary)
        shown = [(piece + _BAR, styles[piece in control]) for piece in found]
        pieces += [(_OPEN, _MARK), *shown, (_CLOSE, _MARK)] if trained else shown
    left_out = len(pieces) - _PIECES_SHOWN
    if left_out > 0:
        half = _PIECES_SHOWN // 2
        pieces[half:-half] = [(f" … {left_out} more … ", _NOTE)]
    text = Text()
    for piece, style in pieces:
        text.append(piece, style=style)
        if piece.endswith("↵" + _BAR):
            text.append("\n")
    text.highlight_regex(_BAR, "bright_black")
    return text


def _trained_texts(
    source: TextSource, resolve: Resolve, cleaner: Cleaner, held_out: float, problems: Problems
) -> Iterator[tuple[Document, str]]:
    """(document as read, its cleaned text) of those that are trained on."""
    documents = (
        document
        for chunk in plan_text(source, resolve)
        for document in read_documents(source, chunk, problems)
    )
    for document in itertools.islice(documents, _MOST_READ):
        text = cleaner.clean(document.text)
        if why := cleaner.reason_to_drop(text):
            reason, detail = why
            problems.drop(reason, document.origin, detail, document.text)
        elif not is_held_out(text, held_out):
            yield document, text


def _records(source: InstructionSource, resolve: Resolve, problems: Problems) -> Iterator[Record]:
    for chunk in plan_records(source, resolve):
        yield from read_records(source, chunk, problems)


def _explain(vocabulary: Vocabulary) -> None:
    eos, bos = vocabulary.eos_id, vocabulary.bos_id
    _print(
        Text.assemble(
            (f"{_OPEN}green{_CLOSE} trained", "green"),
            ("  dim context only", "dim"),
            "  ▁ space  ↵ line end  文³ three tokens of one character",
        )
    )
    _print(
        f"EOS is {vocabulary.piece(eos)} (id {eos}), "
        + (f"BOS is {vocabulary.piece(bos)} (id {bos})" if bos >= 0 else "there is no BOS")
    )


def _print(text: Text | str) -> None:
    """The terminal breaks the lines: places and pieces can be copied whole."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _show(
    origin: str,
    ids: Sequence[int],
    loss: Sequence[int],
    vocabulary: Vocabulary,
    *,
    fate: Fate = "whole",
) -> None:
    head = Text(f"\n{origin}: {len(ids)} tokens, {sum(loss)} trained", style="bold")
    if _FATES[fate]:
        head.append(f" ({_FATES[fate]})", style=_NOTE)
    _print(head)
    _print(coloured(ids, loss, vocabulary))


def _show_cleaning(*texts: tuple[str, str]) -> None:
    """Where cleaning first changed some (raw, cleaned) texts, if more than at their ends."""
    changed = [(raw.strip(), cleaned) for raw, cleaned in texts if raw.strip() != cleaned]
    if not changed:
        return
    raw, cleaned = changed[0]
    pairs = enumerate(zip(raw, cleaned, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(raw), len(cleaned)))
    near = slice(max(0, at - _CONTEXT_CHARACTERS), at + _CONTEXT_CHARACTERS)
    which = f" {len(changed)} of {len(texts)} messages" if len(texts) > 1 else ""
    _print(Text(f"cleaned{which}: {raw[near]!r} became {cleaned[near]!r}", style=_NOTE))


def _show_left_out(label: str, problems: Problems) -> None:
    """How many documents were left out on the way, by reason, each with an example."""
    for reason, count in sorted(problems.counts.items()):
        example = next(item for item in problems.dropped if item.reason == reason)
        _print(
            Text(
                f"{label}: {count} left out ({reason}), the first {example.origin}: "
                f"{example.detail}",
                style=_NOTE,
            )
        )
