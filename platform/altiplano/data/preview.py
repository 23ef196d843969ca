"""Shows what a model will see: documents and records with the trained tokens coloured.

So that a mask, a template or an EOS that is wrong is seen before hours of training. Knows the
terminal and this room; needs no cluster. Costs a tokenizer and a few records.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from altiplano.config.schema import InstructionSource, TextSource
from altiplano.console import console
from altiplano.data import chat
from altiplano.data.pack import TokenSequence
from altiplano.data.sources import Resolve, is_held_out, read_records, read_text
from altiplano.vocabulary.load import Vocabulary

_TOKENS_SHOWN = 400
"""Longer sequences are shown by their beginning and end."""
_TRAINED, _CONTEXT = ("green", "bold green"), ("dim", "dim italic")


def preview_text(
    sources: Sequence[TextSource],
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    records: int,
    held_out: float = 0.0,
) -> None:
    """Print the first training documents of every corpus as tokens.

    Args:
        sources: corpora.
        resolve: from config paths to absolute ones.
        vocabulary_dir: tokenizer directory.
        records: documents per corpus.
        held_out: share of the documents that are not trained on and so not shown.

    Raises:
        DataError: a source cannot be read.
    """
    vocabulary = Vocabulary(vocabulary_dir)
    _explain(vocabulary)
    for source in sources:
        documents = read_text(source, resolve)
        trained = (d for d in documents if not is_held_out(d.text, held_out))
        for document in itertools.islice(trained, records):
            ids = [vocabulary.bos_id, *vocabulary.encode(document.text), vocabulary.eos_id]
            loss = [0] + [1] * (len(ids) - 1)
            _show(document.origin, coloured(ids, loss, vocabulary), len(ids), sum(loss))


def preview_chat(
    sources: Sequence[InstructionSource],
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    template: str,
    system_prompt: str,
    records: int,
) -> None:
    """Print the first records of every file as the template renders them.

    Args:
        sources: instruction files.
        resolve: from config paths to absolute ones.
        vocabulary_dir: tokenizer directory.
        template: key of `chat.TEMPLATES`.
        system_prompt: system message of records that bring none.
        records: records per file.

    Raises:
        DataError: a source cannot be read.
    """
    vocabulary = Vocabulary(vocabulary_dir)
    _explain(vocabulary)
    for source in sources:
        for record in itertools.islice(read_records(source, resolve), records):
            spans = chat.render(record.messages, template, system_prompt, vocabulary.control_pieces)
            tokens: TokenSequence = chat.encode_spans(spans, vocabulary)
            chat.require_eos(tokens, vocabulary.eos_id)
            ids, loss = tokens.ids.tolist(), tokens.loss.tolist()
            _show(record.origin, coloured(ids, loss, vocabulary), len(ids), sum(loss))


def coloured(ids: Sequence[int], loss: Sequence[int], vocabulary: Vocabulary) -> Text:
    """Pieces separated by thin bars; trained ones green, the others dim.

    Args:
        ids: token ids.
        loss: 1 where the token is a training target; as long as `ids`.
        vocabulary: names the pieces.
    """
    text = Text()
    control = {vocabulary.bos_id, vocabulary.eos_id}
    for position, (id_, trained) in enumerate(zip(ids, loss, strict=True)):
        if len(ids) > _TOKENS_SHOWN and position == _TOKENS_SHOWN // 2:
            text.append(f" … {len(ids) - _TOKENS_SHOWN} tokens … ", style="yellow")
        if _TOKENS_SHOWN // 2 <= position < len(ids) - _TOKENS_SHOWN // 2:
            continue
        styles = _TRAINED if trained else _CONTEXT
        text.append(vocabulary.piece(id_), style=styles[id_ in control])
        text.append("│", style="bright_black")
    return text


def _explain(vocabulary: Vocabulary) -> None:
    eos = vocabulary.eos_id
    console.print(
        Text.assemble(
            ("green: trained", "green"),
            ("  dim: context only", "dim"),
            f"  EOS is {vocabulary.piece(eos)} (id {eos}), BOS is "
            f"{vocabulary.piece(vocabulary.bos_id)} (id {vocabulary.bos_id})",
        )
    )


def _show(origin: str, text: Text, num_tokens: int, num_targets: int) -> None:
    console.print(Text(f"\n{origin}: {num_tokens} tokens, {num_targets} trained", style="bold"))
    console.print(text)
