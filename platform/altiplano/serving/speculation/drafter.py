"""The next few greedy tokens for a batch of sequences, as fast as a small model can.

Each sequence carries a chain of guesses beyond what the target has said. Asking for k tokens makes
the chain at least k long; drafting ahead makes it longer; when the target's tokens follow the
chain, what is left of it is the next answer and costs nothing; when they leave it, the rest is
forgotten. All rows of all engines go through the model together, one pass per token. A long prompt
is read a part at a time, so that it does not hold the others up; until then its guess is empty.
Knows no sockets. A pass costs about what reading the weights costs: 1 ms for 10 M parameters and
one row on one core.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from altiplano.model.load import read_config
from altiplano.serving.speculation.cache import Cache, Sequence
from altiplano.serving.speculation.llama import Llama
from altiplano.serving.speculation.protocol import AheadGuess, Guess, Row, digest

_log = logging.getLogger(__name__)

_PREFILL_MS = 8.0
_FEWEST_READ = 16
"""Prompt tokens read at once, however slow the model is."""
_FIRST_TOKEN_S = 1e-4
"""What reading a prompt's token is thought to take until it has been measured."""
_TOGETHER = 8
"""Rows that may compute a token in vain before those one token further behind go first alone."""


@dataclass
class Counts:
    """Totals since the start."""

    rows: int = 0
    """Rows asked for."""
    hits: int = 0
    """Of these, answered from what was drafted before."""
    missing: int = 0
    """Of these, not held: the engine has to send the whole sequence."""
    tokens: int = 0
    """Tokens guessed, ahead included."""
    passes: int = 0
    """Forward passes, those of prompts included."""
    prefill_tokens: int = 0
    """Tokens read without guessing: prompts, and steps that were made without a draft."""
    evictions: int = 0
    """Sequences forgotten for want of memory."""


@dataclass
class Work:
    """One row under way."""

    k: int
    sequence: Sequence | None
    """None: it is not held, too long, or has found no memory."""
    length: int = 0
    """Its length when it was asked for; where it has another now, a later ask goes on with it."""
    missing: bool = False

    def guess(self) -> Guess:
        """As many of the k tokens as there are."""
        return Guess(self._chain(0, self.k), self.missing)

    def ahead(self) -> AheadGuess:
        """What follows if all k are accepted: the draft's next token, and the k after it."""
        beyond = self._chain(self.k, 2 * self.k + 1)
        return AheadGuess(beyond[0], beyond[1:]) if beyond else AheadGuess(-1, [])

    def _chain(self, first: int, last: int) -> list[int]:
        sequence = self.sequence
        if sequence is None or sequence.length != self.length:
            return []
        end = min(self.length + last, sequence.known)
        tokens: list[int] = sequence.ids[self.length + first : end].tolist()
        return tokens


