"""A draft's socket: engines ask, all that ask at once are answered by the same passes.

One thread waits, drafts and answers. Between any two forward passes it looks whether somebody asks:
guessing ahead and reading prompts are done in the gaps, and never keep an answer waiting for more
than one pass. Who speaks another version or vocabulary is refused; what is no message is dropped
and counted. Knows no Ray. It costs a thread and, while nobody asks, a wake-up every tenth second.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass

import msgspec
import zmq

from altiplano.serving.speculation.drafter import Drafter, Work
from altiplano.serving.speculation.protocol import (
    VERSION,
    Ahead,
    Answer,
    Ask,
    FromDraft,
    Hello,
    Refused,
    Welcome,
    decode_from_engine,
    encode,
)

_log = logging.getLogger(__name__)

_IDLE_MS = 100
_LARGEST_MESSAGE = 64 << 20
_PEERS_KEPT = 1024
_WINDOW_S = 5.0


@dataclass
class Traffic:
    """Totals since the start."""

    asks: int = 0
    refused: int = 0
    malformed: int = 0
    """Messages that were none, or asked for the impossible."""
    strangers: int = 0
    """Asks by engines that were not welcomed."""


@dataclass
class _Outstanding:
    """An answered ask whose continuation is still being guessed."""

    step: int
    works: list[Work]


class DraftServer:
    """Answers engines until it is stopped."""

    def __init__(self, drafter: Drafter, *, vocab_digest: str, host: str) -> None:
        """Listen on a free port of `host`; `start` begins to answer.

        Args:
            drafter: from now on only this server's.
            vocab_digest: `protocol.vocab_digest` of the draft.

        Raises:
            zmq.ZMQError: `host` is no address of this machine.
        """
        self._drafter = drafter
        self._vocab_digest = vocab_digest
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_MESSAGE)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self.error: BaseException | None = None
        """What ended the thread."""
        self._welcomed: dict[bytes, None] = {}
        self._outstanding: dict[bytes, _Outstanding] = {}
        self._traffic = Traffic()
        self._stopping = threading.Event()
        self._busy_s = 0.0
        self._samples = deque([(time.monotonic(), 0.0)])
        self._thread = threading.Thread(target=self._run, name="draft-server", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the socket."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def busy(self) -> float:
        """Share of the last seconds spent on answers and prompts, 0 to 1.

        Guessing ahead is left out: it fills gaps, and another replica would fill its own.
        """
        now = time.monotonic()
        self._samples.append((now, self._busy_s))
        while len(self._samples) > 2 and self._samples[1][0] < now - _WINDOW_S:
            self._samples.popleft()
        since, before = self._samples[0]
        return min((self._busy_s - before) / max(now - since, 1e-3), 1.0)

    def counts(self) -> dict[str, int]:
        """Totals since the start: of `drafter.Counts` and `Traffic`."""
        return {**asdict(self._drafter.counts), **asdict(self._traffic)}

    def _run(self) -> None:
        try:
            pause_ms = 0
            while not self._stopping.is_set():
                asks = self._receive(pause_ms)
                pause_ms = 0
                started = time.monotonic()
                if asks:
                    self._answer(asks)
                elif self._outstanding:
                    self._go_on()
                    continue
                elif not self._drafter.read_on():
                    pause_ms = _IDLE_MS
                self._busy_s += time.monotonic() - started
        except BaseException as error:
            self.error = error
            _log.exception("the draft's server died")
        finally:
            self._socket.close(0)

    def _receive(self, wait_ms: int) -> list[tuple[bytes, Ask]]:
        """All asks that are here; greetings are answered at once."""
        asks: list[tuple[bytes, Ask]] = []
        if not self._socket.poll(wait_ms):
            return asks
        while True:
            try:
                peer, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return asks
            ask = self._read(peer, parts)
            if ask is not None:
                asks.append((peer, ask))

    def _read(self, peer: bytes, parts: list[bytes]) -> Ask | None:
        try:
            message = decode_from_engine(b"".join(parts))
            if isinstance(message, Ask):
                self._drafter.check(message.rows)
        except (msgspec.DecodeError, ValueError):
            self._traffic.malformed += 1
            return None
        if isinstance(message, Hello):
            self._greet(peer, message)
            return None
        if peer not in self._welcomed:
            self._traffic.strangers += 1
            return None
        self._traffic.asks += 1
        return message

    def _greet(self, peer: bytes, hello: Hello) -> None:
        reason = self._misfit(hello)
        if reason is not None:
            self._traffic.refused += 1
            self._send(peer, Refused(reason))
            return
        self._welcomed[peer] = None
        if len(self._welcomed) > _PEERS_KEPT:
            del self._welcomed[next(iter(self._welcomed))]
        drafter = self._drafter
        self._send(
            peer, Welcome(VERSION, self._vocab_digest, drafter.vocab_size, drafter.max_tokens)
        )

    def _misfit(self, hello: Hello) -> str | None:
        for what, theirs, ours in (
            ("version", hello.version, VERSION),
            ("vocabulary digest", hello.vocab_digest, self._vocab_digest),
            ("vocabulary size", hello.vocab_size, self._drafter.vocab_size),
        ):
            if theirs != ours:
                return f"the engine's {what} is {theirs}, the draft's {ours}"
        return None

    def _answer(self, asks: list[tuple[bytes, Ask]]) -> None:
        """Answer the newest ask of each engine; of older ones only take up what they say."""
        newest = dict(asks)
        for peer, ask in asks:
            if newest[peer] is not ask:
                self._drafter.take_up([(peer.hex(), ask.rows)])
        taken = self._drafter.take_up([(peer.hex(), ask.rows) for peer, ask in newest.items()])
        self._drafter.finish([work for works in taken for work in works])
        for (peer, ask), works in zip(newest.items(), taken, strict=True):
            self._send(peer, Answer(ask.step, [work.guess() for work in works]))
            self._outstanding.pop(peer, None)
            if ask.overlap:
                self._outstanding[peer] = _Outstanding(ask.step, works)

    def _go_on(self) -> None:
        """One pass of guessing ahead for all engines; send what is done."""
        works = [work for each in self._outstanding.values() for work in each.works]
        self._drafter.draft_ahead(works)
        for peer, each in list(self._outstanding.items()):
            if not self._drafter.lacks(each.works):
                del self._outstanding[peer]
                self._send(peer, Ahead(each.step, [work.ahead() for work in each.works]))

    def _send(self, peer: bytes, message: FromDraft) -> None:
        """Send without waiting: who reads too slowly, or is gone, misses it."""
        try:
            self._socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            _log.debug("a draft's answer was dropped: its engine does not read")
