"""Trainings on a Ray cluster of several nodes that loses one after the other; a process of its own.

`python -m tests.helpers.lost_nodes FOLDER` trains twice, each time below `FOLDER/NAME`, and exits
with 0 when both ended as they should; tests/test_train_kill.py reads the logs. The nodes are
raylets on this machine, which all see FOLDER, as they would a shared file system.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from altiplano.config.cluster import ClusterSection
    from altiplano.train.worker import TrainJob

# A lost node is noticed in seconds; Ray's defaults may take 50.
NOTICED_SOON = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
}
STEPS = 100
BLOCKS = 24
"""Of a step, one micro-batch each: a step takes long enough for something to happen in it."""
GRACE_S = 6
"""How long a node goes on after its end was announced."""
ENDLESS = 100_000
"""More steps than are ever made."""


def main(folder: Path) -> None:
    """Lose one node of three at once, then one of two after a warning; then be told to stop."""
    os.environ |= NOTICED_SOON
    import ray
    from ray.cluster_utils import Cluster

    from altiplano.config.cluster import ClusterSection
    from altiplano.errors import TrainingError

    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **small},
    )
    for _ in range(3):
        cluster.add_node(num_cpus=1, **small)
    train(folder / "replaced", ClusterSection(num_workers=2), [lose_node])
    elastic = ClusterSection(num_workers=(1, 2))
    try:
        train(folder / "fewer", elastic, [announce_end, order_stop], endless=True)
    except TrainingError as error:
        (folder / "fewer" / "error").write_text(str(error))
    ray.shutdown()
    cluster.shutdown()


def train(
    folder: Path,
    cluster: "ClusterSection",
    events: Iterable[Callable[[Path], None]],
    *,
    endless: bool = False,
) -> None:
    """Train in this thread while the events happen in another."""
    from altiplano.train.run import run_training

    folder.mkdir()
    job = make_job(folder, endless=endless)

    def happen() -> None:
        for event in events:
            event(work_dir_of(folder))

    threading.Thread(target=happen, daemon=True).start()
    run_training(job, cluster, folder / "work")


def make_job(folder: Path, *, endless: bool = False) -> "TrainJob":
    """A tiny training; an endless one saves only where it is told to."""
    from altiplano.train.worker import TrainJob
    from tests.helpers.tiny_run import LENGTH, VOCAB_OLD, write_model, write_store
    from tests.test_train_ray import settings

    given = {"steps": STEPS, "checkpoint_steps": 3, "tokens_per_step": BLOCKS * LENGTH}
    if endless:
        given |= {"steps": ENDLESS, "checkpoint_steps": ENDLESS}
    return TrainJob(
        settings=settings(**given), model_dir=write_model(folder / "model"), adapter_dirs=(),
        vocab_old=VOCAB_OLD, store_dir=write_store(folder / "store"), seed=5,
        run_key="0123456789abcdef", num_threads=1, use_gpu=False,
    )  # fmt: skip


def work_dir_of(folder: Path) -> Path:
    """Where a training of `make_job` leaves its log and its states."""
    return folder / "work" / "test-0123456789ab"


def starts_of(work_dir: Path) -> list[dict]:
    """Where workers began: once per start and restart."""
    log = work_dir / "log.jsonl"
    whole_lines = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    records = [json.loads(line) for line in whole_lines]
    return [record for record in records if record["event"] == "start"]


def lose_node(work_dir: Path) -> None:
    """Kill worker 0's node after a checkpoint."""
    wait_for(lambda: bool(starts_of(work_dir)) and any(work_dir.glob("states/step-*")))
    kill_node(parent_of(starts_of(work_dir)[0]["pid"]))


def kill_node(raylet: int | None) -> None:
    """Kill a raylet and all processes that it started, as a power cut does."""
    assert raylet is not None
    os.kill(raylet, signal.SIGSTOP)  # it must not start others meanwhile
    for pid in (*processes_below(raylet), raylet):
        os.kill(pid, signal.SIGKILL)


def announce_end(work_dir: Path) -> None:
    """Tell Ray that worker 0's node will be taken away, then take it, as clouds do."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    wait_for(lambda: bool(starts_of(work_dir)))
    raylet = parent_of(starts_of(work_dir)[0]["pid"])
    (node,) = (node for node in ray.nodes() if node["Alive"] and raylet_of(node) == raylet)
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + GRACE_S) * 1000)
    accepted, why = gcs.drain_node(node["NodeID"], reason, "a test", deadline_ms)
    assert accepted, why
    time.sleep(GRACE_S)
    kill_node(raylet)


def order_stop(work_dir: Path) -> None:
    """Once the training goes on elsewhere, end this process as `kill` and Kubernetes do."""
    wait_for(lambda: len(starts_of(work_dir)) > 1)
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for(happened: Callable[[], bool]) -> None:
    """Poll until something has happened."""
    while not happened():
        time.sleep(0.02)


def processes() -> list[int]:
    """Process ids of all processes of this machine."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def parent_of(pid: int) -> int | None:
    """Process id of a process's parent: a worker's is its node's raylet. None once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def processes_below(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return [process for process in processes() if parent_of(process) == pid]


def raylet_of(node: dict) -> int | None:
    """Process id of a node's raylet, found by the socket name in its command line."""
    socket = node["RayletSocketName"].encode()
    for pid in processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if command.split(b"\0")[0].endswith(b"raylet/raylet") and socket in command:
            return pid
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
