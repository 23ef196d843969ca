"""The socket between replicas and the HTTP side: order, batches, peers that are gone. A second."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import zmq

from altiplano.serving import link
from altiplano.serving.link import Inbox, Outbox
from altiplano.serving.messages import Step, unpack

T = TypeVar("T")


def _run(scenario: Callable[[], Awaitable[T]]) -> T:
    return asyncio.run(asyncio.wait_for(scenario(), 20))


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_each_job_gets_its_steps_in_order_and_nobody_elses() -> None:
    async def scenario() -> None:
        inbox, outbox = Inbox.open("127.0.0.1"), Outbox()
        streams = {job: inbox.expect(job) for job in ("a", "b")}
        for number in range(200):
            for job in ("a", "unknown", "b"):
                outbox.send(inbox.address, Step(job, [number], logprobs=[[(number, -0.5, 1)]]))
            if number % 7 == 0:
                await asyncio.sleep(0)
        for job, stream in streams.items():
            for number in range(200):
                step = await stream.get()
                assert step == Step(job, [number], logprobs=[[(number, -0.5, 1)]])
        outbox.close()
        inbox.close()

    _run(scenario)


def test_steps_of_one_turn_of_the_loop_are_one_message() -> None:
    async def scenario() -> list[list[Step]]:
        reader = zmq.Context.instance().socket(zmq.PULL)
        port = reader.bind_to_random_port("tcp://127.0.0.1")
        outbox = Outbox()
        for turn in range(2):
            for job in range(32):
                outbox.send(f"tcp://127.0.0.1:{port}", Step(str(job), [turn]))
            await asyncio.sleep(0)
        messages = [await asyncio.to_thread(reader.recv) for _ in range(2)]
        outbox.close()
        reader.close(0)
        return [unpack(message, list[Step]) for message in messages]  # type: ignore[misc,arg-type]

    assert [[step.tokens for step in steps] for steps in _run(scenario)] == [
        [[turn]] * 32 for turn in range(2)
    ]


def test_a_job_that_lost_a_step_never_gets_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer with a hole would look whole."""
    monkeypatch.setattr(link, "_HIGH_WATER", 3)

    async def scenario() -> list[Step]:
        address, outbox = _free_address(), Outbox()
        for number in range(2000):
            outbox.send(address, Step("lost", [number]))
            await asyncio.sleep(0)
        reader = zmq.Context.instance().socket(zmq.PULL)
        reader.bind(address)
        seen: list[Step] = []

        def receive() -> None:
            seen.extend(unpack(reader.recv(), list[Step]))  # type: ignore[call-overload]

        await asyncio.to_thread(receive)
        while True:
            # The peer takes messages again: of this job nothing may follow, of others everything.
            outbox.send(address, Step("lost", [-1]))
            outbox.send(address, Step("next", [1]))
            await asyncio.sleep(0.01)
            await asyncio.to_thread(receive)
            if seen[-1].id == "next":
                break
        outbox.close()
        reader.close(0)
        return [step for step in seen if step.id == "lost"]

    kept = [step.tokens[0] for step in _run(scenario)]
    assert kept == list(range(len(kept)))
    assert len(kept) < 2000


def test_what_is_no_message_is_ignored() -> None:
    async def scenario() -> None:
        inbox = Inbox.open("127.0.0.1")
        stream = inbox.expect("a")
        writer = zmq.Context.instance().socket(zmq.PUSH)
        writer.connect(inbox.address)
        for garbage in (b"", b"\xc1", b"GET / HTTP/1.1", b"\x93\x01\x02\x03"):
            writer.send(garbage)
        outbox = Outbox()
        # Two sockets: the garbage may come later than this, and must not stop what follows.
        for number in range(50):
            outbox.send(inbox.address, Step("a", [number]))
            await asyncio.sleep(0.001)
        assert [(await stream.get()).tokens for _ in range(50)] == [[n] for n in range(50)]
        writer.close(0)
        outbox.close()
        inbox.close()

    _run(scenario)


def test_a_closed_stream_keeps_nothing() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        stream = inbox.expect("a")
        stream.close()
        inbox.deliver([Step("a", [1])])
        assert await stream.get_unless(lambda: True) is None

    _run(scenario)
