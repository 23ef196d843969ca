"""A draft that runs elsewhere, asked from inside an engine's step: never late, never in the way.

`RemoteDraft` chooses a replica, greets it, asks it once per step and waits until a deadline;
whatever goes wrong, the step goes on with fewer proposals or none. With overlap the replica goes on
drafting while the target verifies, and a step in which everything was accepted finds its proposals
here already. Knows token ids, not models. For one thread; it waits for nothing but answers, and a
step without a usable replica costs a few microseconds.
"""

import logging
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import msgspec
import xxhash
import zmq

from altiplano.config.serving import DraftSettings
from altiplano.serving.speculation.channel import Report
from altiplano.serving.speculation.connection import (
    Breaker,
    Connection,
    ConnectionLost,
    Deadline,
)
from altiplano.serving.speculation.protocol import (
    VERSION,
    Ahead,
    Answer,
    Ask,
    FromDraft,
    Hello,
    Refused,
    Row,
    Welcome,
)
from altiplano.serving.speculation.sequences import Line, Mirror, check_ids

_log = logging.getLogger(__name__)

_PATIENCE_S = 1.0
"""A replica that owes an answer for so long is given up; until then it is asked nothing more, and
nobody waits for it."""
_DIGESTING_S = 30.0
"""The same for one that reads long sequences."""
_SHORT = 64
"""A row with more new tokens is sent to be read, not waited for."""
_REMEMBERED_ASKS = 4


class Addresses(Protocol):
    """Whoever knows where drafts listen (`channel.Link`)."""

    addresses: list[str]


@dataclass(slots=True)
class _Sent:
    """An ask on its way."""

    names: list[int]
    """Digests of its rows' sequences."""
    rows: list[Row]
    at: float
    digesting: bool
    guesses: list[list[int]] | None = None


