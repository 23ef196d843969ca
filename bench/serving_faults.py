"""What clients see while replicas die, are replaced, are too few, or are asked nonsense.

A constant stream of requests comes in (open loop) while something happens after a third of the
time; counted is what became of every request. The aim is no failed request: an answer of 503 or 429
says that there is too much to do, and is no failure. Two services are started: one with two targets
and a draft replica for all scenarios but the last, one that scales from one to three.
"""

import asyncio
import math
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import load
import serving_models
import serving_servers as servers
from serving_cluster import Cluster, running
from serving_malformed import ask_all

HEADER = ("scenario", "requests", "failed", "busy (503, 429)", "outcomes", "worst ttft ms", "also")
_BUSY = ("503", "429")
_BAD_REQUESTS = 1000
_OVERLOAD = 10
_SLOW_CLIENT_S = 5.0
_POLL_S = 0.5

Row = dict[str, Any]
Phases = list[tuple[float, float]]


def measure(
    pair: Path, folder: Path, *, seconds: float, rate: float, only: list[str] | None,
    plot: Path | None,
) -> Row:  # fmt: skip
    """Every scenario; one that breaks is recorded as failed."""
    prompts = serving_models.pair_prompts(pair, 256)
    rows: Row = {}
    steady = [name for name in SCENARIOS if not only or name in only]
    if steady:
        with running(pair, *_settings(), *_TWO) as cluster:
            warm_up(cluster, prompts)
            for name in steady:
                rows[name] = _guarded(
                    lambda name=name: SCENARIOS[name](cluster, prompts, seconds, rate)
                )
                print(f"{name}: done", flush=True)
    if not only or AUTOSCALING in only:
        rows[AUTOSCALING] = _guarded(lambda: autoscaling(pair, prompts, seconds, rate, plot))
    return rows


AUTOSCALING = "one to three replicas and back"
_TWO = (
    "serve.min_replicas=2", "serve.max_replicas=2", "serve.draft.placement=replica",
    "serve.draft.num_cpus=0.5", f"serve.limits.slow_client_s={_SLOW_CLIENT_S}",
    "serve.max_ongoing_requests=16", "serve.max_queued_requests=32",
)  # fmt: skip
_SCALING = (
    "serve.min_replicas=1", "serve.max_replicas=3", "serve.target_ongoing_requests=4",
    "serve.upscale_delay_s=3", "serve.downscale_delay_s=10", "serve.draft.placement=none",
)  # fmt: skip


def _settings() -> tuple[str, ...]:
    """What both services share."""
    return (
        f"serve.port={servers.free_port()}", "serve.model_name=bench", "serve.dtype=float32",
        "serve.cpus_per_replica=0.5", "serve.kv_cache_gib=0.25", "serve.drain_s=30",
    )  # fmt: skip


def _guarded(run: Callable[[], Row]) -> Row:
    try:
        return run()
    except Exception as error:  # The other scenarios' numbers are still worth having.
        return {"broke": f"{type(error).__name__}: {error}"}


def target_of(cluster: Cluster, **other: Any) -> load.Target:
    """The service as the load generator knows it."""
    return load.Target(cluster.url, cluster.model, **other)


def warm_up(cluster: Cluster, prompts: list[str]) -> None:
    """A few requests to each replica, not counted."""
    load.measure(target_of(cluster), prompts, 8, 32)


def under_load(cluster: Cluster, prompts: list[str], phases: Phases, act: Callable[[], Row]) -> Row:
    """What became of a load's requests while `act` was at work; it also says what it saw."""
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(
            lambda: asyncio.run(load.open_loop(target_of(cluster), prompts, phases))
        )
        began = time.monotonic()
        try:
            also = act()
        except Exception as error:  # What the clients saw is told even so.
            also = {"broke": f"{type(error).__name__}: {error}"}
        also["acted_s"] = round(time.monotonic() - began, 1)
        answers, unsent = loading.result()
    return {**judge(answers), "unsent": unsent, "also": also}


def judge(answers: list[load.Answer]) -> Row:
    """`load.summarise` with the failures that are none taken out, and the worst wait."""
    row = load.summarise(answers)
    row["busy"] = sum(row["outcomes"].get(status, 0) for status in _BUSY)
    row["failed"] -= row["busy"]
    waits = [answer.pieces[0] - answer.sent for answer in answers if answer.good]
    row["worst_ttft_ms"] = 1e3 * max(waits, default=math.nan)
    row["examples"] = [
        {"outcome": load.outcome(a), "got": a.body[:300].decode("utf-8", "replace")}
        for a in answers
        if not a.good and str(a.status) not in _BUSY
    ][:5]
    return row


