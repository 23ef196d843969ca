"""The load generator counts what a server really did, and the benches' arithmetic is right."""

import asyncio
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import load
import serving_compare
import serving_malformed
import serving_speculation

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b'data: {"choices":[{"index":0,"text":" a"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
END = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def status(code: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (code, len(body), body)


@contextmanager
def server(*answers: bytes) -> Iterator[str]:
    """A server that gives these answers in turn; an answer that is no whole one closes."""
    left = iter(answers * 1000)
    address: queue.Queue[str] = queue.Queue()
    over = threading.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                answer = next(left)
                # In two writes, so that pieces are cut anywhere.
                for part in (answer[: len(answer) // 2], answer[len(answer) // 2 :]):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.001)
                if not answer.endswith((b"0\r\n\r\n", b"}")):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def run() -> None:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        address.put(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield address.get(timeout=10)
    finally:
        over.set()
        thread.join(5)


GOOD = HEAD + b"".join(chunk(p) for p in (PIECE, PIECE + PIECE, USAGE, END)) + b"0\r\n\r\n"
CUT = HEAD + chunk(PIECE)
UNFINISHED = HEAD + chunk(PIECE) + chunk(USAGE) + b"0\r\n\r\n"
FULL = status(503, b'{"error":{"message":"full"}}')


def test_pieces_tokens_and_ends_are_told_apart() -> None:
    with server(GOOD, FULL, UNFINISHED, CUT) as url:
        answers = asyncio.run(load.closed_loop(load.Target(url, "m"), ["a"], 1, 8))
    assert [load.outcome(answer) for answer in answers] == [
        "200", "503", "200 unfinished", "ConnectionResetError"
    ] * 2  # fmt: skip
    assert [len(answer.pieces) for answer in answers[:4]] == [3, 0, 1, 1]
    assert answers[1].body == b'{"error":{"message":"full"}}'
    row = load.summarise(answers)
    assert row["tokens"] == 10 and row["failed"] == 6 and row["tokens_per_s"] > 0


def test_an_open_loop_asks_as_often_as_told() -> None:
    with server(GOOD) as url:
        target = load.Target(url, "m")
        answers, unsent = asyncio.run(load.open_loop(target, ["a"], [(0.2, 50), (0.1, 100)]))
    assert len(answers) == 20 and unsent == 0 and all(answer.good for answer in answers)


def test_nobody_listening_is_an_outcome() -> None:
    target = load.Target("http://127.0.0.1:9", "m")
    answers = asyncio.run(load.closed_loop(target, ["a"], 2, 4))
    assert [load.outcome(answer) for answer in answers] == ["ConnectionRefusedError"] * 4


def test_only_this_machine_is_loaded() -> None:
    with pytest.raises(SystemExit, match="this machine only"):
        load.Target("http://192.0.2.1:80", "m")


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 50)), max_size=4))
def test_a_schedule_is_ordered_and_of_the_right_size(phases: list[tuple[float, float]]) -> None:
    moments = load.schedule(phases)
    assert moments == sorted(moments)
    assert len(moments) == sum(round(seconds * rate) for seconds, rate in phases)
    assert all(0 <= moment <= sum(s for s, _ in phases) + 1e-6 for moment in moments)


@given(st.floats(0.01, 0.99), st.floats(1, 8))
def test_alpha_is_found_from_the_tokens_of_a_step(alpha: float, k: float) -> None:
    tokens = serving_speculation.expected_tokens(alpha, k)
    assert serving_speculation.alpha_of(tokens, k) == pytest.approx(alpha, abs=1e-6)


def test_expected_speedup_is_leviathans() -> None:
    assert serving_speculation.expected_tokens(0.6, 4) == pytest.approx(2.306, abs=1e-3)
    assert serving_speculation.expected_speedup(0.8, 4, 0.1) == pytest.approx(2.4011, abs=1e-3)


def test_draft_counts_survive_rays_names() -> None:
    spent = {
        "ray_vllm_spec_decode_num_drafts_total": 10.0,
        "ray_altiplano_draft_proposed_tokens_total_total": 40.0,
        "ray_altiplano_draft_accepted_tokens_total": 20.0,
        "ray_altiplano_draft_latency_ms_sum": 50.0,
        "ray_altiplano_draft_latency_ms_count": 5.0,
    }
    found = serving_speculation.draft_counts(spent, tokens=30)
    assert found is not None
    assert found["acceptance"] == 0.5 and found["tokens_per_step"] == 3.0
    assert found["forwards_per_token"] == pytest.approx(1 / 3) and found["draft_ms"] == 10.0
    assert serving_speculation.draft_counts({}, 30) is None


def test_ratios_are_taken_within_a_round_and_failures_left_out() -> None:
    def row(rate: float) -> dict[str, object]:
        return {"completions, 8": {"tokens_per_s": rate, "ttft_ms": {"p50": 2 * rate}}}

    rounds = [
        {"vllm alone": row(100), "ours": row(90)},
        {"vllm alone": row(10), "ours": row(9.5)},
        {"vllm alone": row(1), "ours": {"failed": "no server"}},
    ]
    ratio = serving_compare.ratios(rounds, "vllm alone")["ours"]["completions, 8"]
    assert ratio == {"tokens_per_s": 0.925, "ttft_ms.p50": 0.925}
    middle = serving_compare.medians(rounds)
    assert middle["vllm alone"]["completions, 8"]["tokens_per_s"] == 10


def test_malformed_requests_repeat_and_find_a_server_that_breaks() -> None:
    first = list(serving_malformed.requests("m", 200))
    assert first == list(serving_malformed.requests("m", 200))
    assert len({body for _, body in first}) > 150
    broken = status(500, b'{"detail":"boom"}')
    refused = status(400, b'{"error":{"message":"`prompt` is missing"}}')
    with server(refused, refused, refused, broken) as url:
        seen = asyncio.run(serving_malformed.ask_all(load.Target(url, "m"), 40))
    assert seen["wrong"] == 10 and seen["statuses"] == {"400": 30, "500": 10}


def test_the_gpu_bench_drafts_on_a_cpu(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    script = [sys.executable, "bench/gpu_serving.py", "--shape", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [*script, "--output", str(output), "--only", "engine", "--callers", "2"],
        cwd=root, timeout=200, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(output.read_text())["rows"]["engine"]
    assert row["2"]["tokens_per_s"] > 0, row
    assert row["2"]["draft"]["acceptance"] > 0.5