class Drafter:
    """A draft model and the sequences it holds. For one thread."""

    def __init__(
        self,
        model_dir: Path | str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        cache_gib: float,
        max_len: int | None = None,
        threads: int | None = None,
        prefill_ms: float = _PREFILL_MS,
    ) -> None:
        """Load the model.

        Args:
            dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on GPUs, and on CPUs that
                multiply it natively where the weights are stored so; otherwise float32.
            max_len: longest sequence, in tokens; the model's own by default and never more; less
                where the cache is small (`max_tokens`).
            threads: torch's threads for this whole process; None leaves them as they are.
            prefill_ms: about how long prompts may hold an answer up.

        Raises:
            ModelError: the model is none that `Llama` computes.
            ServeError: `cache_gib` holds too little to guess from.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device)
        compute = _compute_dtype(Path(model_dir), dtype, self._device)
        self._llama = Llama(Path(model_dir), device=self._device, dtype=compute)
        shape = self._llama.shape
        longest = min(max_len or shape.max_len, shape.max_len)
        self.vocab_size = shape.vocab_size
        self.counts = Counts()
        self._cache = Cache(
            shape, max_len=longest, gib=cache_gib, device=self._device, dtype=compute
        )
        self.max_tokens = self._cache.max_len
        """Longest sequence it takes, guesses included."""
        if self.max_tokens < longest:
            _log.warning(
                "draft.cache_gib %g is small for texts of %d tokens: beyond %d nothing is drafted",
                cache_gib, longest, self.max_tokens,
            )  # fmt: skip
        self._waiting: dict[Sequence, None] = {}
        self._prefill_s = prefill_ms / 1e3
        self._token_s = _FIRST_TOKEN_S

    def check(self, rows: Rows[Row]) -> None:
        """Refuse rows that cannot come from an engine with this vocabulary.

        Raises:
            ValueError: an id that is no row of the embedding, a negative number, or no text at all.
        """
        for row in rows:
            if row.k < 0 or row.base_len < 0 or row.base_len + len(row.tokens) == 0:
                raise ValueError(f"no row has k {row.k}, base_len {row.base_len} and no text")
            if row.tokens and not 0 <= min(row.tokens) <= max(row.tokens) < self.vocab_size:
                raise ValueError(f"an id is not below {self.vocab_size}")

    def propose(self, rows: Rows[Row], owner: str = "") -> list[Guess]:
        """The next tokens of each row.

        Args:
            rows: of one engine step; from this process, or `check`ed.
            owner: the engine that asks; the cache is shared fairly between owners.

        Returns:
            Per row at most `k` tokens: none while its prompt is being read (ask on), fewer at the
            end of the context.
        """
        works = self.take_up([(owner, rows)])[0]
        self.finish(works)
        return [work.guess() for work in works]

    def take_up(self, asks: Rows[tuple[str, Rows[Row]]]) -> list[list[Work]]:
        """Bring the sequences of several owners' rows up to date; computes nothing yet.

        What is taken up together is not evicted for each other's sake.
        """
        self._cache.turn += 1
        rows = [(owner, row) for owner, each in asks for row in each]
        # Those that are held come first: newcomers must not push them out.
        order = sorted(range(len(rows)), key=lambda index: rows[index][1].base_len == 0)
        done = {index: self._take_up(rows[index][1], rows[index][0]) for index in order}
        works = [done[index] for index in range(len(rows))]
        self.counts.rows += len(works)
        self.counts.missing += sum(work.missing for work in works)
        self.counts.evictions = self._cache.evictions
        following = iter(works)
        return [list(islice(following, len(each))) for _, each in asks]

    def finish(self, works: Rows[Work]) -> None:
        """Draft until each row has its k tokens or must wait for its prompt to be read."""
        goals = self._goals(works, ahead=False)
        answered = sum(work.sequence is not None and work.sequence not in goals for work in works)
        self.counts.hits += answered
        ready = self._read_prompts(goals)
        while ready:
            self._pass(ready)
            ready = [sequence for sequence in ready if sequence.known < goals[sequence]]

    def draft_ahead(self, works: Rows[Work]) -> None:
        """One pass of guessing beyond the k tokens, for `Work.ahead`; repeat it while `lacks`.

        If what it assumes comes true, the next `propose` is free; else nothing is lost.
        """
        if ready := self._ready_ahead(works):
            self._pass(ready)

    def lacks(self, works: Rows[Work]) -> bool:
        """Whether `draft_ahead` has more to do for these rows."""
        return bool(self._ready_ahead(works))

    def read_on(self) -> bool:
        """Read a part of a prompt that is waiting; False where none is."""
        self._waiting = {
            sequence: None
            for sequence in self._waiting
            if sequence in self._cache and _behind(sequence) > 2
        }
        if not self._waiting:
            return False
        sequence = min(self._waiting, key=_behind)
        self._read(sequence, min(_behind(sequence) - 1, self._affordable(self._prefill_s)))
        return True

    def _ready_ahead(self, works: Rows[Work]) -> list[Sequence]:
        return [each for each in self._goals(works, ahead=True) if _behind(each) <= 2]

    def _take_up(self, row: Row, owner: str) -> Work:
        cache, total = self._cache, row.base_len + len(row.tokens)
        if total > self.max_tokens:
            return Work(row.k, None)
        room = min(total + 2 * row.k + 1, self.max_tokens)
        if row.base_len:
            held, at, new = cache.find(row.prev, row.base_len), row.base_len, row.tokens
            if held is None:
                return Work(row.k, None, missing=True)
        else:
            held, at, new = cache.find(digest(row.tokens), total), total, []
        sequence: Sequence | None
        if held is None:
            sequence = cache.new(row.tokens, owner, room)
        elif (
            held.used == cache.turn and held.length == total and held.ids[at:total].tolist() == new
        ):
            sequence, new = held, []
        elif held.used < cache.turn and held.length == at:
            sequence = held
        else:
            sequence = cache.fork(held, at, owner, room)
        if sequence is None or not cache.reserve(sequence, room):
            return Work(row.k, None)
        sequence.used = cache.turn
        if held is not None:
            sequence.append(new)
        cache.name(sequence)
        return Work(row.k, sequence, total)

    def _goals(self, works: Iterable[Work], *, ahead: bool) -> dict[Sequence, int]:
        """Sequences that know fewer tokens than they should, with how many they should."""
        goals: dict[Sequence, int] = {}
        for work in works:
            sequence = work.sequence
            if sequence is None or sequence.length != work.length or sequence not in self._cache:
                continue
            wanted = 2 * work.k + 1 if ahead and work.k else work.k
            goal = min(work.length + wanted, self.max_tokens, sequence.size)
            if goal > max(sequence.known, goals.get(sequence, 0)):
                goals[sequence] = goal
        return goals

    def _read_prompts(self, goals: Mapping[Sequence, int]) -> list[Sequence]:
        """Read what can be read in time, short ones first; return those that can be guessed for."""
        left = self._prefill_s
        ready = []
        for sequence in sorted(goals, key=_behind):
            started = time.perf_counter()
            if _behind(sequence) > 2 and left > 0:
                self._read(sequence, min(_behind(sequence) - 1, self._affordable(left)))
                left -= time.perf_counter() - started
            if _behind(sequence) > 2:
                self._waiting[sequence] = None
            else:
                ready.append(sequence)
        return ready

    def _affordable(self, seconds: float) -> int:
        return max(int(seconds / self._token_s), _FEWEST_READ)

    def _read(self, sequence: Sequence, count: int) -> None:
        started = time.perf_counter()
        end = sequence.cached + count
        self._forward([sequence], [end], count)
        sequence.cached = end
        self.counts.prefill_tokens += count
        if count >= _FEWEST_READ:
            self._token_s += 0.5 * ((time.perf_counter() - started) / count - self._token_s)

    def _pass(self, sequences: Rows[Sequence]) -> None:
        """Guess one token more for sequences at most two behind."""
        ordered = sorted(sequences, key=lambda sequence: sequence.start)
        late = [sequence for sequence in ordered if _behind(sequence) == 2]
        count = 2 if late else 1
        if late and len(ordered) - len(late) > _TOGETHER:
            self._forward(late, [sequence.cached + 1 for sequence in late], 1)
            count = 1
        # Who is one behind beside others two behind computes a token again, to the same values.
        states = self._forward(ordered, [sequence.known for sequence in ordered], count)
        chosen: list[int] = self._llama.choose(states).tolist()
        for sequence, token in zip(ordered, chosen, strict=True):
            sequence.cached = sequence.known
            sequence.guess(token)
        self.counts.tokens += len(chosen)

    def _forward(self, sequences: Rows[Sequence], ends: Rows[int], count: int) -> Tensor:
        """Read tokens [end - count, end) of each sequence; see `Llama.advance`."""
        self.counts.passes += 1
        rows = zip(sequences, ends, strict=True)
        ids = np.stack([sequence.ids[end - count : end] for sequence, end in rows])
        places = self._cache.places(sequences, ends, count)
        given = torch.from_numpy(ids).to(self._device)
        return self._llama.advance(given, places, self._cache.arena)


def _behind(sequence: Sequence) -> int:
    """Tokens to read before the next can be guessed; the last one always is."""
    return max(sequence.known - sequence.cached, 1)


def _compute_dtype(model_dir: Path, dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        config = read_config(model_dir)
        stored = config.get("dtype") or config.get("torch_dtype")
        native = device.type == "cuda" or (stored == "bfloat16" and _cpu_multiplies_bfloat16())
        return torch.bfloat16 if native else torch.float32
    if dtype == "float16" and device.type == "cpu":
        return torch.float32
    named: torch.dtype = getattr(torch, dtype)
    return named


def _cpu_multiplies_bfloat16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
