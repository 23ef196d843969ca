"""Requests that are wrong in one way each, and what a server may answer to them.

Drawn from a seed, so that a finding can be repeated. Knows HTTP and the API's keys, no server.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import load

Body = dict[str, Any]

_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, -1e308, 2**63, 2**200, "", "x", "\ud800", "\u0000", [], {}, [[]],
    [None], [-1], [2**40], {"a": {"b": []}}, "9" * 5000, float("nan"), float("inf"),
)  # fmt: skip
_KEYS = (
    "model", "prompt", "messages", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "n",
    "best_of", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "seed",
    "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "response_format",
    "tools", "tool_choice", "guided_json", "guided_regex", "user", "suffix", "no_such_key",
)  # fmt: skip
_SCHEMAS: tuple[Any, ...] = (
    {"type": "no_such_type"}, {"$ref": "#/nowhere"}, {"pattern": "("}, "not a schema", {"enum": []},
)  # fmt: skip


def requests(model: str, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Path and body of `count` requests."""
    draw = random.Random(seed)
    for _ in range(count):
        chat = draw.random() < 0.5
        text = f"{draw.randrange(10**6)}"
        body: Body = {"model": model, "max_tokens": 4}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        yield path, draw.choice(_SPOILERS)(draw, body)


def _wrong_values(draw: random.Random, body: Body) -> bytes:
    for key in draw.sample(_KEYS, draw.randint(1, 3)):
        body[key] = draw.choice(_VALUES)
    return json.dumps(body).encode()


def _missing_key(draw: random.Random, body: Body) -> bytes:
    del body[draw.choice(list(body))]
    return json.dumps(body).encode()


def _cut(draw: random.Random, body: Body) -> bytes:
    whole = json.dumps(body).encode()
    return whole[: draw.randrange(len(whole))]


def _spoiled_bytes(draw: random.Random, body: Body) -> bytes:
    whole = bytearray(json.dumps(body).encode())
    for _ in range(draw.randint(1, 4)):
        whole[draw.randrange(len(whole))] = draw.randrange(256)
    return bytes(whole)


def _nested(draw: random.Random, body: Body) -> bytes:
    depth = draw.choice((40, 500, 20_000))
    return json.dumps(body)[:-1].encode() + b', "stop": ' + b"[" * depth + b"]" * depth + b"}"


def _bad_schema(draw: random.Random, body: Body) -> bytes:
    schema = {"name": "a", "schema": draw.choice(_SCHEMAS)}
    body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(body).encode()


def _bad_message(draw: random.Random, body: Body) -> bytes:
    body["messages"] = [{draw.choice(("role", "content", "x")): draw.choice(_VALUES)}]
    return json.dumps(body).encode()


_SPOILERS: tuple[Callable[[random.Random, Body], bytes], ...] = (
    _wrong_values, _wrong_values, _missing_key, _cut, _spoiled_bytes, _nested, _bad_schema,
    _bad_message,
)  # fmt: skip


async def ask_all(target: load.Target, count: int, seed: int = 0) -> dict[str, Any]:
    """Send them all over one connection after the other.

    Returns:
        `statuses`; `wrong`: answers that are neither 200 nor a 4xx with an OpenAI error (503 and
        429 are no fault); `examples` of those.
    """
    client = load.Client()
    statuses: Counter[str] = Counter()
    wrong: list[dict[str, str]] = []
    for path, body in requests(target.model, count, seed):
        answer = await client.ask(target, target.post(path, body))
        statuses[str(answer.status or answer.trouble)] += 1
        if not _acceptable(answer):
            said = answer.body[:300].decode("utf-8", "replace")
            wrong.append(
                {"status": str(answer.status), "sent": f"{path} {body[:300]!r}", "got": said}
            )
    client.close()
    return {"statuses": dict(sorted(statuses.items())), "wrong": len(wrong), "examples": wrong[:8]}


def _acceptable(answer: load.Answer) -> bool:
    if answer.status == 200:
        return True
    if not 400 <= answer.status < 500 and answer.status != 503:
        return False
    try:
        return bool(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False
