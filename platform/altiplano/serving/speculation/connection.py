"""One connection to one draft replica, and when to leave a replica alone.

`Connection` is a ZeroMQ DEALER that notices at once when its peer goes; it never reconnects by
itself, because a replica that comes back holds nothing and has to be greeted anew. Knows how
messages look, not what they are for.
"""

import math
from collections import deque
from statistics import median

import zmq
from zmq.utils.monitor import recv_monitor_message

from altiplano.serving.speculation.protocol import (
    FromDraft,
    FromEngine,
    decode_from_draft,
    encode,
)

_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED


class ConnectionLost(Exception):
    """The peer closed, died or was never there."""


class Connection:
    """A socket to one address."""

    def __init__(self, address: str) -> None:
        """Begin to connect; what is sent before that is done waits in the socket.

        Raises:
            zmq.ZMQError: `address` is none.
        """
        self.address = address
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 64
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._events: zmq.Socket[bytes] = self._socket.get_monitor_socket(_GONE)
        self._poller = zmq.Poller()
        for socket in (self._socket, self._events):
            self._poller.register(socket, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise

    def send(self, message: FromEngine) -> None:
        """Send without waiting.

        Raises:
            ConnectionLost: the peer takes nothing any more.
        """
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise ConnectionLost(f"{self.address} takes no more messages") from None

    def receive(self, wait_s: float = 0.0) -> FromDraft | None:
        """The next message; None where none came within `wait_s` seconds (to the millisecond).

        Raises:
            ConnectionLost: the peer is gone, and everything it had sent was received.
            msgspec.DecodeError: it sent something that is no message.
        """
        ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
        if self._socket in ready:
            return decode_from_draft(self._socket.recv(zmq.NOBLOCK))
        if self._events in ready:
            recv_monitor_message(self._events, zmq.NOBLOCK)
            raise ConnectionLost(f"{self.address} closed the connection")
        return None

    def close(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        self._socket.disable_monitor()
        self._socket.close(0)


class Breaker:
    """Leaves a replica alone after failures in a row, and tries it again after a growing pause."""

    FAILURES = 3
    """In a row, until it opens; one where it has just been tried again."""
    PAUSE_S = (0.2, 5.0)
    """First and longest pause, in seconds; doubled each time."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause = self.PAUSE_S[0]
        self._closed_from = 0.0
        self.refusal: str | None = None
        """Why the replica never fits; it is not tried again."""

    def is_open(self, now: float) -> bool:
        """Whether to leave the replica alone at `now` (`time.monotonic` seconds)."""
        return self.refusal is not None or now < self._closed_from

    def succeeded(self) -> None:
        """It answered."""
        self._failures = 0
        self._pause = self.PAUSE_S[0]

    def failed(self, now: float, *, at_once: bool = False) -> None:
        """It did not answer in time; `at_once`: it cannot be used at all, so open."""
        self._failures += 1
        if at_once or self._failures >= self.FAILURES:
            self._closed_from = now + self._pause
            self._pause = min(2 * self._pause, self.PAUSE_S[1])
            self._failures = self.FAILURES - 1


class Deadline:
    """How long to wait for an answer: a few usual round trips, never more than `longest_s`."""

    SAMPLES = 32
    """Round trips remembered; with fewer than a quarter of them the longest wait holds."""
    FACTOR = 3.0
    SHORTEST_S = 0.002

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._trips: deque[float] = deque(maxlen=self.SAMPLES)

    def answered(self, trip_s: float) -> None:
        """An answer took this long."""
        self._trips.append(trip_s)

    def missed(self) -> None:
        """None came in time: the usual no longer holds (a longer batch, a busier draft)."""
        self._trips.clear()

    def seconds(self) -> float:
        """The wait now."""
        if len(self._trips) < self.SAMPLES // 4:
            return self._longest_s
        usual = self.FACTOR * median(self._trips)
        return min(self._longest_s, max(self.SHORTEST_S, usual))
