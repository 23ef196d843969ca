"""A notice board in Ray's own key-value store: who is where, for processes of one cluster.

Draft replicas post the address of their socket, an administrator posts adapters. Notices are small
JSON values by topic and name, survive the process that posted them, and die with the cluster. Knows
nothing of what they say. A read costs about a millisecond: look once a second, not once a request.
"""

import json
import time
from typing import Any

_NAMESPACE = b"altiplano"


def post(topic: str, name: str, notice: dict[str, Any]) -> None:
    """Put up a notice, or replace it; it carries the time it was posted (`posted`, seconds)."""
    from ray.experimental.internal_kv import _internal_kv_put

    value = json.dumps({**notice, "posted": time.time()}).encode()
    _internal_kv_put(_key(topic, name), value, overwrite=True, namespace=_NAMESPACE)


def remove(topic: str, name: str) -> bool:
    """Take a notice down; False where there was none."""
    from ray.experimental.internal_kv import _internal_kv_del

    return bool(_internal_kv_del(_key(topic, name), namespace=_NAMESPACE))


def read(topic: str, newer_than_s: float | None = None) -> dict[str, dict[str, Any]]:
    """All notices of a topic by name.

    Args:
        newer_than_s: leave out those posted longer ago: their owner no longer renews them.
    """
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    notices = {}
    oldest = time.time() - newer_than_s if newer_than_s is not None else 0.0
    prefix = _key(topic, "")
    for key in _internal_kv_list(prefix, namespace=_NAMESPACE):
        value = _internal_kv_get(key, namespace=_NAMESPACE)
        if value is None:
            continue
        notice = json.loads(value)
        if notice["posted"] >= oldest:
            notices[key[len(prefix) :].decode()] = notice
    return notices


def _key(topic: str, name: str) -> bytes:
    return f"{topic}\0{name}".encode()
