"""Our engine, in a process of its own: the worker's parts without Ray.

The trainee, feed, strategy, loop and checkpoints that a worker uses. At the end the state is saved
as in training, by a thread. Run by `training.py`; prints one JSON line.

    python bench/training_ours.py FOLDER text|instruct STEPS --rows new|all [--rank 0 --meet FILE]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from training_shape import BLOCKS_PER_STEP, LENGTH, LORA, MODEL, VOCAB_OLD
from training_used import memory_peak, size_of

from altiplano.config.training import TrainSettings
from altiplano.data.tokens.order import blocks_at
from altiplano.data.tokens.store import TokenStore
from altiplano.model.counts import LlamaShape, flops_per_token
from altiplano.model.load import load_config
from altiplano.train.checkpoints import Checkpoints
from altiplano.train.feed import Feed
from altiplano.train.loop import Asked, Engine, StepRecord, Verdict, train
from altiplano.train.machine import choose_machine, matrix_speed
from altiplano.train.schedule import make_schedule, stream_seed
from altiplano.train.state import TrainState
from altiplano.train.strategy import Sharing, Strategy, make_strategy
from altiplano.train.worker import TrainJob, build_trainee, make_objective, make_rank

SEED = 0
WARM_UP = 2
"""Steps that are not counted."""


@dataclass
class Clock:
    """Notes when every step is done; saves at the end."""

    strategy: Strategy
    checkpoints: Checkpoints
    records: list[StepRecord] = field(default_factory=list)
    cpu_ends: list[float] = field(default_factory=list)
    peak: int = 0
    stopped_s: float = 0.0

    def asks(self) -> Asked:
        """Nothing."""
        return Asked()

    def before_step(self, step: int) -> None:
        """Nothing to do."""

    def on_step(self, record: StepRecord) -> bool:
        """Keep the record."""
        self.records.append(record)
        self.cpu_ends.append(time.process_time())
        return False

    def on_evaluation(self, step: int) -> Verdict:
        """Nothing is evaluated."""
        return Verdict(best=False, stop=False)

    def on_checkpoint(self, step: int, *, best: bool) -> None:
        """Save; only what the step has to wait for is timed."""
        self.peak = memory_peak()
        started = time.perf_counter()
        if (copied := self.strategy.snapshot()) is not None:
            self.checkpoints.save(TrainState(step, *copied), best=best)
        self.stopped_s = time.perf_counter() - started


def main() -> None:
    """Measure one variant."""
    parser = argparse.ArgumentParser(description="One measured training of ours")
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", choices=["text", "instruct"])
    parser.add_argument("steps", type=int)
    parser.add_argument("--rows", choices=["new", "all"], default="new")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--meet", type=Path, help="file by which two workers find one another")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    workers = 2 if given.meet else 1
    if given.meet:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{given.meet}", rank=given.rank, world_size=workers
        )
    settings = TrainSettings(
        rows=given.rows, lora=LORA, learning_rate=2e-4, precision="bfloat16",
        steps=WARM_UP + given.steps, compile=given.compile,
        tokens_per_step=BLOCKS_PER_STEP * LENGTH,
        micro_batch_tokens=BLOCKS_PER_STEP * LENGTH // workers,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        job = TrainJob(
            settings=settings, model_dir=given.folder / MODEL, adapter_dirs=(),
            vocab_old=VOCAB_OLD, store_dir=given.folder / given.data, seed=SEED, run_key="bench",
            num_threads=torch.get_num_threads(), use_gpu=False,
        )  # fmt: skip
        measured = measure(job, given.rank, workers, Path(scratch))
    print(json.dumps(measured))


def measure(job: TrainJob, rank_index: int, workers: int, scratch: Path) -> dict[str, object]:
    """Train; what a worker sees of it."""
    engine = make_engine(job, rank_index, workers)
    checkpoints = Checkpoints(str(scratch), run_key=job.run_key, keep_last=1, say=print)
    clock = Clock(engine.strategy, checkpoints)
    # Before the training, when both workers' threads are idle.
    width = engine.trainee.model.config.hidden_size
    speed = workers * matrix_speed(engine.machine.device, engine.machine.compute, width=width)
    with engine.feed:
        train(engine, clock, start_step=0)
    checkpoints.wait()
    seconds = statistics.median(record.seconds for record in clock.records[WARM_UP:])
    cpu = clock.cpu_ends[-1] - clock.cpu_ends[WARM_UP - 1]
    tokens, records = count_steps(job, engine)
    targets = statistics.mean(record.targets for record in clock.records[WARM_UP:])
    config = engine.trainee.model.config.to_dict()
    flops = flops_per_token(
        LlamaShape.from_config(config), config["vocab_size"], job.settings, tokens / records,
        vocab_old=VOCAB_OLD, target_share=targets / tokens,
    )  # fmt: skip
    return {
        "tokens_per_s": tokens / seconds,
        "records_per_s": records / seconds,
        "s_per_step": seconds,
        "cpu_s_per_step": cpu / (len(clock.records) - WARM_UP),
        "matrix_speed_share": tokens / seconds * flops / speed,
        "matrix_GFLOP_per_s": speed / 1e9,
        "peak_memory_MB": clock.peak / 1e6,
        "checkpoint_MB": size_of(scratch) / 1e6,
        "save_stops_s": clock.stopped_s,
        "first_loss": clock.records[0].loss,
        "last_loss": clock.records[-1].loss,
        "machine": engine.machine.reason,
    }


def make_engine(job: TrainJob, rank_index: int, workers: int) -> Engine:
    """The parts, as a worker makes them."""
    rank = make_rank(rank_index, workers)
    width = load_config(job.model_dir).hidden_size
    machine = choose_machine(job.settings, width, use_gpu=job.use_gpu)
    trainee = build_trainee(job, machine)
    store = TokenStore.open(job.store_dir)
    schedule = make_schedule(job.settings, store.num_blocks, store.sequence_length)
    strategy = make_strategy(trainee, Sharing(), rank, machine.device)
    feed = Feed(store, schedule, machine, rank, job.seed)
    objective = make_objective(None, machine)
    return Engine(trainee, strategy, feed, schedule, machine, rank, job.seed, objective)


def count_steps(job: TrainJob, engine: Engine) -> tuple[float, float]:
    """Tokens without padding, and documents or records, of a counted step on average."""
    store, schedule = TokenStore.open(job.store_dir), engine.schedule
    order = stream_seed(job.seed, "order")
    tokens = records = 0
    for step in range(WARM_UP, schedule.steps):
        blocks = blocks_at(store.num_blocks, schedule.blocks_per_step, order, step)
        segments = store.batch(blocks).segment_ids
        tokens += int((segments > 0).sum())
        records += int(segments.max(axis=1).sum())
    counted = schedule.steps - WARM_UP
    return tokens / counted, records / counted


if __name__ == "__main__":
    main()
