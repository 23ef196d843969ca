"""Speculation measured: what it saves, what it costs, what the formula says it should save.

One trained pair (configs/speculation.yaml), each variant a server of its own, started in turn and
repeated: without a draft; draft in the engine; draft as a replica; the last two with a draft of
random weights, which is always wrong and should be switched off; and vLLM alone with its own
`draft_model`. Counts come from the servers' `/metrics`, so they are those an operator sees.

`expected` is Leviathan's E / (kc + 1), E = (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023, theorem
3.8), with a and k from the counters and c = milliseconds of a draft's token over milliseconds of a
plain step at the same number of clients. Where target and draft share two cores, a replica drafts
at the target's expense: seconds say less than counts there.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import load
import serving_models
import serving_servers as servers
from serving_compare import number, requests_for
from serving_servers import Engine, Server

PLAIN, VLLM, VLLM_DRAFT = "plain", "vllm alone", "vllm alone, draft_model"
HEADER = (
    "variant", "clients", "tokens/s", "speed-up", "expected", "forwards per token", "acceptance",
    "k", "c", "draft ms", "waited s",
)  # fmt: skip
_OURS = "ray_altiplano_draft_"
_SETTLE_S = 3.0
"""Counters are reported every second (`serving_servers`), and collected by the next."""

Row = dict[str, Any]
Start = Callable[[], AbstractContextManager[Server]]


def starters(pair: Path, folder: Path) -> dict[str, Start]:
    """How each variant is started."""
    useless = serving_models.useless_pair(pair)
    log = folder / "logs"
    engine = Engine(dtype="float32", max_model_len=512)

    def ours(name: str, run: Path, *overrides: str) -> Start:
        settings = [f"serve.draft.{override}" for override in overrides]
        return lambda: servers.altiplano(run, engine, log / f"{name}.log", *settings)

    merged, draft = pair / "merge", pair / "draft"
    return {
        PLAIN: ours("plain", pair, "placement=none"),
        "engine": ours("engine", pair, "placement=engine"),
        "replica": ours("replica", pair, "placement=replica"),
        "replica, not ahead": ours("serial", pair, "placement=replica", "overlap=false"),
        "engine, always wrong": ours("engine-wrong", useless, "placement=engine"),
        "replica, always wrong": ours("replica-wrong", useless, "placement=replica"),
        VLLM: lambda: servers.vllm_alone(merged, engine, log / "vllm-plain.log"),
        VLLM_DRAFT: lambda: servers.vllm_with_draft(merged, draft, engine, log / "vllm-draft.log"),
    }


def measure(
    pair: Path, folder: Path, clients: list[int], rounds: int, only: list[str] | None, scale: float
) -> Row:
    """Every variant `rounds` times in turn; see the module."""
    start = starters(pair, folder)
    if only:
        start = {name: begin for name, begin in start.items() if name in (PLAIN, *only)}
    prompts = serving_models.pair_prompts(pair, 4 * max(clients) + 8)
    measured: list[Row] = []
    for index in range(rounds):
        measured.append({})
        for name, begin in start.items():
            try:
                with begin() as server:
                    measured[-1][name] = measure_variant(server, prompts, clients, scale)
            except Exception as error:  # One variant's failure must not cost the others' numbers.
                measured[-1][name] = {"failed": str(error)}
            print(f"round {index + 1}, {name}: done", flush=True)
    return {"rounds": measured, "summary": summarise(measured, clients)}


def measure_variant(server: Server, prompts: list[str], clients: list[int], scale: float) -> Row:
    """Speed and counters at each number of clients; the first requests are not counted."""
    target = load.Target(server.url, server.model, key=server.key)
    load.measure(target, prompts, max(clients), 2 * max(clients))
    row: Row = {"startup_s": server.startup_s}
    for each in clients:
        # The policy may need a while to see that this load is another one.
        load.measure(target, prompts, each, 2 * each)
        time.sleep(_SETTLE_S)
        before = server.counters()
        measured = load.measure(target, prompts, each, requests_for(each, scale))
        time.sleep(_SETTLE_S)
        after = server.counters()
        spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
        row[str(each)] = {**measured, "draft": draft_counts(spent, measured["tokens"])}
    return row


def draft_counts(spent: dict[str, float], tokens: int) -> Row | None:
    """What the counters say of one measurement; None where nothing was proposed.

    Args:
        spent: differences of `Server.counters`.
        tokens: made meanwhile.
    """
    drafts = counter(spent, "ray_vllm_spec_decode_num_drafts", "vllm:spec_decode_num_drafts")
    proposed = counter(spent, _OURS + "proposed_tokens", "vllm:spec_decode_num_draft_tokens")
    calls = spent.get(_OURS + "latency_ms_count", 0.0)
    if not proposed or not drafts:
        return None
    accepted = counter(spent, _OURS + "accepted_tokens", "vllm:spec_decode_num_accepted_tokens")
    per_draft = proposed / drafts
    waited_ms = spent.get(_OURS + "latency_ms_sum", 0.0)
    hits, misses = counter(spent, _OURS + "ahead_hits"), counter(spent, _OURS + "ahead_misses")
    return {
        "proposed": proposed,
        "acceptance": accepted / proposed,
        "tokens_per_draft": per_draft,
        "alpha": alpha_of(1 + accepted / drafts, per_draft),
        "tokens_per_step": 1 + accepted / drafts,
        # A row's step makes one token of the target's own and what was accepted.
        "forwards_per_token": (tokens - accepted) / tokens if tokens else None,
        "draft_ms": waited_ms / calls if calls else None,
        "waited_s": waited_ms / 1e3,
        "ahead_hits": hits / (hits + misses) if hits + misses else None,
        "fallbacks": counter(spent, _OURS + "fallbacks"),
    }


def counter(values: dict[str, float], *names: str) -> float:
    """The first counter that is there, under any of the forms in which Ray and vLLM export one."""
    forms = (name + suffix for name in names for suffix in ("_total_total", "_total", ""))
    return next((values[form] for form in forms if form in values), 0.0)


def expected_tokens(alpha: float, k: float) -> float:
    """E, the tokens of one step that verifies k proposals, each right with probability alpha."""
    return k + 1 if alpha >= 1 else (1 - alpha ** (k + 1)) / (1 - alpha)


def alpha_of(tokens_per_step: float, k: float) -> float:
    """The probability at which `expected_tokens` is `tokens_per_step`; by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if expected_tokens(middle, k) < tokens_per_step else (low, middle)
        )
    return low


