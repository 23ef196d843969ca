"""One model behind vLLM's own server, behind `ray.serve.llm` and behind ours, in turn.

Each server is started alone with the same engine arguments (vLLM as it comes and `ray.serve.llm`
run a CPU's model in a process of its own), asked at every concurrency, and ended; the whole is
repeated, so that a machine that is slow for a while is slow for all. Ratios are taken within a
round, their median over the rounds is told.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import load
import serving_servers as servers
from serving_servers import Engine, Server

BARE, DEFAULT, OURS, RAY = "vllm alone", "vllm as it comes", "ours", "ray.serve.llm"
NUMBERS = ("tokens_per_s", "ttft_ms.p50", "gap_ms.p50", "gap_ms.p90", "gap_ms.p99")
_ROUTES = {"completions": False, "chat": True}

Row = dict[str, Any]
Start = Callable[[], AbstractContextManager[Server]]


def starters(model: Path, folder: Path, engine: Engine, *, with_ray: bool) -> dict[str, Start]:
    """How each server is started."""
    log = folder / "logs"
    found: dict[str, Start] = {
        BARE: lambda: servers.vllm_alone(model, engine, log / "vllm.log", *servers.ONE_PROCESS),
        DEFAULT: lambda: servers.vllm_alone(model, engine, log / "vllm_default.log"),
        OURS: lambda: servers.altiplano(model, engine, log / "ours.log"),
    }
    if with_ray:
        found[RAY] = lambda: servers.ray_serve_llm(model, engine, log / "ray.log")
    return found


def compare(
    start: dict[str, Start], prompts: list[str], concurrencies: list[int], rounds: int, scale: float
) -> Row:
    """Measure all servers `rounds` times in turn.

    Args:
        prompts: as many as any measurement asks; every measurement uses them from the first on.
        scale: requests per client, over the usual ones.

    Returns:
        `rounds`: per round and server a row per concurrency; `medians` and `over_vllm_alone`.
    """
    measured: list[Row] = []
    for number in range(rounds):
        measured.append({})
        for name, begin in start.items():
            try:
                with begin() as server:
                    measured[-1][name] = measure_server(server, prompts, concurrencies, scale)
            except Exception as error:  # One server's failure must not cost the others' numbers.
                measured[-1][name] = {"failed": str(error)}
            print(f"round {number + 1}, {name}: done", flush=True)
    return {
        "rounds": measured,
        "medians": medians(measured),
        "over_vllm_alone": ratios(measured, BARE),
    }


def measure_server(
    server: Server, prompts: list[str], concurrencies: list[int], scale: float = 1.0
) -> Row:
    """Every concurrency once, on both routes; the first requests are not counted."""
    row: Row = {"startup_s": server.startup_s}
    for route, chat in _ROUTES.items():
        target = load.Target(server.url, server.model, chat=chat, key=server.key)
        load.measure(target, prompts, max(concurrencies), 2 * max(concurrencies))
        for clients in concurrencies:
            before = server.usage()["cpu_s"]
            measured = load.measure(target, prompts, clients, requests_for(clients, scale))
            if measured["tokens"]:
                spent = server.usage()["cpu_s"] - before
                measured["server_cpu_ms_per_token"] = 1e3 * spent / measured["tokens"]
            row[f"{route}, {clients}"] = measured
    row["memory_MB"] = server.usage()["memory_MB"]
    return row


def requests_for(clients: int, scale: float) -> int:
    """Enough that the slowest takes seconds: 12 for one client, 4 more per further one."""
    return max(clients, round(scale * (8 + 4 * clients)))


def number(row: Row, path: str) -> float | None:
    """A number by its dotted path; None where it is not there."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def medians(rounds: list[Row]) -> Row:
    """By server, measurement and number: the median over the rounds."""
    return {
        name: {
            what: {
                key: statistics.median(values)
                for key in NUMBERS
                if (values := _values(rounds, name, what, key))
            }
            for what in _measurements(rounds, name)
        }
        for name in rounds[0]
    }


def ratios(rounds: list[Row], base: str) -> Row:
    """The same as shares of the base's number in the same round."""
    found: Row = {}
    for name in rounds[0]:
        if name == base:
            continue
        for what in _measurements(rounds, name):
            for key in NUMBERS:
                pairs = [
                    (mine, theirs)
                    for each in rounds
                    if (mine := number(each[name].get(what, {}), key))
                    and (theirs := number(each.get(base, {}).get(what, {}), key))
                ]
                if pairs:
                    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
                    found.setdefault(name, {}).setdefault(what, {})[key] = round(ratio, 3)
    return found


def _measurements(rounds: list[Row], name: str) -> list[str]:
    known = {what for each in rounds for what, row in each[name].items() if isinstance(row, dict)}
    return sorted(known, key=lambda what: (what.split(",")[0], int(what.split(",")[1])))


def _values(rounds: list[Row], name: str, what: str, key: str) -> list[float]:
    found = (number(each[name].get(what, {}), key) for each in rounds)
    return [value for value in found if value is not None]


def table_rows(result: Row) -> list[list[object]]:
    """Server, measurement, and its numbers, for people."""
    return [
        [name, what, *(numbers.get(key) for key in NUMBERS),
         result["over_vllm_alone"].get(name, {}).get(what, {}).get("tokens_per_s")]
        for name, whats in result["medians"].items()
        for what, numbers in whats.items()
    ]  # fmt: skip
