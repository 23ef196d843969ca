"""What the HTTP side counts: requests, waits, tokens, retries and refusals, by model.

`Telemetry` says what is counted, a `Meters` where it goes: `RayMeters` to the node's exporter
(`/metrics` of our service and Ray's own dashboards show it as `ray_<name>`), `MemoryMeters` to a
dictionary for tests. Knows nothing of HTTP. An answer costs about ten counts of 5 µs each, however
many tokens it has: engines report every single step themselves.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)


@dataclass(frozen=True)
class Metric:
    """One metric: its kind, what it tells, its tags, and the bounds of a histogram's buckets."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ("model",)
    bounds: tuple[float, ...] = ()


METRICS = {
    "altiplano_http_requests": Metric(
        "counter", "Requests answered.", tags=("model", "path", "status")
    ),
    "altiplano_http_rejected": Metric(
        "counter", "Requests refused before a model saw them.", tags=("reason",)
    ),
    "altiplano_request_s": Metric(
        "histogram", "Seconds from a request to its last byte.", ("model", "path"), _SECONDS
    ),
    "altiplano_ttft_s": Metric(
        "histogram", "Seconds from a request to its first token.", bounds=_SECONDS
    ),
    "altiplano_time_per_token_s": Metric(
        "histogram", "Mean seconds between an answer's tokens.", bounds=_TOKEN_SECONDS
    ),
    "altiplano_prompt_tokens": Metric("counter", "Prompt tokens of finished answers."),
    "altiplano_completion_tokens": Metric("counter", "Tokens of finished answers."),
    "altiplano_running": Metric("gauge", "Answers being made or waited for."),
    "altiplano_retries": Metric(
        "counter", "Answers begun again on another replica.", tags=("model", "reason")
    ),
}
"""Name -> metric of the HTTP side; Prometheus sees `ray_<name>`, counters also with `_total`."""


class Meters(Protocol):
    """Where numbers go."""

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """Add to a counter, set a gauge, or observe in a histogram: what `METRICS[name]` is."""


class RayMeters:
    """Ray's exporter of this node. Make it inside a Serve replica, which its metrics then name."""

    def __init__(self) -> None:
        from ray.serve import metrics

        self._record: dict[str, Callable[..., None]] = {}
        for name, metric in METRICS.items():
            about = {"description": metric.description, "tag_keys": metric.tags}
            match metric.kind:
                case "counter":
                    self._record[name] = metrics.Counter(name, **about).inc
                case "gauge":
                    self._record[name] = metrics.Gauge(name, **about).set
                case "histogram":
                    bounds = list(metric.bounds)
                    self._record[name] = metrics.Histogram(name, **about, boundaries=bounds).observe

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """As `Meters.record`."""
        self._record[name](value, tags=tags)


class MemoryMeters:
    """A dictionary."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = defaultdict(list)

    def record(self, name: str, value: float, tags: dict[str, str]) -> None:
        """As `Meters.record`; every value is kept."""
        assert set(tags) == set(METRICS[name].tags), (name, tags)
        self.values[name, frozenset(tags.items())].append(value)

    def total(self, name: str, **tags: str) -> float:
        """Sum of what was recorded under all of `tags`, whatever the other tags were."""
        return sum(
            sum(values)
            for (each, key), values in self.values.items()
            if each == name and tags.items() <= dict(key).items()
        )


class Telemetry:
    """What happens on the HTTP side, told once each."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._running: Counter[str] = Counter()

    def request(self, model: str, path: str, status: int, seconds: float) -> None:
        """A request was answered. `guard.py` tells it for every one.

        Args:
            model: name of a served model; "" where the request named none that is served.
            path: the route's pattern, never the client's own words.
            status: HTTP status.
            seconds: from the request's arrival to the last byte.
        """
        record = self._meters.record
        record("altiplano_http_requests", 1, {"model": model, "path": path, "status": str(status)})
        record("altiplano_request_s", seconds, {"model": model, "path": path})

    def rejected(self, reason: str) -> None:
        """A request was refused before a model saw it (`key`, `body`, `full`)."""
        self._meters.record("altiplano_http_rejected", 1, {"reason": reason})

    def began(self, model: str) -> None:
        """An answer (one of `n`) is asked of a model; `ended` must follow, whatever happens."""
        self._running[model] += 1
        self._meters.record("altiplano_running", self._running[model], {"model": model})

    def ended(
        self,
        model: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        first_s: float | None,
        last_s: float | None,
    ) -> None:
        """An answer is over: finished, failed or given up.

        Args:
            model: name of a served model.
            prompt_tokens, completion_tokens: as in the answer's usage.
            first_s, last_s: seconds from the request to its first and its last token; None where
                none came.
        """
        record, tags = self._meters.record, {"model": model}
        self._running[model] -= 1
        record("altiplano_running", self._running[model], tags)
        # Ray refuses to add nothing to a counter.
        if prompt_tokens:
            record("altiplano_prompt_tokens", prompt_tokens, tags)
        if completion_tokens:
            record("altiplano_completion_tokens", completion_tokens, tags)
        if first_s is not None:
            record("altiplano_ttft_s", first_s, tags)
            if last_s is not None and completion_tokens > 1:
                per_token = (last_s - first_s) / (completion_tokens - 1)
                record("altiplano_time_per_token_s", per_token, tags)

    def retried(self, model: str, reason: str) -> None:
        """An answer is begun again elsewhere (`replica_lost`)."""
        self._meters.record("altiplano_retries", 1, {"model": model, "reason": reason})
