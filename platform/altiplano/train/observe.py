"""The loop's observer inside a Ray worker: log records, evaluations, checkpoints, orders to stop.

Worker 0 sends what people see to the board; the others only take part in what needs all of them.
Knows Ray Train and the modules of this room; not how a step is computed.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from altiplano.train.begin import STEPS
from altiplano.train.best import Progress
from altiplano.train.loop import Asked, Engine, StepRecord, Verdict
from altiplano.train.state import TrainState
from altiplano.train.watch import Meter, Profiler, StallTimer, Watchdog

if TYPE_CHECKING:
    from altiplano.train.checkpoints import Checkpoints
    from altiplano.train.held_out import HeldOut
    from altiplano.train.worker import TrainJob

PROFILE = "profile.json"
STALLED = "stalled-{}.txt"
_LOOK_S = 2.0
"""Ray itself asks every 5 s which nodes will be taken away."""
_GAUGES = ("loss", "tokens_per_second", "learning_rate", "grad_norm", "mfu", "memory_mib",
           "data_wait_s")  # fmt: skip


class WorkerObserver:
    """See `train.loop.Observer`; a context manager around the loop.

    Args:
        board: where worker 0 sends records; None on the others.
        progress: `TrainState.progress` of the state the training goes on from, or empty.
    """

    def __init__(
        self,
        job: "TrainJob",
        engine: Engine,
        checkpoints: "Checkpoints",
        held_out: "HeldOut | None",
        board: Any,
        *,
        work_dir: Path,
        progress: dict[str, Any],
    ) -> None:
        self._job, self._engine, self._checkpoints = job, engine, checkpoints
        self._held_out, self._board = held_out, board
        self._settings = job.settings
        self._best = Progress.from_json(progress.get("best"), job.settings)
        self._watchdog = Watchdog(job.settings)
        self._meter = _make_meter(engine, job.vocab_old)
        index = engine.rank.index
        self._stall = StallTimer(work_dir / STALLED.format(index), job.stall_timeout_s)
        steps = job.profile_steps if index == 0 else None
        self._profiler = Profiler(steps, work_dir / PROFILE)
        self._gauges: dict[str, Any] = {}
        self._answer: Any = None
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        self._stall.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._stall.stop()

    @property
    def ended_early(self) -> bool:
        """Whether the state the training goes on from was its last one, by early stopping."""
        return self._best.should_stop

    def start(self, start_step: int) -> None:
        """Say where the training begins."""
        if self._board is None:
            return
        from ray.util.metrics import Gauge

        for name in _GAUGES:
            self._gauges[name] = Gauge(f"altiplano_train_{name}", tag_keys=("stage",))
        self._send(
            event="start", machine=self._engine.machine.reason, step=start_step,
            steps=self._engine.schedule.steps, workers=self._engine.rank.count, pid=os.getpid(),
            matrix_tflops=self._meter.flops_per_second / 1e12,
        )  # fmt: skip

    def asks(self) -> Asked:
        """Worker 0 passes the driver's order to stop on, and asks to look at the nodes."""
        if self._answer is None:
            return Asked()
        import ray

        ready, _ = ray.wait([self._answer], timeout=0)
        stop = bool(ready) and bool(ray.get(self._answer))
        look = time.monotonic() - self._looked > _LOOK_S
        if look:
            self._looked = time.monotonic()
        return Asked(stop, look)

    def before_step(self, step: int) -> None:
        """Begin profiling where this is its first step."""
        self._profiler.before(step)

    def on_step(self, record: StepRecord) -> bool:
        """Check and log a step: the first, every `log_steps`-th and the last."""
        self._stall.beat()
        self._profiler.after(record.step)
        self._watchdog.check(record)
        due = record.step % self._settings.log_steps == 0
        if self._board is not None and (due or record.step in (1, record.steps)):
            values = self._meter.measure(record)
            for name, gauge in self._gauges.items():
                gauge.set(values[name], tags={"stage": self._settings.name})
            self._send(event="step", **values)
        return record.asked.look and _node_is_leaving()

    def on_evaluation(self, step: int) -> Verdict:
        """Held-out bits per byte of every language; the same numbers on every worker."""
        if self._held_out is None:
            return Verdict(best=False, stop=False)
        engine = self._engine
        bits = self._held_out.measure(
            engine.trainee, engine.rank, engine.machine, forward=engine.strategy.loss
        )
        self._stall.beat()
        best = self._best.update(step, bits)
        self._send(event="evaluation", step=step, bits_per_byte=bits, best=best)
        stop = self._settings.early_stop is not None and self._best.should_stop
        return Verdict(best=best and self._settings.keep_best, stop=stop)

    def on_checkpoint(self, step: int, *, best: bool) -> None:
        """Copy the state on all workers; worker 0 writes it while training goes on."""
        copied = self._engine.strategy.snapshot()
        self._stall.beat()
        if copied is None:
            return
        weights, moments = copied
        precision = str(self._engine.machine.compute).removeprefix("torch.")
        progress = {
            "precision": precision,
            STEPS: self._engine.schedule.steps,
            "best": self._best.to_json(),
        }
        self._checkpoints.save(TrainState(step, weights, moments, progress), best=best)

    def _send(self, **record: Any) -> None:
        """Give the board a record; its answer says whether to stop."""
        if self._board is not None:
            self._answer = self._board.push.remote(record)


def _make_meter(engine: Engine, vocab_old: int) -> Meter:
    """Measure what all workers' matrix units do together."""
    import torch

    from altiplano.model.counts import LlamaShape, flops_per_token
    from altiplano.model.load import num_pieces
    from altiplano.train.machine import matrix_speed

    machine, trainee = engine.machine, engine.trainee
    config = trainee.model.config.to_dict()
    speed = matrix_speed(machine.device, machine.compute, width=config["hidden_size"])
    total = torch.tensor([speed], dtype=torch.float64, device=machine.device)
    engine.rank.reduce_sum(total)
    flops = flops_per_token(
        LlamaShape.from_config(config), num_pieces(config), trainee.settings,
        engine.feed.sequence_length, vocab_old=vocab_old,
    )  # fmt: skip
    return Meter(flops, float(total))


def _node_is_leaving() -> bool:
    """Whether Ray was told that a worker's node will be taken away; a barrier over all workers."""
    import ray.train

    return ray.train.get_preemption_info() is not None
