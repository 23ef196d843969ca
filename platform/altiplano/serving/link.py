"""Tokens from a model's replica to the HTTP side: one ZeroMQ message per engine step and peer.

A replica pushes (`Outbox`), the HTTP side pulls (`Inbox`). Ray carries the job and its end, not its
tokens, which would cost a millisecond each. Knows ids, not requests; keeps no history. A message of
32 steps costs about 0.1 ms at either end. Both classes belong to the event loop that made them.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from altiplano.serving.messages import Step, pack

_HIGH_WATER = 10_000
"""Messages kept for a peer that does not read; minutes of decoding for one that is only busy."""
_MOST_PEERS = 256
_DECODER = msgspec.msgpack.Decoder(list[Step])


class Stream:
    """The steps of one job, in order."""

    def __init__(self, inbox: "Inbox", job_id: str) -> None:
        self._inbox = inbox
        self._id = job_id
        self._steps: deque[Step] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def get(self) -> Step:
        """The next step; waits for it. One task at a time may wait."""
        while not self._steps:
            await self._change()
        return self._steps.popleft()

    async def get_unless(self, over: Callable[[], bool]) -> Step | None:
        """The next step; None where none is there and `over` says that none may come.

        `over` is asked again after each `wake`.
        """
        while not self._steps:
            if over():
                return None
            await self._change()
        return self._steps.popleft()

    def put(self, step: Step) -> None:
        """Append a step and wake who waits."""
        self._steps.append(step)
        self.wake()

    def wake(self) -> None:
        """Let `get` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Drop what still comes for this job."""
        self._inbox.forget(self._id)

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class Inbox:
    """The socket of one HTTP replica."""

    def __init__(self) -> None:
        self.address = ""
        """Where replicas reach it, e.g. `tcp://127.0.0.1:40123`; empty for one without socket."""
        self._streams: dict[str, Stream] = {}
        self._socket: zmq.Socket[bytes] | None = None

    @classmethod
    def open(cls, host: str) -> "Inbox":
        """Bind to a free port and read from it in the running event loop.

        Args:
            host: address at which replicas reach this process; `node` is this Ray node's.
        """
        if host == "node":
            import ray

            host = ray.util.get_node_ip_address()
        inbox = cls()
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        socket.setsockopt(zmq.LINGER, 0)
        if ":" in host:
            socket.setsockopt(zmq.IPV6, 1)
        port = socket.bind_to_random_port(f"tcp://[{host}]" if ":" in host else f"tcp://{host}")
        inbox.address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        inbox._socket = socket
        asyncio.get_running_loop().add_reader(socket.fileno(), inbox._drain)
        # The descriptor tells of changes only, and one may lie before the reader was there.
        asyncio.get_running_loop().call_soon(inbox._drain)
        return inbox

    def expect(self, job_id: str) -> Stream:
        """Take the steps of this job from now on; close the stream when done with it."""
        stream = self._streams[job_id] = Stream(self, job_id)
        return stream

    def forget(self, job_id: str) -> None:
        """Drop the steps of this job from now on."""
        self._streams.pop(job_id, None)

    def deliver(self, steps: list[Step]) -> None:
        """Hand steps to their streams; those of unknown jobs are dropped."""
        for step in steps:
            stream = self._streams.get(step.id)
            if stream is not None:
                stream.put(step)

    def close(self) -> None:
        """Free the port."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close(0)
            self._socket = None

    def _drain(self) -> None:
        """Read until nothing is left: the descriptor does not tell twice."""
        while self._socket is not None:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                steps = _DECODER.decode(data)
            except msgspec.DecodeError:
                # Somebody else's message: whoever reaches the port may send anything.
                continue
            self.deliver(steps)


class Outbox:
    """A replica's way to the HTTP replicas."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._pending: dict[str, list[Step]] = {}
        self._broken: set[str] = set()

    def send(self, address: str, step: Step) -> None:
        """Send a step at the end of this turn of the loop, with all others for that address.

        Never waits and never fails. Where a peer does not take its messages, a job that lost one
        step gets no further ones, so that nobody reads an answer with a hole.
        """
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.setdefault(address, []).append(step)

    def close(self) -> None:
        """Drop what is not sent."""
        for socket in self._peers.values():
            socket.close(0)
        self._peers.clear()

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for address, steps in pending.items():
            if self._broken:
                steps = self._without_broken(steps)
            try:
                self._peer(address).send(pack(steps), zmq.NOBLOCK)
            except zmq.ZMQError:
                self._broken.update(step.id for step in steps if step.finish is None)

    def _without_broken(self, steps: list[Step]) -> list[Step]:
        whole = [step for step in steps if step.id not in self._broken]
        self._broken.difference_update(step.id for step in steps if step.finish is not None)
        return whole

    def _peer(self, address: str) -> zmq.Socket[bytes]:
        socket = self._peers.get(address)
        if socket is None:
            if len(self._peers) >= _MOST_PEERS:
                # HTTP replicas come and go with new ports: the oldest is likeliest gone.
                self._peers.pop(next(iter(self._peers))).close(0)
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
            socket.setsockopt(zmq.IPV6, 1)
            socket.connect(address)
            self._peers[address] = socket
        return socket
