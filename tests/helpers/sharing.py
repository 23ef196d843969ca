"""Two worker processes that train a tiny model under several strategies, one after the other.

Started as a module: `python -m tests.helpers.sharing FOLDER INDEX COUNT`. Each worker writes its
results to FOLDER/INDEX.pt. One process group for all strategies, because DeepSpeed is slow to load.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS, SEQUENCES, LENGTH, VOCAB_OLD, VOCAB = 4, 4, 12, 60, 80
NEW_ROWS: dict[str, Any] = {"rows": "new", "lora": {"r": 4}, "weight_decay": 0.1}
# Without it, weights this small would stay whole on every worker and nothing be gathered.
SPLIT_ALL = json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}})


@dataclass(frozen=True)
class Run:
    """One training: what is trained, how it is shared, what it goes on from."""

    settings: dict[str, Any]
    strategy: str = "ddp"
    offload: bool = False
    compute: str = "float32"
    tied: bool = False
    first: int = 0
    last: int = STEPS
    after: str | None = None
    """Name of the run whose last snapshot this one begins with."""
    sequences: int = SEQUENCES
    """Sequences of a step; fewer than workers leave some without a micro-batch."""


@dataclass
class Result:
    """What a worker saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    snapshot: Any = None


def train(run: Run, model_dir: Path, rank: Any, state: Any) -> Result:
    """Train one run on this worker; returns losses (global means), norms and the last snapshot."""
    import torch

    from altiplano.train.strategy import Sharing, make_strategy

    trainee = _trainee(run, model_dir)
    text = SPLIT_ALL if run.strategy.startswith("zero") else None
    sharing = Sharing(run.strategy, run.offload, text)  # type: ignore[arg-type]
    strategy = make_strategy(trainee, sharing, rank, torch.device("cpu"))
    if state is not None:
        strategy.restore(state)
    result = Result()
    for step in range(run.first, run.last):
        mine = list(_micro_batches(run, step, rank, strategy.lockstep))
        sums = torch.tensor([0.0, sum(float((labels >= 0).sum()) for _, labels in mine)])
        total = sums[1:].clone()
        rank.reduce_sum(total)
        for number, (ids, labels) in enumerate(mine):
            loss = strategy.loss(lambda ids=ids, labels=labels: _loss(run, trainee, ids, labels))
            strategy.backward(loss / float(total), last=number == len(mine) - 1)
            sums[0] += loss.detach()
        rank.reduce_sum(sums)
        result.losses.append(float(sums[0] / total))
        result.norms.append(strategy.step(1 - 0.1 * step, trainee.settings.max_grad_norm))
    result.snapshot = strategy.snapshot()
    return result


def _trainee(run: Run, model_dir: Path) -> Any:
    from altiplano.config.training import TrainSettings
    from altiplano.model.adapt import make_trainee
    from altiplano.model.load import load_model

    model = load_model(model_dir / ("tied" if run.tied else "untied"), run.compute)
    settings = TrainSettings(max_grad_norm=0.5, **run.settings)
    trainee = make_trainee(model, settings, VOCAB_OLD, seed=7)
    trainee.model.train()
    return trainee


def _micro_batches(run: Run, step: int, rank: Any, lockstep: bool) -> Iterator[tuple[Any, Any]]:
    """This worker's sequences of a step, one by one; with empty ones where all march in step."""
    import torch

    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (run.sequences, LENGTH), generator=draw)
    # Unequal numbers of targets: a mean of means would differ from the mean.
    keep = torch.rand(ids.shape, generator=draw) < torch.rand(len(ids), 1, generator=draw)
    labels = torch.where(keep, ids.roll(-1, dims=1), -100)
    labels[:, 0] = ids[:, 1]
    mine = list(range(rank.index, run.sequences, rank.count))
    for index in mine:
        yield ids[index : index + 1], labels[index : index + 1]
    most = -(-run.sequences // rank.count)
    for _ in range(most - len(mine) if lockstep else 0):
        yield ids[:1], torch.full_like(labels[:1], -100)


def _loss(run: Run, trainee: Any, ids: Any, labels: Any) -> Any:
    import torch

    from altiplano.model.loss import summed_cross_entropy

    compute = getattr(torch, run.compute)
    with torch.autocast("cpu", compute, enabled=run.compute != "float32"):
        return summed_cross_entropy(trainee.hidden(input_ids=ids), labels, trainee.head)


def run_workers(folder: Path, runs: dict[str, Run], count: int) -> list[dict[str, Result]]:
    """Start `count` workers for all runs; returns what each saw, by run name."""
    import torch

    torch.save(runs, folder / "runs.pt")
    command = [sys.executable, "-m", "tests.helpers.sharing", str(folder)]
    workers = [
        subprocess.Popen([*command, str(index), str(count)], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for index in range(count)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(said)
    (folder / "said.txt").write_text("".join(said))
    return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(count)]


def write_models(folder: Path) -> None:
    """The tiny base, untied and tied."""
    from tests.helpers.tiny_run import write_model

    write_model(folder / "untied", vocab=VOCAB)
    write_model(folder / "tied", tied=True, vocab=VOCAB)


def _main(folder: Path, index: int, count: int) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(index))
    import torch
    import torch.distributed as dist

    from altiplano.train.state import TrainState
    from altiplano.train.strategy import Rank

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=index, world_size=count
    )
    runs: dict[str, Run] = torch.load(folder / "runs.pt", weights_only=False)
    results: dict[str, Result] = {}
    for name, run in runs.items():
        # Worker 0's snapshot is what a checkpoint would hold; every worker reads a checkpoint.
        shared = [results[run.after].snapshot if run.after else None]
        dist.broadcast_object_list(shared)
        state = TrainState(run.first, *shared[0]) if shared[0] else None
        results[name] = train(run, folder, Rank(index, count, dist.all_reduce), state)
    torch.save(results, folder / f"{index}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # What is pickled must be of the importable module, not of __main__.
    from tests.helpers.sharing import _main as main

    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
