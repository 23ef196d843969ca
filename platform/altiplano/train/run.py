"""The driver's side of training: start Ray Train, follow it, return what was trained.

A run is named by the hash of its settings and inputs. Whatever dies (a worker, a node, this
process), starting the same stage again goes on from the last checkpoint of that name.
Knows Ray Train; not what is trained or what becomes of the weights.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from altiplano.config.cluster import ClusterSection, TrackSection
from altiplano.console import console
from altiplano.errors import MemoryShortageError, TrainingError
from altiplano.train.follow import LOG, Board, Follower, read_log, read_records
from altiplano.train.worker import WEIGHTS, TrainJob, run_worker

_STATES = "states"
_RAY = "ray"


@dataclass(frozen=True)
class TrainOutcome:
    """A finished run: where the trained weights lie and what was seen."""

    weights_dir: Path
    work_dir: Path
    """All of the run, its log and events too; deleted once the stage's artifact is in place."""
    metrics: dict[str, Any]

    states: str
    """Where its checkpoints lie, perhaps elsewhere."""


def run_training(
    job: TrainJob, cluster: ClusterSection, work_root: Path, track: TrackSection | None = None
) -> TrainOutcome:
    """Train on the connected Ray cluster and wait for the end.

    Args:
        work_root: directory for what a run leaves until it is done, on storage that all nodes see.

    Raises:
        TrainingError: the loss went bad, workers died more often than `max_failures`, or the
            training was told to stop; a `MemoryShortageError` where that was the reason.
    """
    _wait_for_resources(cluster)
    name = f"{job.settings.name}-{job.run_key[:12]}"
    work_dir = work_root / name
    work_dir.mkdir(parents=True, exist_ok=True)
    job = replace(job, use_gpu=cluster.gpus_per_worker > 0)
    board = _start_board()
    states = str(work_dir / _STATES)
    if cluster.checkpoints:
        states = f"{cluster.checkpoints.rstrip('/')}/{name}"
    config = {"job": job, "board": board, "work_dir": work_dir, "checkpoints": states}
    follower = Follower(board, job.settings.name, work_dir, track or TrackSection())
    with follower, _signals(follower):
        result = _fit(config, cluster, work_dir)
    _require_end(result, job, stopped=follower.stop_ordered)
    return TrainOutcome(work_dir / WEIGHTS, work_dir, _metrics(result, work_dir), states)


def _start_board() -> Any:
    """A board on the driver's node: on another one it would end with it, and the training too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


def _fit(config: dict[str, Any], cluster: ClusterSection, work_dir: Path) -> Any:
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    use_gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker=resources,
            placement_strategy=cluster.placement,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=_RAY,
            storage_path=str(work_dir),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )  # fmt: skip
    try:
        return trainer.fit()
    except RayError as error:
        first = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"stage {config['job'].settings.name}: the Ray cluster was lost ({first}); run it "
            f"again to go on from its last checkpoint in {work_dir}"
        ) from None
    except TrainingFailedError as error:
        told = _explain(error, config["job"], cluster, work_dir)
        # Ray's memory monitor ends a worker before the system does, and says so.
        is_shortage = "memory" in str(error).lower()
        raise (MemoryShortageError if is_shortage else TrainingError)(told) from None


@contextmanager
def _signals(follower: Follower) -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt again, and SIGTERM an order to save and stop.

    Ray Train ends its workers on SIGINT, then exits with code 0, and leaves its handler installed.
    Python allows handlers in the main thread only; elsewhere signals stay as they are.
    """
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: follower.order_stop())
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_resources(cluster: ClusterSection) -> None:
    """Wait `wait_s` for what the workers need, then refuse."""
    import ray

    deadline, told = time.monotonic() + cluster.wait_s, False
    while (lack := _lacking(cluster, ray.cluster_resources())) is not None:
        if time.monotonic() >= deadline:
            raise TrainingError(
                f"{lack} after waiting {cluster.wait_s:g} s (cluster.wait_s): lower "
                f"cluster.num_workers, or join a larger cluster"
            )
        if not told:
            told = True
            console.log(f"{lack}; waiting up to {cluster.wait_s:g} s for more nodes")
        time.sleep(0.5)


def _lacking(cluster: ClusterSection, have: dict[str, float]) -> str | None:
    workers = cluster.worker_range[0]
    for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        if (need := each * workers) > have.get(kind, 0):
            return (
                f"training needs {need:g} {kind} ({workers} workers x {each:g}), the cluster has "
                f"{have.get(kind, 0):g}"
            )
    return None


def _explain(error: Exception, job: TrainJob, cluster: ClusterSection, work_dir: Path) -> str:
    cause = str(error).strip().splitlines()
    last = cause[-1] if cause else repr(error)
    lines = [f"stage {job.settings.name} failed after {cluster.max_failures} restarts: {last}"]
    stalled = [file for file in sorted(work_dir.glob("stalled-*.txt")) if file.stat().st_size]
    if stalled:
        lines.append(
            f"a worker made no step for {cluster.stall_timeout_s:g} s (cluster.stall_timeout_s); "
            f"what it was doing: {stalled[0]}"
        )
    lines.append(f"run it again to go on from its last checkpoint in {work_dir}")
    return "\n".join(lines)


def _require_end(result: Any, job: TrainJob, *, stopped: bool) -> None:
    """Refuse a training that did not come to its end."""
    returned = result.return_value or {}
    if returned.get("out_of_memory"):
        raise MemoryShortageError(f"stage {job.settings.name}: {returned['stopped']}")
    if returned.get("stopped"):
        raise TrainingError(returned["stopped"])
    if not returned.get("finished"):
        why = "it was told to stop" if stopped else "it ended early"
        raise TrainingError(
            f"stage {job.settings.name}: {why}; the state after step {returned.get('step')} is "
            f"saved, run it again to go on"
        )


def _metrics(result: Any, work_dir: Path) -> dict[str, Any]:
    """What the stage's table shows, from the log."""
    records = read_records(work_dir / LOG)
    metrics: dict[str, Any] = {"machine": result.return_value["machine"]}
    if steps := read_log(work_dir / LOG):
        metrics = {**_summary(steps), **metrics}
    if evaluations := [record for record in records if record["event"] == "evaluation"]:
        for language, bits in evaluations[-1]["bits_per_byte"].items():
            metrics[f"bits_per_byte_{language}"] = round(bits, 4)
    return metrics


def _summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = sorted(record["tokens_per_second"] for record in steps)
    shares = sorted(record["mfu"] for record in steps)
    return {
        "steps": steps[-1]["step"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "tokens_per_second": round(speeds[len(speeds) // 2]),
        "mfu": round(shares[len(shares) // 2], 3),
        "memory_mib": round(max(record["memory_mib"] for record in steps)),
    }