def expected_speedup(alpha: float, k: float, c: float) -> float:
    """Leviathan's E / (kc + 1)."""
    return expected_tokens(alpha, k) / (k * c + 1)


def summarise(rounds: list[Row], clients: list[int]) -> Row:
    """By variant and clients: medians over the rounds, speed-up within each round."""
    return {
        name: {str(each): _summary(rounds, name, str(each)) for each in clients}
        for name in rounds[0]
    }


def _summary(rounds: list[Row], name: str, clients: str) -> Row:
    rows: list[Row] = []
    for each in rounds:
        base = VLLM if name == VLLM_DRAFT else PLAIN
        row, plain = each[name].get(clients), each.get(base, {}).get(clients)
        if row is None or "tokens_per_s" not in row:
            continue
        found = {"tokens_per_s": row["tokens_per_s"], **(row["draft"] or {})}
        step_ms = number(plain or {}, "per_token_ms.p50")
        if step_ms and plain:
            found["speedup"] = row["tokens_per_s"] / plain["tokens_per_s"]
            if found.get("draft_ms"):
                k = found["tokens_per_draft"]
                found["c"] = found["draft_ms"] / k / step_ms
                found["expected"] = expected_speedup(found["alpha"], k, found["c"])
        rows.append(found)
    keys = {key for row in rows for key, value in row.items() if value is not None}
    return {
        key: statistics.median(row[key] for row in rows if row.get(key) is not None)
        for key in sorted(keys)
    }


def table_rows(result: Row) -> list[list[object]]:
    """As `HEADER` says."""
    keys = (
        "tokens_per_s", "speedup", "expected", "forwards_per_token", "acceptance",
        "tokens_per_draft", "c", "draft_ms", "waited_s",
    )  # fmt: skip
    return [
        [name, clients, *(row.get(key) for key in keys)]
        for name, by_clients in result["summary"].items()
        for clients, row in by_clients.items()
    ]
