"""From sources to a token store: cut, tokenise on the cluster, choose, mix, pack, write, count.

The same sources give the same bytes whatever the number of workers and the size of the chunks. An
interrupted run goes on with the parts that lie in `scratch`. Knows the other modules of this room
and the vocabulary; not models. Costs one pass over the sources on all cores and one over the parts
in this process (two where sources are mixed); memory is bounded by the packing window and some 20
bytes per document, not by the corpus.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from altiplano.config.data import DataSection, ReplaySection, TextSource
from altiplano.console import progress_bar
from altiplano.data.chat.encode import make_template
from altiplano.data.flow.account import Account, summary
from altiplano.data.flow.choose import QUARANTINE, Choice, Selector, Source, copies_of
from altiplano.data.flow.distribute import run_in_order
from altiplano.data.flow.mix import Portion, copies, copy_factors
from altiplano.data.flow.parts import num_batches
from altiplano.data.flow.tokenize import Job, Outcome, most_of, tokenize_records, tokenize_text
from altiplano.data.reading.files import CHUNK_BYTES, Chunk
from altiplano.data.reading.records import plan_records
from altiplano.data.reading.sources import Resolve, plan_text
from altiplano.data.tokens.pack import Blocks, Sequences, pack_records, pack_text
from altiplano.data.tokens.store import StoreWriter
from altiplano.errors import DataError
from altiplano.vocabulary.load import Vocabulary
from altiplano.vocabulary.proto import write_atomically

TRAIN = "train"
"""Folder of the token store in the output."""
TEMPLATE_FILE = "chat_template.jinja"


def prepare_text(
    sources: Sequence[TextSource],
    replay: ReplaySection | None,
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    section: DataSection,
    output: Path,
    scratch: Path,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """Write `train/` (a token store), `held_out.<language>.jsonl` and `quarantine.jsonl`.

    Each document becomes BOS (where the vocabulary has one), its tokens and EOS. Held-out lines are
    {"text", "language"}; quarantine lines {"reason", "origin", "detail", "text", "source"}. Ray
    must be initialised.

    Args:
        sources: corpora, in order.
        replay: corpora mixed in by share.
        resolve: from config paths to absolute ones.
        vocabulary_dir: tokenizer directory that every worker can read.
        section: cleaning, held-out share, block length, what to do with errors; not its sources.
        output: existing directory.
        scratch: existing directory on storage that every worker sees, for the parts; what lies
            there must come from the same files. The caller deletes it.
        chunk_bytes: input of one task; the result does not depend on it.

    Returns:
        Counts of documents (read = kept + held out + dropped), characters, bytes, tokens, targets
        and blocks; fill rate; the same per language and source, with `copies` and `stored_tokens`
        (of all copies: what the store holds) beside the numbers of documents counted once.

    Raises:
        DataError: a source cannot be used, nothing is left to train on, or there is too little to
            replay.
        OSError: the disk is full.
    """
    vocabulary = _checked_vocabulary(vocabulary_dir)
    jobs_of = _planner(plan_text, resolve, section, vocabulary, scratch, chunk_bytes)
    every = [*sources, *(replay.text if replay else [])]
    with (
        Selector(every, section.clean, output) as selector,
        contextlib.closing(_choices(every, jobs_of, tokenize_text, selector)) as choices,
    ):
        if replay or any(source.weight or source.repeat != 1 for source in sources):
            sequences = _mixed(list(choices), sources, replay, selector.accounts)
        else:
            sequences = _in_order(choices, selector.accounts)
        joined = section.cross_documents
        blocks = pack_text(sequences, section.sequence_length, cross_documents=joined)
        writer = _write(blocks, output, section, vocabulary, cross_documents=joined)
    return _checked(writer, selector)


def prepare_chat(
    section: DataSection,
    resolve: Resolve,
    vocabulary_dir: Path,
    *,
    output: Path,
    scratch: Path,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """Write `train/` (a token store), `chat_template.jinja` and `quarantine.jsonl`.

    The loss is on answers and their EOS. A record stays in one block. Ray must be initialised.

    Args:
        section: records, cleaning, template and block length.
        resolve, vocabulary_dir, output, scratch, chunk_bytes: as of `prepare_text`.

    Returns:
        Counts as of `prepare_text`, how many prompts were truncated and records split, and how
        many answers of kept records were left out (`answers_dropped`).

    Raises:
        DataError: a source cannot be used, a record is too long and `overlong` is `fail`, the
            template cannot be trained on, or nothing is left.
        OSError: the disk is full.
    """
    vocabulary = _checked_vocabulary(vocabulary_dir)
    template = make_template(section.template, section.system_prompt, vocabulary)
    jobs_of = _planner(plan_records, resolve, section, vocabulary, scratch, chunk_bytes)
    records = section.instructions
    with (
        Selector(records, section.clean, output) as selector,
        contextlib.closing(_choices(records, jobs_of, tokenize_records, selector)) as choices,
    ):
        blocks = pack_records(_in_order(choices, selector.accounts), section.sequence_length)
        writer = _write(blocks, output, section, vocabulary, cross_documents=False)
    metrics = _checked(writer, selector)
    write_atomically(output / TEMPLATE_FILE, template.jinja.encode())
    notes = [account.notes for account in selector.accounts.values()]
    return metrics | {
        "prompts_truncated": sum(note["truncated"] for note in notes),
        "records_split": sum(note["split"] for note in notes),
        "answers_dropped": sum(note["answer_too_long"] for note in notes),
    }


def _planner(
    plan: Callable[..., list[Chunk]],
    resolve: Resolve,
    section: DataSection,
    vocabulary: Vocabulary,
    scratch: Path,
    chunk_bytes: int,
) -> Callable[[Source], list[Job]]:
    """A function from a source to its jobs."""
    rules = section.model_copy(update={"text": [], "replay": None, "instructions": []})
    place = str(vocabulary.source.absolute()), vocabulary.fingerprint, str(scratch.absolute())

    def jobs_of(source: Source) -> list[Job]:
        chunks = plan(source, resolve, chunk_bytes=chunk_bytes)
        return [Job(source, chunk, rules, *place) for chunk in chunks]

    return jobs_of


def _choices(
    sources: Sequence[Source],
    jobs_of: Callable[[Source], list[Job]],
    work: Callable[[Job], Outcome],
    selector: Selector,
) -> Generator[Choice, None, None]:
    """Run the jobs of all sources and choose among their documents, in corpus order.

    A source with a cap has a run of its own, which ends when the cap is reached.
    """
    jobs = {source.label: jobs_of(source) for source in sources}
    with _Meter(sum(map(len, jobs.values()))) as meter:
        for _, neighbours in itertools.groupby(sources, key=_run_of):
            run = list(neighbours)
            queue = [job for source in run for job in jobs[source.label]]
            with contextlib.closing(run_in_order(work, queue)) as outcomes:
                for job, outcome in zip(queue, outcomes, strict=True):
                    yield from _chosen(job.source, outcome, selector)
                    meter.advance(selector.num_bytes)
                    if selector.is_full(job.source):
                        break
            for source in run:
                selector.require_some(source)


def _run_of(source: Source) -> str | None:
    return None if most_of(source) is None else source.label


def _chosen(source: Source, outcome: Outcome, selector: Selector) -> Iterator[Choice]:
    """Choices of one part.

    Raises:
        Exception: what stopped the task, unless the source's cap comes before that place.
    """
    if outcome.part is not None:
        for index in range(num_batches(outcome.part)):
            yield selector.choose(source, outcome.part, index)
    if outcome.error is not None and not selector.is_full(source):
        raise outcome.error


def _in_order(choices: Iterable[Choice], accounts: dict[str, Account]) -> Iterator[Sequences]:
    """Every document once, while the tasks go on."""
    for choice in choices:
        yield copies_of(choice, choice.rows, accounts[choice.source.label])


def _mixed(
    choices: Sequence[Choice],
    text: Sequence[TextSource],
    replay: ReplaySection | None,
    accounts: dict[str, Account],
) -> Iterator[Sequences]:
    """As many copies as the mixture wants: the first of every document, then the second, ..."""

    def portions(sources: Sequence[TextSource]) -> list[Portion]:
        return [Portion(source, accounts[source.label].tokens) for source in sources]

    factors = copy_factors(portions(text), portions(replay.text if replay else []), replay)
    for number in range(math.ceil(max(factors.values()))):
        for choice in choices:
            label = choice.source.label
            wanted = copies(choice.load().key, factors[label]) > number
            yield copies_of(choice, choice.rows & wanted, accounts[label])


def _write(
    blocks: Iterable[Blocks],
    output: Path,
    section: DataSection,
    vocabulary: Vocabulary,
    *,
    cross_documents: bool,
) -> StoreWriter:
    writer = StoreWriter(
        output / TRAIN,
        sequence_length=section.sequence_length,
        vocab_size=vocabulary.size,
        pad_id=vocabulary.pad_id if vocabulary.pad_id >= 0 else vocabulary.eos_id,
        tokenizer_fingerprint=vocabulary.fingerprint,
        cross_documents=cross_documents,
    )
    with writer:
        for some in blocks:
            writer.add(some)
    return writer


def _checked(writer: StoreWriter, selector: Selector) -> dict[str, Any]:
    """The metrics.

    Raises:
        DataError: nothing is in the store.
    """
    accounts = summary(selector.accounts)
    if writer.num_tokens == 0:
        raise DataError(
            f"nothing is left to train on: of {accounts['documents_read']} documents "
            f"{accounts['documents_held_out']} are held out and dropped are "
            f"{accounts['documents_dropped'] or 'none'} (see {QUARANTINE}): give more text, or "
            f"loosen `data.held_out`, `data.clean` or `data.sequence_length`"
        )
    stored = sum(account.stored_tokens for account in selector.accounts.values())
    assert stored == writer.num_tokens, f"{stored} tokens in, {writer.num_tokens} out"
    return accounts | {
        "tokens": writer.num_tokens,
        "targets": writer.num_targets,
        "blocks": writer.num_blocks,
        "fill_rate": round(writer.fill_rate, 4),
    }


def _checked_vocabulary(directory: Path) -> Vocabulary:
    vocabulary = Vocabulary(directory)
    if vocabulary.eos_id < 0:
        raise DataError(
            f"the tokenizer {directory} has no EOS: documents could not be told apart; name "
            f"`eos_token` in its tokenizer_config.json"
        )
    return vocabulary


class _Meter:
    """A bar over the chunks that says how fast text comes; a context manager."""

    def __init__(self, total: int) -> None:
        self._bar = progress_bar()
        self._task = self._bar.add_task("tokenise", total=total, detail="")
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """One more chunk is done; `num_bytes` of text have been kept so far."""
        rate = num_bytes / 1e6 / (time.monotonic() - self._start)
        self._bar.update(self._task, advance=1, detail=f"{rate:.1f} MB/s")
