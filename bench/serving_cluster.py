"""Our service on a local Ray cluster of this process, for benches that break or change it.

Knows the service's own functions and how Ray names its processes. Starting takes half a minute.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Cluster:
    """A running service that may be harmed."""

    url: str
    model: str
    place: Path
    overrides: tuple[str, ...]

    def replicas(self, kind: str) -> int:
        """Running replicas of the deployments whose name begins with `kind` (`Target`, `Draft`)."""
        from ray import serve

        from altiplano.serving.service import APPLICATION

        deployments = serve.status().applications[APPLICATION].deployments
        return sum(
            count
            for name, deployment in deployments.items()
            if name.startswith(kind)
            for state, count in deployment.replica_states.items()
            if state == "RUNNING"
        )

    def kill(self, kind: str) -> list[psutil.Process]:
        """SIGKILL the process of one replica; returns the processes it had started.

        Raises:
            RuntimeError: there is no such replica.
        """
        for process in psutil.Process().children(recursive=True):
            if f"ServeReplica:altiplano:{kind}" in _title(process):
                started = process.children(recursive=True)
                os.kill(process.pid, signal.SIGKILL)
                return started
        raise RuntimeError(f"no replica of {kind} runs")

    def redeploy(self, *changes: str) -> None:
        """Replace the service by one with changed settings, in place; returns when it runs."""
        from ray import serve

        from altiplano.config import load_serve_only
        from altiplano.serving.app import build_application
        from altiplano.serving.check import find_parts
        from altiplano.serving.service import APPLICATION

        section = load_serve_only([*self.overrides, *changes]).serve
        application = build_application(section, find_parts(section, self.place))
        serve.run(application, name=APPLICATION, route_prefix="/")


@contextmanager
def running(place: Path, *overrides: str) -> Iterator[Cluster]:
    """Start the service of a run or model on a cluster of its own; both end with the block."""
    from altiplano.cluster import connect
    from altiplano.config import load_serve_only
    from altiplano.serving.check import find_parts
    from altiplano.serving.environment import prepare
    from altiplano.serving.service import start

    config = load_serve_only(list(overrides))
    parts = find_parts(config.serve, place)
    prepare(config.serve)
    with connect(config.cluster):
        service = start(config.serve, parts)
        try:
            yield Cluster(service.url, service.model_name, place, overrides)
        finally:
            service.stop()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
