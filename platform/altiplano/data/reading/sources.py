"""Corpora as documents: what of a file is a text, and which split it belongs to.

Every problem is a `DataError` with its place; with `on_error: skip` the document goes into the
quarantine instead. Deliberately knows nothing of tokens, and nothing of duplicates.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from altiplano.config.data import CleanSection, InstructionSource, TextSource
from altiplano.data.cleaning.clean import Cleaner
from altiplano.data.cleaning.duplicates import content_digests, held_out_mask
from altiplano.data.reading.files import (
    CHUNK_BYTES,
    PIECE_BYTES,
    Chunk,
    Form,
    OnError,
    Problems,
    plan_chunks,
    read_plain,
    read_values,
)
from altiplano.errors import DataError

Resolve = Callable[[str], str]
"""From a path as the config has it to an absolute path or URL (`Project.resolve`)."""


class Document(NamedTuple):
    """One text."""

    text: str
    language: str
    origin: str
    """File and byte or record, for messages."""


def plan_source(
    source: TextSource | InstructionSource,
    resolve: Resolve,
    *,
    otherwise: Form,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[Chunk]:
    """Chunks of one source, in the order of its files.

    Args:
        source: what to read.
        resolve: turns the config's path into an absolute one.
        otherwise: form of the files whose suffix tells nothing.
        chunk_bytes: about the size of a chunk.

    Raises:
        DataError: nothing is there.
    """
    path = resolve(source.path)
    if source.format == "dataset" and not Path(path).exists():
        path = source.path
    return plan_chunks(
        path,
        source.format,
        otherwise=otherwise,
        chunk_bytes=chunk_bytes,
        subset=source.subset,
        split=source.split,
    )


def plan_text(
    source: TextSource, resolve: Resolve, *, chunk_bytes: int = CHUNK_BYTES
) -> list[Chunk]:
    """Chunks of one corpus; a file of unknown suffix holds paragraphs."""
    return plan_source(source, resolve, otherwise="paragraphs", chunk_bytes=chunk_bytes)


def read_documents(source: TextSource, chunk: Chunk, problems: Problems) -> Iterator[Document]:
    """Documents of one chunk, as they stand in the files but stripped, without the blank ones.

    Raises:
        DataError: not UTF-8, not JSON, or without the text's key.
    """
    if chunk.form in ("lines", "paragraphs", "file"):
        for text, origin in read_plain(chunk, problems):
            yield Document(text, source.language, origin)
        return
    keys = source.text_key.split(".")
    for value, origin in read_values(chunk, problems, columns=keys[:1]):
        for text in _texts(value, origin, keys, problems):
            for start in range(0, len(text), PIECE_BYTES):
                yield Document(text[start : start + PIECE_BYTES], source.language, origin)


def training_texts(
    sources: Iterable[TextSource],
    resolve: Resolve,
    *,
    languages: Iterable[str] | None = None,
    held_out: float = 0.0,
    on_error: OnError = "fail",
    clean: CleanSection | None = None,
) -> Iterator[str]:
    """Cleaned texts of the training split, in order; what vocabularies are trained on.

    Duplicates stay in: they hardly move the counts of pieces.

    Args:
        sources: the corpora.
        resolve: turns a config's path into an absolute one.
        languages: only these; all by default.
        held_out: share of the documents that is kept out.
        on_error: stop at a document that cannot be read, or leave it out.
        clean: what is done to the texts.

    Raises:
        DataError: a source cannot be read, or holds no text at all.
    """
    wanted = None if languages is None else set(languages)
    cleaner = Cleaner(clean or CleanSection())
    for source in sources:
        if wanted is None or source.language in wanted:
            for text in _source_texts(source, resolve, on_error):
                text = cleaner.clean(text)
                if cleaner.reason_to_drop(text) is None and not is_held_out(text, held_out):
                    yield text


def is_held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out split, by a hash of its normalised content.

    The same text is on the same side wherever and however often it occurs, and whatever its line
    ends, spaces at borders or Unicode composition.
    """
    return share > 0 and bool(held_out_mask(content_digests([text]), share)[0])


def nothing_usable(source: TextSource, skipped: int) -> DataError:
    """Return the error for a corpus in which nothing could be read."""
    return DataError(
        f"the corpus {source.path} holds no usable text "
        f"({skipped} documents skipped): give one that does"
    )


def _source_texts(source: TextSource, resolve: Resolve, on_error: OnError) -> Iterator[str]:
    count = skipped = 0
    for chunk in plan_text(source, resolve):
        problems = Problems(on_error)
        for document in read_documents(source, chunk, problems):
            yield document.text
            count += 1
            if count == source.max_documents:
                return
        skipped += len(problems.dropped)
    if count == 0:
        raise nothing_usable(source, skipped)


def _texts(value: Any, origin: str, keys: list[str], problems: Problems) -> Iterator[str]:
    found: list[str] = []
    if _collect(value, keys, found) and not found:
        has = f"keys {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        problems.report(
            "no_text", origin, f"no text at `{'.'.join(keys)}` (it has {has})", str(value)
        )
    for text in found:
        if _has_surrogate(text):
            problems.report("invalid_unicode", origin, "a lone surrogate in the text", text)
        elif text := text.strip():
            yield text


def _collect(value: Any, keys: list[str], found: list[str]) -> int:
    """Add the texts at a path of keys, walking lists; how many branches do not lead to one."""
    if isinstance(value, list):
        return sum(_collect(item, keys, found) for item in value)
    if keys:
        is_there = isinstance(value, dict) and keys[0] in value
        return _collect(value[keys[0]], keys[1:], found) if is_there else 1
    if not isinstance(value, str):
        return 1
    found.append(value)
    return 0


def _has_surrogate(text: str) -> bool:
    try:
        return not text.isascii() and not text.encode("utf-8")
    except UnicodeEncodeError:
        return True
