"""Find and kill the replicas of a served model, as a crash would."""

import os
import signal
import time
from collections.abc import Callable

import psutil


def replica_pids(deployment: str) -> list[int]:
    """Process ids of a deployment's replicas on this machine, e.g. of `Target-tiny`."""
    title = f"ray::ServeReplica:altiplano:{deployment}"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or [""]
        if line[0].startswith(title) or (len(line) == 1 and title in line[0]):
            found.append(process.pid)
    return sorted(found)


def kill(pid: int) -> None:
    """End a process and its children at once (`kill -9`), as the loss of a machine would."""
    family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    for each in family:
        try:
            os.kill(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Return when `condition` holds; fail, naming `what`, when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)
