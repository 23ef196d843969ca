"""How Ray Serve has to be started to be fast: variables of the processes of a Ray cluster.

Serve reads them when its processes start, so they belong into the environment of `ray start` (in
Kubernetes: of the containers); `cluster.py` sets them for a cluster it starts itself. A service on
a cluster without them works the same, only slower: every piece of a stream then goes through
Serve's Python proxy. Knows names and values only.
"""

import os
import socket

from altiplano.config.serving import ServeSection

FAST_SERVE = {
    # HAProxy in front, talking to our HTTP replicas directly.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # No thread of its own for our code, gRPC between replicas, buffered logs.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Its log of every request costs more than its routing; our HTTP side counts them itself.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Requests under way are waited for in any case (`serve.drain_s`); this is how long HAProxy may
    # need to hear that a replica leaves.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
}
_NOT_WITH_TLS = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
_OPEN_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")


def prepare(section: ServeSection) -> None:
    """Set the variables in this process, for a cluster that it starts next.

    HAProxy's pages of counters listen on free ports (on all addresses; Ray has no setting for
    that). They show numbers of connections, and take no commands. HAProxy as Ray sets it up speaks
    no TLS, so with a certificate Serve's own proxy is used.
    """
    for name, value in FAST_SERVE.items():
        if section.tls_key is None or name not in _NOT_WITH_TLS:
            os.environ.setdefault(name, value)
    for name in _OPEN_PORTS:
        with socket.socket() as probe:
            probe.bind(("", 0))
            os.environ.setdefault(name, str(probe.getsockname()[1]))
