"""The socket between an engine's process and its replica's: draft addresses in, counters out.

vLLM runs the engine in a process of its own that Ray does not know. `Link` is the engine's end, a
thread that wakes twice a second, so that the engine's steps never touch this socket; `bridge.py` is
the other end. Knows neither drafts nor metrics.
"""

import threading
import time

import msgspec
import zmq

_WAKE_S = 0.25
_REPORT_S = 0.5


class Drafts(msgspec.Struct, array_like=True):
    """Replica to engine: where drafts listen now."""

    addresses: list[str]


class Report(msgspec.Struct):
    """Engine to replica: totals since the engine started, and what holds now."""

    steps: int = 0
    """Engine steps that verified proposals."""
    proposed: int = 0
    accepted: int = 0
    accepted_at: list[int] = []
    """By position: how often the proposal at it was accepted."""
    fallbacks: dict[str, int] = {}
    """Steps that wanted a draft and went on without one, by reason."""
    ahead_hits: int = 0
    """Rows whose proposals had been made ahead."""
    ahead_misses: int = 0
    latencies_ms: list[float] = []
    """Times of the latest calls that drafted, since the last report; at most a few hundred."""
    breaker_open: bool = False
    """Whether every known draft failed and is left alone for a while."""
    tokens_per_step: int = 0
    """Tokens wanted per row in the latest step; 0: speculation is off."""

    def fell_back(self, reason: str) -> None:
        """Count a step that went on without the draft."""
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1


class Link:
    """The engine's end."""

    def __init__(self, address: str, counts: Report) -> None:
        """Connect in the background.

        Args:
            address: the bridge's `channel`.
            counts: sent as they stand; the owner goes on changing them.
        """
        self.addresses: list[str] = []
        """The latest addresses; replaced, never changed in place."""
        self._address = address
        self._counts = counts
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="draft-link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; waits for it for a second at most."""
        self._over.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        last, sent_at = b"", 0.0
        with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
            socket.linger = 0
            socket.sndhwm = 4
            socket.connect(self._address)
            while not self._over.is_set():
                if socket.poll(int(_WAKE_S * 1000)):
                    self.addresses = msgspec.msgpack.decode(socket.recv(), type=Drafts).addresses
                if time.monotonic() - sent_at >= _REPORT_S:
                    sent_at = time.monotonic()
                    last = self._send(socket, last)

    def _send(self, socket: "zmq.Socket[bytes]", last: bytes) -> bytes:
        """Send the counters where they differ from the last ones sent; returns them."""
        data = msgspec.msgpack.encode(self._counts)
        if data != last:
            self._counts.latencies_ms = []
            try:
                socket.send(data, zmq.NOBLOCK)
            except zmq.Again:  # Nobody takes them: the totals go with the next report.
                return last
        return data
