"""The draft as a Ray Serve deployment: a replica is a `DraftServer` and a notice of its address.

Serve starts, restarts and scales replicas by how busy they are; engines read the notices and talk
to the socket directly, so Serve handles carry no tokens. Knows no engine. A replica costs the
draft's weights, its cache and one busy thread.
"""

import asyncio
import contextlib
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_log = logging.getLogger(__name__)

RENEW_S = 1.0
"""A notice older than a few of these belongs to a replica that is gone."""
BUSY_GOAL = 0.6
"""Share of its time a replica should spend on answers; the rest is room for asks that coincide."""
_DEAD_BAND = 0.15
"""How far from the goal changes nothing: replicas come with an empty cache."""


def topic(model_name: str) -> str:
    """Where the drafts of a model post their addresses."""
    return f"draft/{model_name}"


def scale_by_busy(context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy: as many replicas as bring each to `BUSY_GOAL`.

    Serve applies bounds and delays to what it returns. For
    `AutoscalingConfig(policy=AutoscalingPolicy(policy_function="altiplano.serving.draft:...")`.
    """
    busy = list((context.aggregated_metrics or {}).get("busy", {}).values())
    now = context.target_num_replicas
    if not busy:
        return now, {}
    mean = sum(busy) / len(busy)
    if abs(mean - BUSY_GOAL) <= _DEAD_BAND:
        return now, {}
    # Replicas that have not reported yet are taken to be as busy as the others.
    return max(math.ceil(mean * context.current_num_replicas / BUSY_GOAL), 1), {}


class Draft:
    """One replica; wrapped by `serve.deployment`."""

    def __init__(self, entry: dict[str, Any], draft_dir: str, data_host: str) -> None:
        """Load the draft and begin to answer.

        Args:
            entry: `ModelSettings` as a dictionary.
            draft_dir: the draft's directory, readable on this node.
            data_host: address to listen on; `node`: this node's in the cluster.

        Raises:
            ModelError, ServeError: as `Drafter`.
            ArtifactError: the draft has no tokenizer.
        """
        import ray
        from ray import serve

        from altiplano.config.serving import ModelSettings
        from altiplano.serving.speculation.drafter import Drafter
        from altiplano.serving.speculation.protocol import vocab_digest
        from altiplano.serving.speculation.server import DraftServer

        settings = ModelSettings.model_validate(entry)
        draft = settings.draft
        drafter = Drafter(
            Path(draft_dir),
            device="cuda" if draft.num_gpus else "cpu",
            dtype=settings.dtype,
            cache_gib=draft.cache_gib,
            max_len=settings.max_model_len,
            threads=max(int(draft.num_cpus), 1),
        )
        host = ray.util.get_node_ip_address() if data_host == "node" else data_host
        digest = vocab_digest(draft_dir)
        self._server = DraftServer(drafter, vocab_digest=digest, host=host)
        self._topic = topic(settings.name)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._notice = {
            "address": self._server.address,
            "node": ray.get_runtime_context().get_node_id(),
            "vocab_digest": digest,
            "replica": self._name,
        }
        self._gauges = _Gauges(settings.name)
        self._server.start()
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def check_health(self) -> None:
        """Serve asks now and then.

        Raises:
            RuntimeError: the server's thread or the renewal of the notice has ended.
        """
        if not self._server.alive:
            raise RuntimeError(f"the draft's server died: {self._server.error!r}")
        if self._renewing.done():
            raise RuntimeError("the draft's address is no longer posted") from (
                self._renewing.exception()
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scale_by_busy` reads."""
        return {"busy": self._server.busy()}

    async def counts(self) -> dict[str, int]:
        """Totals of this replica since its start (`DraftServer.counts`)."""
        return self._server.counts()

    async def shutdown(self) -> None:
        """Take the notice down and end the server."""
        from altiplano.serving import board

        self._renewing.cancel()
        board.remove(self._topic, self._name)
        self._server.stop()

    async def __del__(self) -> None:
        """Serve calls this when the replica is to end."""
        with contextlib.suppress(Exception):
            await self.shutdown()

    async def _renew(self) -> None:
        from altiplano.serving import board

        while self._server.alive:
            board.post(self._topic, self._name, self._notice)
            self._gauges.show(self._server.counts(), self._server.busy())
            await asyncio.sleep(RENEW_S)
        board.remove(self._topic, self._name)


class _Gauges:
    """A replica's totals as Ray metrics."""

    def __init__(self, model_name: str) -> None:
        from ray.serve import metrics

        self._tags = {"model": model_name}
        self._busy = metrics.Gauge(
            "altiplano_drafter_busy",
            description="Share of its time a draft replica spends on answers and prompts.",
            tag_keys=("model",),
        )
        self._totals: dict[str, Any] = {}
        self._before: dict[str, int] = {}

    def show(self, counts: dict[str, int], busy: float) -> None:
        """Export what has been counted since the last time."""
        from ray.serve import metrics

        self._busy.set(busy, tags=self._tags)
        for name, total in counts.items():
            if name not in self._totals:
                self._totals[name] = metrics.Counter(
                    f"altiplano_drafter_{name}_total",
                    description=f"Draft replicas: {name.replace('_', ' ')}.",
                    tag_keys=("model",),
                )
            grown = total - self._before.get(name, 0)
            if grown > 0:
                self._totals[name].inc(grown, tags=self._tags)
            self._before[name] = total
