"""A load generator for OpenAI-compatible servers: streamed completions, and when each piece came.

    python bench/load.py --output FILE.json --url http://127.0.0.1:8000 --model NAME
        --tokenizer DIR [--chat] [--concurrency 8] [--rate 4 --seconds 30] [--requests 64]

Closed loop: `concurrency` clients, each asking again as soon as it has its answer. Open loop: a
request every 1 / rate seconds whether or not earlier ones are done, so that a server that falls
behind shows it. Loopback only. It parses HTTP with httptools (C) and looks into the text of a piece
only for its end: 50 microseconds of CPU per piece at one client, 10 at 32, where a wake-up of the
loop finds several (uvloop takes as much). The number is told with the rest
(`load_cpu_us_per_piece`), since the server runs on the same cores. Knows nothing of who answers.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
from record import make_parser, write_record

_END = b"data: [DONE]"
_MOST_OPEN = 2048
"""Requests an open loop keeps open at once; what would come on top is counted as not sent."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Who is asked, and how."""

    url: str
    """`http://127.0.0.1:port`."""
    model: str
    chat: bool = False
    """Ask /v1/chat/completions rather than /v1/completions."""
    key: str | None = None
    """API key."""
    max_tokens: int = 64
    """Tokens of every answer: the end token is ignored."""
    temperature: float = 0.0
    timeout_s: float = 120.0
    """Give an answer up after this long."""

    def __post_init__(self) -> None:
        host = urlsplit(self.url).hostname
        if host is None or (host != "localhost" and not ip_address(host).is_loopback):
            raise SystemExit(f"{self.url}: this loads servers of this machine only")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def request(self, prompt: str, **other: Any) -> bytes:
        """One HTTP request; `other` replaces or adds keys of its body."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {
            "prompt": prompt
        }  # fmt: skip
        body = {
            "model": self.model, **asked, "max_tokens": self.max_tokens, "ignore_eos": True,
            "temperature": self.temperature, "stream": True,
            "stream_options": {"include_usage": True}, **other,
        }  # fmt: skip
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        return self.post(path, json.dumps(body).encode())

    def post(self, path: str, body: bytes) -> bytes:
        """A POST of any JSON body."""
        lines = [
            f"POST {path} HTTP/1.1", f"Host: {urlsplit(self.url).netloc}",
            "Content-Type: application/json", f"Content-Length: {len(body)}",
        ]  # fmt: skip
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Answer:
    """What came of one request; times are seconds of `time.perf_counter`."""

    sent: float
    status: int = 0
    """0: no HTTP status came (refused, reset, timed out; `trouble` says which)."""
    pieces: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: int = 0
    """As the server's own usage says."""
    done: bool = False
    """The stream ended with [DONE]."""
    ended: float = 0.0
    trouble: str = ""
    body: bytes = b""
    """What came instead of a stream: the error."""

    @property
    def good(self) -> bool:
        """Answered whole."""
        return self.status == 200 and self.done and self.tokens > 0


