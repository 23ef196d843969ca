"""What one task does on a worker: read a chunk, clean it, encode it, write the part.

A task decides nothing that depends on other chunks (caps, duplicates, mixing); `choose` does. Its
part depends on the job alone, so a part that is there already is not made again. Memory is bounded
by a batch, not by the chunk.
"""

import functools
import gc
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from altiplano.config.data import DataSection, InstructionSource, TextSource
from altiplano.data.flow.batches import Batch, RecordBatch, TextBatch
from altiplano.data.flow.parts import PartWriter, writing
from altiplano.data.reading.files import Chunk, Problems
from altiplano.data.reading.records import read_records
from altiplano.data.reading.sources import read_documents
from altiplano.errors import AltiplanoError
from altiplano.vocabulary.load import Vocabulary

Item = TypeVar("Item")
_Read = Callable[[Any, Chunk, Problems], Iterator[Item]]


@dataclass(frozen=True)
class Job:
    """One chunk of one source, and everything that its part depends on."""

    source: TextSource | InstructionSource
    chunk: Chunk
    rules: DataSection
    """The section without its sources."""
    vocabulary: str
    """Directory that every worker can read."""
    fingerprint: str
    scratch: str

    @property
    def part(self) -> Path:
        """Where the part lies; the name is a hash of all the rest."""
        said = [
            type(self.source).__name__,
            self.source.model_dump(mode="json"),
            asdict(self.chunk),
            self.rules.model_dump(mode="json"),
            self.fingerprint,
        ]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return Path(self.scratch) / f"part-{digest[:24]}.arrow"


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    part: Path | None
    """None where it could not be written."""
    error: Exception | None = None
    """What stopped it; the part then ends before that place."""


def tokenize_text(job: Job) -> Outcome:
    """Documents of a chunk, each as BOS, its tokens, EOS."""
    return _make_part(job, read_documents, TextBatch)


def tokenize_records(job: Job) -> Outcome:
    """Conversations of a chunk, each as its template has it."""
    return _make_part(job, read_records, RecordBatch)


def _make_part(job: Job, read: _Read[Item], kind: type[Batch[Item]]) -> Outcome:
    part = job.part
    if part.is_file():
        return Outcome(part)
    cut = part.with_suffix(".cut")
    try:
        with writing(cut) as writer, _no_garbage_collection():
            error = _write_batches(job, read, kind, writer)
        if error is not None:
            return Outcome(cut, error)
        os.replace(cut, part)
    except OSError as failure:
        return Outcome(None, failure)
    return Outcome(part)


def _write_batches(
    job: Job, read: _Read[Item], kind: type[Batch[Item]], writer: PartWriter
) -> AltiplanoError | None:
    """Write what can be read, at most the source's cap.

    Returns:
        What stopped it; everything before that is written.
    """
    problems = Problems(job.rules.on_error)
    vocabulary = _open_vocabulary(job.vocabulary, job.fingerprint)
    batch = kind(job.rules, vocabulary)
    error = None
    try:
        for item in itertools.islice(read(job.source, job.chunk, problems), most_of(job.source)):
            if problems.dropped:
                batch.note(problems)
            batch.add(item)
            if batch.is_full:
                batch.write(writer)
                batch = kind(job.rules, vocabulary)
    except AltiplanoError as caught:
        error = caught
    batch.note(problems)
    batch.write(writer)
    return error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows hold no cycles; looking for some in millions of them takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def most_of(source: TextSource | InstructionSource) -> int | None:
    """The source's cap on documents or records."""
    return source.max_documents if isinstance(source, TextSource) else source.max_records


@functools.lru_cache(maxsize=2)
def _open_vocabulary(directory: str, fingerprint: str) -> Vocabulary:
    """Open a vocabulary once per worker; a changed one under the same name is opened anew."""
    return Vocabulary(directory)
