"""One training by groups of worker processes of several sizes, one group after the other.

Started as a module: `python -m tests.helpers.worlds FOLDER INDEX COUNT...`. Each process takes part
in every group that is large enough for it; worker 0 writes the group's losses to FOLDER/COUNT.json.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny_run import LENGTH, VOCAB_OLD

STEPS, BLOCKS = 20, 4


def settings():  # type: ignore[no-untyped-def]  # torch is imported late
    """Four blocks a step, one to a micro-batch: 1 worker accumulates 4 times, 4 workers never."""
    from altiplano.config.training import LoraSettings, TrainSettings

    return TrainSettings(
        rows="new", lora=LoraSettings(r=4), steps=STEPS, tokens_per_step=BLOCKS * LENGTH,
        micro_batch_tokens=LENGTH, learning_rate=1e-2, precision="float32",
    )  # fmt: skip


def losses_of_groups(folder: Path, counts: list[int]) -> dict[int, list[float]]:
    """Train `folder`'s model `m` on its store `s` with each number of workers."""
    command = [sys.executable, "-m", "tests.helpers.worlds", str(folder)]
    sizes = [str(count) for count in counts]
    workers = [subprocess.Popen([*command, str(index), *sizes]) for index in range(max(counts))]
    try:
        assert [worker.wait(timeout=200) for worker in workers] == [0] * len(workers)
    finally:
        for worker in workers:
            worker.kill()
    return {count: json.loads((folder / f"{count}.json").read_text()) for count in counts}


def train(folder: Path, index: int, count: int) -> list[float]:
    """Losses of one worker's part."""
    import torch
    import torch.distributed as dist

    from altiplano.data.tokens.store import TokenStore
    from altiplano.model.adapt import make_trainee
    from altiplano.model.attention import DOCUMENTS
    from altiplano.model.load import load_model
    from altiplano.train.local import train_here
    from altiplano.train.machine import Machine
    from altiplano.train.strategy import Rank

    trainee = make_trainee(load_model(folder / "m"), settings(), VOCAB_OLD, seed=1)
    machine = Machine(torch.device("cpu"), torch.float32, DOCUMENTS, "test")
    rank = Rank(index, count, dist.all_reduce if count > 1 else lambda tensor: None)
    store = TokenStore.open(folder / "s")
    records, _ = train_here(trainee, store, seed=5, machine=machine, rank=rank)
    return [record.loss for record in records]


def _main(folder: Path, index: int, counts: list[int]) -> None:
    import torch.distributed as dist

    for count in counts:
        if index >= count:
            continue
        meeting = f"file://{folder / f'meeting-{count}'}"
        dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=count)
        losses = train(folder, index, count)
        if index == 0:
            (folder / f"{count}.json").write_text(json.dumps(losses))
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3:]])