class Client(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self._answer: Answer | None = None
        self._whole: asyncio.Future[None] | None = None
        self._tail = b""

    async def ask(self, target: Target, request: bytes) -> Answer:
        """Send a request and wait for its whole answer; never raises for what the server does."""
        self._answer, self._tail = Answer(time.perf_counter()), b""
        answer = self._answer
        try:
            async with asyncio.timeout(target.timeout_s):
                if self.transport is None or self.transport.is_closing():
                    loop = asyncio.get_running_loop()
                    await loop.create_connection(lambda: self, *target.address)
                self._whole = asyncio.get_running_loop().create_future()
                self._parser = httptools.HttpResponseParser(self)
                assert self.transport is not None
                self.transport.write(request)
                await self._whole
        except (OSError, TimeoutError, httptools.HttpParserError) as error:
            answer.trouble = type(error).__name__
            self.close()
        answer.ended = time.perf_counter()
        return answer

    def close(self) -> None:
        """Hang up."""
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error or ConnectionResetError("closed in mid-answer"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """Called by the parser with the body, chunk framing taken off."""
        assert self._answer is not None
        if self._parser.get_status_code() != 200:
            self._answer.body += data
            return
        *events, self._tail = (self._tail + data).split(b"\n\n")
        now = time.perf_counter()
        for event in events:
            if event.startswith(_END):
                self._answer.done = True
            elif b'"choices":[]' in event:
                self._answer.tokens = json.loads(event[6:])["usage"]["completion_tokens"]
            elif event.startswith(b"data: ") and b'"content":""' not in event:
                self._answer.pieces.append(now)

    def on_message_complete(self) -> None:
        """Called by the parser at the end of the answer."""
        assert self._answer is not None
        self._answer.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive() and self.transport is not None:
            self.transport.close()
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)


async def closed_loop(
    target: Target, prompts: Sequence[str], concurrency: int, requests: int
) -> list[Answer]:
    """`concurrency` clients ask `requests` times in all; prompts are taken in turn."""
    waiting = iter([target.request(prompts[i % len(prompts)]) for i in range(requests)])
    answers: list[Answer] = []

    async def client() -> None:
        connection = Client()
        for request in waiting:
            answers.append(await connection.ask(target, request))
        connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


async def open_loop(
    target: Target,
    prompts: Sequence[str],
    phases: Sequence[tuple[float, float]],
) -> tuple[list[Answer], int]:
    """Ask at given rates, whether or not answers come.

    Args:
        phases: (seconds, requests per second), one after the other.

    Returns:
        answers, and how many requests were not sent because too many were open.
    """
    answers: list[Answer] = []
    idle: list[Client] = []
    open_now = unsent = 0

    async def one(prompt: str) -> None:
        nonlocal open_now
        open_now += 1
        client = idle.pop() if idle else Client()
        answers.append(await client.ask(target, target.request(prompt)))
        idle.append(client)
        open_now -= 1

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, moment in enumerate(schedule(phases)):
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            if open_now >= _MOST_OPEN:
                unsent += 1
            else:
                group.create_task(one(prompts[number % len(prompts)]))
    for client in idle:
        client.close()
    return answers, unsent


def schedule(phases: Sequence[tuple[float, float]]) -> list[float]:
    """When to send, in seconds from the start: evenly within each (seconds, rate)."""
    moments, begin = list[float](), 0.0
    for seconds, rate in phases:
        moments += [begin + i / rate for i in range(round(seconds * rate))] if rate > 0 else []
        begin += seconds
    return moments


def summarise(answers: Sequence[Answer], cpu_s: float | None = None) -> Row:
    """Rates and delays of the good answers, and what became of the others.

    `ttft_ms`: request to first piece. `gap_ms`: between two pieces, all answers together.
    `per_token_ms`: first to last piece, over the tokens after the first (what a reader feels where
    a piece holds several tokens). `tokens_per_s` runs from the first request to the last answer.

    Args:
        cpu_s: CPU time the generator itself took.
    """
    good = [answer for answer in answers if answer.good]
    pieces = sum(len(answer.pieces) for answer in good)
    row: Row = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "outcomes": dict(sorted(Counter(map(outcome, answers)).items())),
        "tokens": sum(answer.tokens for answer in good),
    }
    if good:
        wall = max(a.ended for a in answers) - min(a.sent for a in answers)
        gaps = np.concatenate([np.diff(answer.pieces) for answer in good])
        long = [a for a in good if a.tokens > 1 and len(a.pieces) > 1]
        per_token = [(a.pieces[-1] - a.pieces[0]) / (a.tokens - 1) for a in long]
        row |= {
            "tokens_per_s": row["tokens"] / wall,
            "ttft_ms": quantiles([answer.pieces[0] - answer.sent for answer in good]),
            "gap_ms": quantiles(gaps),
            "per_token_ms": quantiles(per_token),
        }
    if cpu_s is not None and pieces:
        row["load_cpu_us_per_piece"] = 1e6 * cpu_s / pieces
    return row


def outcome(answer: Answer) -> str:
    """`200`, another status, `200 unfinished`, or the trouble of a connection."""
    if answer.status == 0:
        return answer.trouble or "no answer"
    if answer.status == 200 and not answer.good:
        return "200 unfinished"
    return str(answer.status)


def quantiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds; empty for no values."""
    if not len(seconds):
        return {}
    values = 1e3 * np.quantile(np.asarray(seconds), [0.5, 0.9, 0.99])
    return {name: round(float(v), 3) for name, v in zip(("p50", "p90", "p99"), values, strict=True)}


def measure(target: Target, prompts: Sequence[str], concurrency: int, requests: int) -> Row:
    """A closed loop from a thread without a loop of its own, summed up."""
    began = time.thread_time()
    answers = asyncio.run(closed_loop(target, prompts, concurrency, requests))
    return summarise(answers, time.thread_time() - began)


def words_of(tokenizer_dir: str, count: int, words: int = 24, seed: int = 0) -> list[str]:
    """Prompts that the model can read and that share no beginning: words drawn from its pieces."""
    from pathlib import Path

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    pieces = sorted(p[1:] for p in tokenizer.get_vocab() if p[0] == "▁" and p[1:].isalpha())
    draw = random.Random(seed)
    return [" ".join(draw.choices(pieces, k=words)) for _ in range(count)]


def main() -> None:
    """Load one server and write what was seen."""
    parser = make_parser("Load an OpenAI-compatible server on this machine")
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--tokenizer", required=True, help="model directory, for the prompts")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8, help="closed loop: clients")
    parser.add_argument("--requests", type=int, default=64, help="closed loop: requests in all")
    parser.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="open loop: how long")
    given = parser.parse_args()
    write_record(given.output, {"load": run(given)}, packages=("httptools",))


def run(given: argparse.Namespace) -> Row:
    """What the command line asks for."""
    target = Target(given.url, given.model, given.chat, given.key, given.max_tokens)
    prompts = words_of(given.tokenizer, given.requests)
    if given.rate is None:
        row = measure(target, prompts, given.concurrency, given.requests)
    else:
        began = time.process_time()
        answers, unsent = asyncio.run(open_loop(target, prompts, [(given.seconds, given.rate)]))
        row = {**summarise(answers, time.process_time() - began), "unsent": unsent}
    print(json.dumps(row, indent=2))
    return row


if __name__ == "__main__":
    main()
