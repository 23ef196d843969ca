"""What the driver sees of a training: the board that workers fill, and who reads it.

A thread takes records from the board to the bar, `log.jsonl`, TensorBoard and, where asked for,
Weights & Biases and MLflow, while Ray Train blocks the driver. Knows records, not models.
"""

import json
import threading
from pathlib import Path
from typing import Any, Protocol, Self

from altiplano.config.cluster import TrackSection
from altiplano.console import console, progress_bar
from altiplano.errors import TrainingError

LOG = "log.jsonl"
EVENTS = "tensorboard"
_POLL_S = 0.3
_PLOTTED = ("loss", "learning_rate", "rows_learning_rate", "grad_norm", "tokens_per_second", "mfu",
            "memory_mib", "data_wait_s")  # fmt: skip


class Board:
    """Ray actor that holds log records until the driver fetches them, and its order to stop."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stopping = False

    def push(self, record: dict[str, Any]) -> bool:
        """Take one record; returns whether the training shall be saved and ended."""
        self._records.append(record)
        return self._stopping

    def stop(self) -> None:
        """Have the training saved and ended."""
        self._stopping = True

    def drain(self) -> list[dict[str, Any]]:
        """Give and forget all records."""
        records, self._records = self._records, []
        return records


class Sink(Protocol):
    """Where numbers of a training go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take some values of a step."""

    def close(self) -> None:
        """No more will come."""


class Follower:
    """Background thread: board -> bar, log and sinks, while `fit` blocks."""

    def __init__(self, board: Any, title: str, work_dir: Path, track: TrackSection) -> None:
        self._board, self._title, self._log_file = board, title, work_dir / LOG
        self._sinks = _open_sinks(title, work_dir, track)
        self._stop, self._order = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        for sink in self._sinks:
            sink.close()

    def order_stop(self) -> None:
        """Have the workers save and end; safe inside a signal handler."""
        self._order.set()

    @property
    def stop_ordered(self) -> bool:
        """Whether `order_stop` was called."""
        return self._order.is_set()

    def _follow(self) -> None:
        with progress_bar() as bar, self._log_file.open("a", encoding="utf-8") as log:
            task = bar.add_task(self._title, total=None, detail="starting workers")
            ordered = last = False
            while not last:
                last = self._stop.wait(_POLL_S)
                if self._order.is_set() and not ordered:
                    ordered = True
                    console.log(f"{self._title}: told to stop; saving first")
                    self._board.stop.remote()
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
        match record["event"]:
            case "start":
                count, step = record["workers"], record["step"]
                workers = f"{count} worker{'s' if count > 1 else ''}"
                console.log(f"{self._title}: {workers}; {record['machine']}")
                if step:
                    console.log(f"{self._title}: resumed after step {step}")
                bar.update(task, total=record["steps"], completed=step, detail="")
            case "say":
                console.log(f"{self._title}: {record['text']}")
            case "evaluation":
                bits = record["bits_per_byte"]
                found = ", ".join(f"{language} {value:.3f}" for language, value in bits.items())
                best = " (best so far)" if record["best"] else ""
                console.log(f"{self._title}: step {record['step']}: bits per byte {found}{best}")
                named = {f"bits_per_byte/{language}": value for language, value in bits.items()}
                self._log(named, record["step"])
            case "step":
                self._log({name: record[name] for name in _PLOTTED}, record["step"])
                detail = (
                    f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
                    f"MFU {record['mfu']:.0%}"
                )
                bar.update(task, completed=record["step"], detail=detail)

    def _log(self, values: dict[str, float], step: int) -> None:
        for sink in list(self._sinks):
            try:
                sink.log(values, step)
            # A service that cannot be reached must not end what is seen elsewhere.
            except Exception as error:
                name = type(sink).__name__.strip("_")
                console.log(f"{self._title}: {name} gets no more numbers: {error}")
                self._sinks.remove(sink)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=5)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, title: str, work_dir: Path) -> None:
        wandb = _need("wandb", "track.wandb_project")
        # The same id when a training goes on: one curve, not two.
        self._run = wandb.init(
            project=project, name=title, id=work_dir.name, dir=str(work_dir), resume="allow"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, uri: str, title: str, work_dir: Path) -> None:
        mlflow = _need("mlflow", "track.mlflow_uri")
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("altiplano")
        experiment = found.experiment_id if found else self._client.create_experiment("altiplano")
        self._run = self._client.create_run(
            experiment, run_name=title, tags={"altiplano.run": work_dir.name}
        ).info.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _open_sinks(title: str, work_dir: Path, track: TrackSection) -> list[Sink]:
    sinks: list[Sink] = [_TensorBoard(work_dir / EVENTS)]
    if track.wandb_project is not None:
        sinks.append(_WandB(track.wandb_project, title, work_dir))
    if track.mlflow_uri is not None:
        sinks.append(_MLflow(track.mlflow_uri, title, work_dir))
    return sinks


def _need(package: str, key: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise TrainingError(
            f"`{key}` needs the package {package}: install the `track` extra, or drop the key"
        ) from None


def read_log(log_file: Path) -> list[dict[str, Any]]:
    """Step records by step; where a step was trained twice (after a kill), the later one."""
    records: dict[int, dict[str, Any]] = {}
    for record in read_records(log_file):
        if record["event"] == "step":
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def read_records(log_file: Path) -> list[dict[str, Any]]:
    """Every record, in the order in which they came."""
    return [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
