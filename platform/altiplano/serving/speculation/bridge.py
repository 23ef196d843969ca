"""The replica's side of speculation: tells its engine where drafts listen, exports its counters.

The engine runs in a process that Ray does not know, so its replica reads the notice board for it
and turns its counters into Ray metrics. One asyncio task, which does little once a second. Knows
the names of the metrics; neither drafts nor engines.
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from altiplano.serving.speculation.channel import Drafts, Report

_log = logging.getLogger(__name__)

Notices = Callable[[], dict[str, dict[str, Any]]]
"""Reads the notices of a model's drafts."""

_LOOK_S = 1.0
"""Seconds between two looks at the board."""
_FRESH_S = 5.0
"""Notices older than this are of a draft that is gone."""


class Metrics(Protocol):
    """Where counters go (`RayMetrics`; a list in tests)."""

    def add(self, name: str, amount: float, **tags: str) -> None:
        """Raise a counter."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""

    def time(self, name: str, milliseconds: float) -> None:
        """Add to a histogram."""


class RayMetrics:
    """Ray metrics of one model; Ray exports them from every node as `ray_<name>`."""

    def __init__(self, model: str) -> None:
        """Needs a process that is connected to Ray."""
        from ray.util.metrics import Counter, Gauge, Histogram

        def describe(name: str, *more: str) -> dict[str, Any]:
            return {"description": _DESCRIPTIONS[name], "tag_keys": ("model", *more)}

        self._model = {"model": model}
        self._counters = {
            name: Counter(name, **describe(name, *tags)) for name, tags in _COUNTERS.items()
        }
        self._gauges = {name: Gauge(name, **describe(name)) for name in _GAUGES}
        self._latency = Histogram(
            LATENCY, boundaries=[0.1, 0.3, 1, 2, 5, 10, 20, 50, 100, 500], **describe(LATENCY)
        )

    def add(self, name: str, amount: float, **tags: str) -> None:
        """As `Metrics.add`."""
        self._counters[name].inc(amount, {**self._model, **tags})

    def set(self, name: str, value: float) -> None:
        """As `Metrics.set`."""
        self._gauges[name].set(value, self._model)

    def time(self, name: str, milliseconds: float) -> None:
        """As `Metrics.time`."""
        assert name == LATENCY
        self._latency.observe(milliseconds, self._model)


PROPOSED = "altiplano_draft_proposed_tokens_total"
ACCEPTED = "altiplano_draft_accepted_tokens_total"
STEPS = "altiplano_draft_steps_total"
ACCEPTED_AT = "altiplano_draft_accepted_at"
FALLBACKS = "altiplano_draft_fallbacks_total"
LATENCY = "altiplano_draft_latency_ms"
BREAKER = "altiplano_draft_breaker_open"
TOKENS = "altiplano_draft_tokens_per_step"
HITS = "altiplano_draft_ahead_hits_total"
MISSES = "altiplano_draft_ahead_misses_total"
_COUNTERS: dict[str, tuple[str, ...]] = {
    PROPOSED: (),
    ACCEPTED: (),
    STEPS: (),
    ACCEPTED_AT: ("position",),
    FALLBACKS: ("reason",),
    HITS: (),
    MISSES: (),
}
_GAUGES = (BREAKER, TOKENS)
_DESCRIPTIONS = {
    PROPOSED: "Tokens the draft proposed and the target verified.",
    ACCEPTED: "Proposed tokens the target accepted.",
    STEPS: "Engine steps that verified proposals.",
    ACCEPTED_AT: "How often the proposal at a position was accepted.",
    FALLBACKS: "Engine steps that wanted a draft and went on without one.",
    LATENCY: "Milliseconds an engine step spends on getting proposals.",
    BREAKER: "1 while every known draft failed and is left alone for a while.",
    TOKENS: "Tokens wanted per row and step; 0: speculation is off.",
    HITS: "Rows whose proposals the draft replica had made ahead.",
    MISSES: "Rows that had to be asked for although the replica drafts ahead.",
}


class Bridge:
    """One engine's link to the cluster. Make it before the engine, whose thread connects to it."""

    def __init__(
        self,
        model_name: str,
        metrics: Metrics,
        read_notices: Notices | None = None,
    ) -> None:
        """Open the socket, in a directory only this user can enter.

        Args:
            model_name: for messages.
            metrics: where the counters go.
            read_notices: gives the notices by name, each with the `address` of a draft
                (`drafts_on_board`); called in a thread. None where the draft runs in the engine.
        """
        self.counts = Report()
        """The engine's latest totals."""
        self._model_name = model_name
        self._metrics = metrics
        self._read_notices = read_notices
        self._directory = Path(tempfile.mkdtemp(prefix="altiplano-draft-"))
        self.channel = f"ipc://{self._directory / 'link'}"
        """Address for `channel.Link`."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.sndhwm = 2
        self._socket.bind(self.channel)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._tasks = [asyncio.create_task(self._forever(self._take_report))]
        if self._read_notices is not None:
            self._tasks.append(asyncio.create_task(self._forever(self._tell_drafts)))

    def close(self) -> None:
        """End the tasks and remove the socket's directory."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._context.destroy(0)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _forever(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeat `work`: without the bridge the engine still answers, so nothing ends it."""
        while True:
            try:
                await work()
            except Exception as error:
                _log.warning("the link to the engine of %s: %r", self._model_name, error)
                await asyncio.sleep(_LOOK_S)

    async def _tell_drafts(self) -> None:
        assert self._read_notices is not None
        notices = await asyncio.to_thread(self._read_notices)
        addresses = sorted({notice["address"] for notice in notices.values()})
        with contextlib.suppress(zmq.Again):  # The engine is not up yet.
            await self._socket.send(msgspec.msgpack.encode(Drafts(addresses)), zmq.NOBLOCK)
        await asyncio.sleep(_LOOK_S)

    async def _take_report(self) -> None:
        report = msgspec.msgpack.decode(await self._socket.recv(), type=Report)
        before, self.counts = self.counts, report
        export(self._metrics, before, report)


def export(metrics: Metrics, before: Report, report: Report) -> None:
    """Turn the difference of two reports into metrics."""
    for name, now, then in (
        (STEPS, report.steps, before.steps),
        (PROPOSED, report.proposed, before.proposed),
        (ACCEPTED, report.accepted, before.accepted),
        (HITS, report.ahead_hits, before.ahead_hits),
        (MISSES, report.ahead_misses, before.ahead_misses),
    ):
        if now > then:
            metrics.add(name, now - then)
    for position, count in enumerate(report.accepted_at):
        then = before.accepted_at[position] if position < len(before.accepted_at) else 0
        if count > then:
            metrics.add(ACCEPTED_AT, count - then, position=str(position))
    for reason, count in report.fallbacks.items():
        if count > before.fallbacks.get(reason, 0):
            metrics.add(FALLBACKS, count - before.fallbacks.get(reason, 0), reason=reason)
    metrics.set(BREAKER, float(report.breaker_open))
    metrics.set(TOKENS, report.tokens_per_step)
    for milliseconds in report.latencies_ms:
        metrics.time(LATENCY, milliseconds)


def drafts_on_board(model_name: str) -> Notices:
    """Reads a model's notices under `draft/<model_name>`, in a process connected to Ray."""
    from altiplano.serving import board

    return lambda: board.read(f"draft/{model_name}", _FRESH_S)