class RemoteDraft:
    """The draft replica of the moment."""

    def __init__(
        self, hello: Hello, settings: DraftSettings, drafts: Addresses, counts: Report, engine: str
    ) -> None:
        """Nothing is connected before the first `ready`.

        Args:
            hello: what this engine serves.
            drafts: its `addresses` are looked at in every step.
            counts: fallbacks, hits and misses are counted there.
            engine: any text that tells this engine from others; spreads engines over replicas.
        """
        self._hello = hello
        self._settings = settings
        self._drafts = drafts
        self._counts = counts
        self._engine = engine
        self._known: list[str] = []
        self._breakers: dict[str, Breaker] = {}
        self._connection: Connection | None = None
        self._step = 0
        self.steady = True
        """Always: long sequences are read while nobody waits."""
        self._reset(0.0)

    def ready(self) -> bool:
        """Whether to ask now; counts why not. Takes what has arrived, connects where needed."""
        now = monotonic()
        self._follow(now)
        try:
            if self._connection is None and not self._connect(now):
                return False
            self._drain()
        except (ConnectionLost, zmq.ZMQError) as error:
            return self._give_up("disconnected", error)
        except (msgspec.DecodeError, ValueError) as error:
            return self._give_up("malformed", error)
        return self._is_free(now)

    def propose(self, lines: list[Line]) -> list[list[int]]:
        """Proposals for each line, at most `line.k`; empty where there are none in time.

        Call it only after `ready` said yes in the same step.
        """
        found = self._take_ahead(lines)
        try:
            self._ask(lines, found)
        except (ConnectionLost, zmq.ZMQError) as error:
            self._give_up("disconnected", error)
        except (msgspec.DecodeError, ValueError) as error:
            self._give_up("malformed", error)
        return [tokens or [] for tokens in found]

    def close(self) -> None:
        """Leave the replica."""
        self._disconnect()

    # Which replica.

    def _follow(self, now: float) -> None:
        addresses = self._drafts.addresses
        if addresses == self._known:
            return
        self._known = addresses
        self._breakers = {each: self._breakers.get(each) or Breaker() for each in addresses}
        if self._connection is not None and self._connection.address != self._choose(now):
            self._disconnect()

    def _choose(self, now: float) -> str | None:
        """By rendezvous hashing: most engines keep their replica when another comes or goes."""
        allowed = (each for each, breaker in self._breakers.items() if not breaker.is_open(now))
        return max(
            allowed,
            key=lambda each: xxhash.xxh3_64_intdigest(f"{self._engine} {each}".encode()),
            default=None,
        )

    def _connect(self, now: float) -> bool:
        address = self._choose(now)
        self._counts.breaker_open = bool(self._known) and address is None
        if address is None:
            refused = self._known and all(each.refusal for each in self._breakers.values())
            reason = "breaker" if self._known else "no_draft"
            self._counts.fell_back("vocabulary" if refused else reason)
            return False
        self._reset(now)
        self._connection = Connection(address)
        self._connection.send(self._hello)
        return True

    def _reset(self, now: float) -> None:
        self._greeted_at = now
        self._welcome: Welcome | None = None
        self._mirror = Mirror()
        self._deadline = Deadline(self._settings.deadline_ms / 1000)
        self._sent: dict[int, _Sent] = {}
        self._owed: _Sent | None = None
        self._ahead: dict[int, tuple[list[int], list[int]]] = {}

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _give_up(self, reason: str, error: object, *, at_once: bool = True) -> bool:
        """Count a failure and, where the breaker opens by it, leave the replica; always False."""
        self._counts.fell_back(reason)
        # A connection that could not even be opened was for the address chosen now.
        now = monotonic()
        address = self._connection.address if self._connection else self._choose(now)
        breaker = self._breakers.get(address or "")
        if breaker is not None:
            breaker.failed(now, at_once=at_once)
            if breaker.is_open(now):
                _log.warning("draft %s is left alone for a while: %s", address, error)
                self._disconnect()
        return False

    # What it says.

    def _is_free(self, now: float) -> bool:
        if self._connection is None:  # It refused us just now.
            self._counts.fell_back("vocabulary")
            return False
        if self._welcome is None:
            if now - self._greeted_at > _PATIENCE_S:
                return self._give_up("deadline", "it does not answer a greeting")
            self._counts.fell_back("connecting")
            return False
        if self._owed is None:
            return True
        patience = _DIGESTING_S if self._owed.digesting else _PATIENCE_S
        if now - self._owed.at > patience:
            return self._give_up("deadline", "it does not answer")
        self._counts.fell_back("busy")
        return False

    def _drain(self) -> None:
        while self._connection is not None:
            message = self._connection.receive()
            if message is None:
                return
            self._take(message)

    def _take(self, message: FromDraft) -> None:
        """Use a message.

        Raises:
            ValueError: it is not what an honest replica would say.
        """
        if isinstance(message, Answer):
            self._take_answer(message)
        elif isinstance(message, Ahead):
            self._take_guesses(message)
        elif isinstance(message, Welcome):
            self._take_welcome(message)
        else:
            self._refuse(message)

    def _take_welcome(self, welcome: Welcome) -> None:
        theirs = (welcome.version, welcome.vocab_digest, welcome.vocab_size)
        ours = (VERSION, self._hello.vocab_digest, self._hello.vocab_size)
        if theirs != ours:
            self._refuse(Refused(f"it speaks {theirs}, this engine {ours}"))
        else:
            self._welcome = welcome

    def _refuse(self, refused: Refused) -> None:
        assert self._connection is not None
        address = self._connection.address
        _log.error("draft %s does not fit this engine: %s", address, refused.reason)
        if address in self._breakers:
            self._breakers[address].refusal = refused.reason
        self._disconnect()

    def _take_answer(self, answer: Answer) -> None:
        sent = self._sent.get(answer.step)
        if sent is None or sent.guesses is not None:
            return
        if len(answer.rows) != len(sent.rows):
            raise ValueError(f"{len(answer.rows)} guesses for {len(sent.rows)} rows")
        guesses = [guess.tokens for guess in answer.rows]
        check_ids(guesses, self._hello.vocab_size)
        for name, row, guess in zip(sent.names, sent.rows, answer.rows, strict=True):
            if len(guess.tokens) > row.k:
                raise ValueError(f"{len(guess.tokens)} tokens guessed, {row.k} asked for")
            if guess.missing:
                self._mirror.forget(name)
        sent.guesses = guesses
        if sent is self._owed:
            self._owed = None

    def _take_guesses(self, ahead: Ahead) -> None:
        sent = self._sent.get(ahead.step)
        if sent is None or sent.guesses is None:
            return
        if len(ahead.rows) != len(sent.rows):
            raise ValueError(f"{len(ahead.rows)} guesses ahead for {len(sent.rows)} rows")
        check_ids([each.tokens for each in ahead.rows], self._hello.vocab_size)
        for name, tokens, each in zip(sent.names, sent.guesses, ahead.rows, strict=True):
            self._ahead[name] = ([*tokens, each.guess], each.tokens)

    # One step.

    def _take_ahead(self, lines: list[Line]) -> list[list[int] | None]:
        """Per line the proposals made ahead; None where it has to be asked for."""
        found: list[list[int] | None] = []
        for line in lines:
            expected, tokens = self._ahead.get(line.before, ([], []))
            found.append(tokens[: line.k] if tokens and expected == line.fresh else None)
        self._ahead = {}
        return found

    def _ask(self, lines: list[Line], found: list[list[int] | None]) -> None:
        """Ask for all lines, wait for those that `found` lacks, and put them there."""
        assert self._welcome is not None
        short: list[tuple[int, Row]] = []
        long: list[tuple[int, Row]] = []
        for index, line in enumerate(lines):
            tokens = found[index]
            k = min(line.k, self._welcome.max_tokens - line.length)
            if k > 0:
                row = self._mirror.row(line, k if tokens is None else len(tokens))
                (short if len(row.tokens) <= _SHORT else long).append((index, row))
                self._count_ahead(row, tokens)
        if short:
            sent = self._send(lines, short, digesting=False)
            # Who was guessed ahead is only told of, so that the draft goes on from there.
            if any(found[index] is None for index, _ in short) and self._wait(sent):
                assert sent.guesses is not None
                for (index, _), tokens in zip(short, sent.guesses, strict=True):
                    found[index] = found[index] or tokens
        if long and self._owed is None and self._connection is not None:
            self._owed = self._send(lines, long, digesting=True)
        else:
            for index, _ in long:
                self._mirror.forget(lines[index].now)

    def _count_ahead(self, row: Row, tokens: list[int] | None) -> None:
        if tokens is not None:
            self._counts.ahead_hits += 1
        elif self._settings.overlap and row.base_len:
            self._counts.ahead_misses += 1

    def _send(self, lines: list[Line], asked: list[tuple[int, Row]], *, digesting: bool) -> _Sent:
        assert self._connection is not None
        self._step += 1
        rows = [row for _, row in asked]
        sent = _Sent([lines[index].now for index, _ in asked], rows, monotonic(), digesting)
        self._sent[self._step] = sent
        if len(self._sent) > _REMEMBERED_ASKS:
            del self._sent[next(iter(self._sent))]
        overlap = self._settings.overlap and not digesting
        self._connection.send(Ask(self._step, rows, overlap))
        return sent

    def _wait(self, sent: _Sent) -> bool:
        """Wait for the answer until the deadline; whether it came."""
        wait_s = self._deadline.seconds()
        while sent.guesses is None and self._connection is not None:
            left = sent.at + wait_s - monotonic()
            message = self._connection.receive(max(0.0, left))
            if message is not None:
                self._take(message)
            if sent.guesses is None and (message is None or left < 0):
                self._owed = sent
                self._deadline.missed()
                return self._give_up(
                    "deadline", f"no answer in {wait_s * 1000:.0f} ms", at_once=False
                )
        if self._connection is None:
            return False
        self._deadline.answered(monotonic() - sent.at)
        self._breakers[self._connection.address].succeeded()
        return True
