"""Training speed, memory and checkpoints of our engine beside transformers' Trainer with PEFT.

    python bench/training.py --output FILE.json [--steps 5] [--quick]

Same model (random weights, see `training_shape.py`), tokens, types and threads on both sides; every
row is a fresh process, so its peak of physical memory is its own. The peer is the published
recipes' way, see `training_peer.py`. Five minutes on two idle cores; `--quick` takes one step of a
tiny model, to see that it runs.

- `tokens_per_s` without padding, `records_per_s` of instructions (of text: documents or blocks),
- `matrix_speed_share`: the model's own arithmetic over what the cores do in one matrix product,
- `save_stops_s`: how long a checkpoint keeps the next step waiting.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import make_parser, write_record
from training_shape import SHAPES, SHARED, write_inputs

THREADS = 2
OURS, PEER = "training_ours.py", "training_peer.py"
VARIANTS: dict[str, tuple[str, ...]] = {
    "peer, text": (PEER, "text"),
    "ours, text, new rows": (OURS, "text"),
    "ours, text, all rows": (OURS, "text", "--rows", "all"),
    "peer, instruct": (PEER, "instruct"),
    "ours, instruct, new rows": (OURS, "instruct"),
    "peer, text, base in bf16": (PEER, "text", "--load", "bfloat16"),
}
TWO_WORKERS = "ours, text, new rows, 2 workers"
COLUMNS = (
    "tokens_per_s", "records_per_s", "matrix_speed_share", "peak_memory_MB", "checkpoint_MB",
    "save_stops_s", "cpu_s_per_step",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "accelerate")

Row = dict[str, Any]


def main() -> None:
    """Measure every variant, print the table and write it."""
    given = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, given.shared, given.shape)
        rows = {}
        for variant, command in VARIANTS.items():
            rows[variant] = measure(folder, given.steps, command)
            show(variant, rows[variant])
        rows[TWO_WORKERS] = measure_two_workers(folder, given.steps)
        show(TWO_WORKERS, rows[TWO_WORKERS])
    ratios = compare(rows)
    print(json.dumps(ratios, indent=2))
    numbers = {"shape": SHAPES[given.shape], "threads": THREADS, "rows": rows, "ratios": ratios}
    write_record(given.output, numbers, packages=PACKAGES)


def arguments() -> argparse.Namespace:
    """What the command line says; `--quick` overrides shape and steps."""
    parser = make_parser("Training beside transformers' Trainer with PEFT")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of every row")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--quick", action="store_true", help="one step of a tiny model")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the real data")
    given = parser.parse_args()
    if given.quick:
        given.shape, given.steps = "tiny", 1
    return given


def measure(folder: Path, steps: int, command: tuple[str, ...]) -> Row:
    """One variant in a fresh process."""
    return finish(start(folder, steps, command, THREADS))


def measure_two_workers(folder: Path, steps: int) -> Row:
    """Two processes of one thread each; memory is of both, the rest as worker 0 saw it."""
    meet = str(folder / "meet")
    workers = [
        start(folder, steps, (OURS, "text", "--meet", meet, "--rank", str(rank)), THREADS // 2)
        for rank in (0, 1)
    ]
    first, second = (finish(worker) for worker in workers)
    for key in ("peak_memory_MB", "cpu_s_per_step"):
        first[key] += second[key]
    return first


def start(
    folder: Path, steps: int, command: tuple[str, ...], threads: int
) -> "subprocess.Popen[str]":
    """Start a measured process."""
    script, data, *rest = command
    line = [sys.executable, Path(__file__).parent / script, folder, data, str(steps), *rest]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [str(part) for part in line], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> Row:
    """The JSON of its last line.

    Raises:
        SystemExit: it failed; with its last words.
    """
    out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed:\n{errors[-2000:]}")
    row: Row = json.loads(out.splitlines()[-1])
    return row


def show(variant: str, row: Row) -> None:
    """One line of the table."""
    numbers = (f"{key} {row[key]:.4g}" for key in COLUMNS if key in row)
    print(f"{variant:34}", "  ".join(numbers), flush=True)


def compare(rows: dict[str, Row]) -> dict[str, float]:
    """Ours over the peer's, of what each claim is about."""

    def ratio(key: str, ours: str, other: str) -> float:
        return round(rows[ours][key] / rows[other][key], 2)

    new, peer = "ours, text, new rows", "peer, text"
    return {
        "text, new rows: tokens/s": ratio("tokens_per_s", new, peer),
        "text, all rows: tokens/s": ratio("tokens_per_s", "ours, text, all rows", peer),
        "instruct, new rows: records/s": ratio(
            "records_per_s", "ours, instruct, new rows", "peer, instruct"
        ),
        "text, new rows: peak memory": ratio("peak_memory_MB", new, peer),
        "text, all rows: peak memory": ratio("peak_memory_MB", "ours, text, all rows", peer),
        "text, new rows: checkpoint": ratio("checkpoint_MB", new, peer),
        "2 workers over 1: tokens/s": ratio("tokens_per_s", TWO_WORKERS, new),
    }


if __name__ == "__main__":
    main()