def wait_for(what: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until `what` holds; None where it does not in time."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if what():
            return round(time.monotonic() - began, 1)
        time.sleep(_POLL_S)
    return None


def nothing(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """For comparison."""
    return under_load(cluster, prompts, [(seconds, rate)], dict)


def kill(kind: str, cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """SIGKILL one replica of a kind, and wait for another in its place."""

    def act() -> Row:
        whole = cluster.replicas(kind)
        time.sleep(seconds / 3)
        started = cluster.kill(kind)
        fell = wait_for(lambda: cluster.replicas(kind) < whole, seconds)
        back = wait_for(lambda: cluster.replicas(kind) >= whole, seconds)
        orphans = sum(each.is_running() for each in started)
        return {"noticed_s": fell, "replaced_s": back, "orphans": orphans}

    return under_load(cluster, prompts, [(seconds, rate)], act)


def kill_target(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """One of two targets."""
    return kill("Target", cluster, prompts, seconds, rate)


def kill_draft(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """The only draft."""
    return kill("Draft", cluster, prompts, seconds, rate)


def redeploy(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """Another version of every model replica, in place."""

    def act() -> Row:
        time.sleep(seconds / 3)
        began = time.monotonic()
        cluster.redeploy("serve.max_model_len=256")
        return {"deployed_in_s": round(time.monotonic() - began, 1)}

    return under_load(cluster, prompts, [(seconds, rate)], act)


def overload(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """Ten times what it can do, for a while; then the usual rate again."""
    target = target_of(cluster)
    began = time.monotonic()
    load.measure(target, prompts, 16, 64)
    capacity = 64 / (time.monotonic() - began)
    phases = [(min(30.0, seconds / 2), _OVERLOAD * capacity), (seconds / 2, rate)]
    return under_load(cluster, prompts, phases, lambda: {"capacity_per_s": capacity})


def slow_client(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """A client that asks for much and reads nothing: is it given up, and do others wait?"""
    target = target_of(cluster, max_tokens=400)
    request = target.request(prompts[0], n=4, logprobs=5)

    def act() -> Row:
        time.sleep(seconds / 3)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(target.address)
            client.sendall(request)
            return {"given_up_s": wait_for(lambda: _hung_up(client), 2 * seconds / 3)}

    return under_load(cluster, prompts, [(seconds, rate)], act)


def _hung_up(client: socket.socket) -> bool:
    """Whether the peer has closed, though what it sent before is unread."""
    import select

    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


def malformed(cluster: Cluster, prompts: list[str], seconds: float, rate: float) -> Row:
    """A thousand wrong requests beside right ones."""
    act = lambda: asyncio.run(ask_all(target_of(cluster), _BAD_REQUESTS))  # noqa: E731
    return under_load(cluster, prompts, [(seconds, rate)], act)


SCENARIOS: dict[str, Callable[[Cluster, list[str], float, float], Row]] = {
    "nothing": nothing,
    "a target of two killed": kill_target,
    "the draft killed": kill_draft,
    "a client that does not read": slow_client,
    "malformed requests": malformed,
    "ten times overload": overload,
    # The last: what follows would be served by another version.
    "a new version deployed": redeploy,
}


def autoscaling(
    pair: Path, prompts: list[str], seconds: float, rate: float, plot: Path | None
) -> Row:
    """A ramp up and down: how many replicas run, and how long clients wait."""
    from serving_plot import plot_scaling

    phases = [
        (seconds / 6, rate), (seconds / 6, 4 * rate), (seconds / 3, 10 * rate), (seconds / 3, rate)
    ]  # fmt: skip
    with running(pair, *_settings(), *_SCALING) as cluster:
        warm_up(cluster, prompts)
        seen: list[tuple[float, int]] = []

        def act() -> Row:
            began = time.monotonic()
            while (now := time.monotonic() - began) < seconds + 20:
                seen.append((round(now, 1), cluster.replicas("Target")))
                time.sleep(_POLL_S)
            return {"most_replicas": max(n for _, n in seen), "last_replicas": seen[-1][1]}

        row = under_load(cluster, prompts, phases, act)
    row |= {"replicas": seen, "phases": phases}
    if plot:
        plot_scaling(phases, seen, plot)
    return row


def table_rows(result: Row) -> list[list[object]]:
    """As `HEADER` says."""
    return [
        [name, row.get("requests"), row.get("failed"), row.get("busy"),
         str(row.get("outcomes", row.get("broke"))), row.get("worst_ttft_ms"),
         str({key: v for key, v in row.get("also", {}).items() if key != "examples"})]
        for name, row in result.items()
    ]  # fmt: skip
