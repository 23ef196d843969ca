"""The driver's side of training: start Ray Train, show progress, return the last checkpoint.

A run is named by the hash of its settings and inputs. Whatever dies (a worker, a node, this
process), starting the same stage again goes on from the last checkpoint of that name.
Knows Ray Train; not what is trained or what becomes of the weights.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from altiplano.config.schema import ClusterSection
from altiplano.console import console, progress_bar
from altiplano.errors import TrainingError
from altiplano.train.worker import TrainJob, run_worker

LOG = "log.jsonl"
EVENTS = "tensorboard"
_PLOTTED = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
_POLL_S = 0.3


@dataclass(frozen=True)
class TrainOutcome:
    """A finished run: where the trained weights lie and what was seen."""

    weights_dir: Path
    work_dir: Path
    """All of the run, `LOG` and `EVENTS` too; deleted once the stage's artifact is in place."""
    metrics: dict[str, Any]


def run_training(job: TrainJob, cluster: ClusterSection, work_root: Path) -> TrainOutcome:
    """Train on the connected Ray cluster and wait for the end.

    Args:
        work_root: directory for checkpoints, on storage that all nodes share.

    Raises:
        TrainingError: the loss went bad, or workers died more often than `max_failures`.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    _require_resources(cluster)
    name = f"{job.settings.name}-{job.run_key[:12]}"
    work_dir = work_root / name
    work_dir.mkdir(parents=True, exist_ok=True)
    use_gpu = cluster.gpus_per_worker > 0
    job = replace(job, use_gpu=use_gpu)
    board = ray.remote(num_cpus=0)(Board).remote()
    resources = {"CPU": cluster.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(work_root),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with _Follower(board, job.settings.name, work_dir), _own_interrupts():
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(_explain(error, job, cluster, work_dir)) from None
    return _outcome(result, work_dir)


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt again.

    Ray Train ends its workers on SIGINT, then exits with code 0, and leaves its handler installed.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


class Board:
    """Ray actor that holds log records until the driver fetches them."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def push(self, record: dict[str, Any]) -> None:
        """Take one record."""
        self._records.append(record)

    def drain(self) -> list[dict[str, Any]]:
        """Give and forget all records."""
        records, self._records = self._records, []
        return records


class _Follower:
    """Background thread: board -> bar, JSONL log and TensorBoard events, while `fit` blocks."""

    def __init__(self, board: Any, title: str, work_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board, self._title, self._log_file = board, title, work_dir / LOG
        self._events = SummaryWriter(str(work_dir / EVENTS), flush_secs=5)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._events.close()

    def _follow(self) -> None:
        with progress_bar() as bar, self._log_file.open("a", encoding="utf-8") as log:
            task = bar.add_task(self._title, total=None, detail="starting workers")
            last = False
            while not last:
                last = self._stop.wait(_POLL_S)
                for record in self._drain():
                    log.write(json.dumps(record) + "\n")
                    self._show(bar, task, record)
                log.flush()

    def _drain(self) -> list[dict[str, Any]]:
        import ray

        try:
            records: list[dict[str, Any]] = ray.get(self._board.drain.remote(), timeout=5)
        except Exception:  # the cluster may be going away; `fit` reports why
            return []
        return records

    def _show(self, bar: Any, task: Any, record: dict[str, Any]) -> None:
        if record["event"] == "start":
            console.log(f"{self._title}: {record['machine']}")
            if record["step"]:
                console.log(f"{self._title}: resumed after step {record['step']}")
            bar.update(task, total=record["steps"], completed=record["step"], detail="")
            return
        for name in _PLOTTED:
            self._events.add_scalar(name, record[name], record["step"])
        detail = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        bar.update(task, completed=record["step"], detail=detail)


def _require_resources(cluster: ClusterSection) -> None:
    """Refuse at once what the cluster can never give."""
    import ray

    have = ray.cluster_resources()
    for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        need = each * cluster.num_workers
        if need > have.get(kind, 0):
            raise TrainingError(
                f"training needs {need:g} {kind} ({cluster.num_workers} workers x {each:g}), the "
                f"cluster has {have.get(kind, 0):g}: lower cluster.num_workers or join a larger one"
            )


def _explain(error: Exception, job: TrainJob, cluster: ClusterSection, work_dir: Path) -> str:
    cause = str(error).strip().splitlines()
    return (
        f"stage {job.settings.name} failed after {cluster.max_failures} restarts: "
        f"{cause[-1] if cause else error!r}\n"
        f"run it again to go on from its last checkpoint in {work_dir}"
    )


def _outcome(result: Any, work_dir: Path) -> TrainOutcome:
    """Check how the run ended and read its log."""
    from altiplano.train.checkpoint import WEIGHTS

    returned = result.return_value or {}
    if returned.get("stopped"):
        raise TrainingError(returned["stopped"])
    if result.checkpoint is None:
        raise TrainingError(f"no checkpoint was written in {work_dir}: zero steps were trained")
    steps = read_log(work_dir / LOG)
    speeds = sorted(record["tokens_per_second"] for record in steps)
    metrics = {
        "steps": steps[-1]["step"] if steps else None,
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "tokens_per_second": round(speeds[len(speeds) // 2]) if speeds else None,
        "machine": returned.get("machine"),
    }
    return TrainOutcome(Path(result.checkpoint.path) / WEIGHTS, work_dir, metrics)


def read_log(log_file: Path) -> list[dict[str, Any]]:
    """Step records by step; where a step was trained twice (after a kill), the later one."""
    records: dict[int, dict[str, Any]] = {}
    for line in log_file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]
