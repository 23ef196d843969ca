"""Speculation on one GPU without a cluster: our engine with no draft, one inside it, one beside it.

    python bench/gpu_serving.py --output FILE.json [--shape tiny --device cpu] [--only none engine]

It was not run on a GPU yet: on a CPU the tiny shape only shows that the code runs. No Ray, no HTTP:
`VllmEngine` is asked for tokens by 1, 8 and 32 callers at once. Each variant is a fresh process, so
that it has the whole GPU.

Random weights, but not at random: all blocks of the target after the draft's add little, so the
draft, which is those first blocks, is often right: `--echo` is the factor on what the
later blocks write. What is measured is the machinery, at an acceptance that is told with it.

- `none`; `engine`: our drafter in the engine's process; `vllm`: vLLM's own `draft_model`;
- `replica`: our draft server, a process of its own on the same GPU, over ZeroMQ.
"""

import argparse
import asyncio
import json
import multiprocessing
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import serving_models
from record import make_parser, write_record

from altiplano.config.serving import DraftSettings, ModelSettings

if TYPE_CHECKING:
    from altiplano.serving.engine.vllm import VllmEngine

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "engine": {"placement": "engine", "method": "drafter"},
    "replica": {"placement": "replica"},
    "vllm": {"placement": "engine", "method": "draft_model"},
}
SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 55296,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 2048,
    },
}  # fmt: skip
DRAFT_BLOCKS = {"7b": 2, "tiny": 1}
PROMPT, TOKENS = 128, 128
_REPORT_S = 1.5
"""The proposer's counters come twice a second."""
PACKAGES = ("torch", "transformers")

Row = dict[str, Any]


def main() -> None:
    """Write the models, measure every variant in a process of its own, write the numbers."""
    given = arguments()
    if given.variant:
        print(json.dumps(asyncio.run(measure(given))))
        return
    rows: Row = {}
    with tempfile.TemporaryDirectory() as name:
        given.folder = given.folder or Path(name)
        write_models(given)
        for variant in given.only or VARIANTS:
            rows[variant] = run_alone(given, variant)
            print(variant, json.dumps(rows[variant])[:600], flush=True)
    numbers = {"shape": SHAPES[given.shape], "echo": given.echo, "device": given.device}
    write_record(given.output, {**numbers, "rows": rows}, packages=PACKAGES)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = make_parser("Speculation on one GPU")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--echo", type=float, default=0.02, help="weight of the later blocks")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--folder", type=Path, help="where the models are written")
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_models(given: argparse.Namespace) -> None:
    """`target` and `draft`, its first blocks, in the folder; made on the device, it is quicker."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.draft import cut_draft
    from altiplano.model.load import save_model

    place = given.folder / "target"
    if (given.folder / "draft" / "config.json").is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    serving_models.write_tokenizer(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[given.shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        dtype="bfloat16", initializer_range=0.5 if given.shape == "tiny" else 0.05,
    )  # fmt: skip
    kind, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(given.device)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(kind)
    torch.set_default_device(device)
    with torch.no_grad():
        for block in model.model.layers[DRAFT_BLOCKS[given.shape] :]:
            block.self_attn.o_proj.weight *= given.echo
            block.mlp.down_proj.weight *= given.echo
    save_model(model.cpu(), place)
    cut_draft(place, given.folder / "draft", DRAFT_BLOCKS[given.shape])


def run_alone(given: argparse.Namespace, variant: str) -> Row:
    """One variant in a fresh process; what it says where it fails."""
    command = [
        sys.executable, __file__, "--output", str(given.output), "--shape", given.shape,
        "--device", given.device, "--folder", str(given.folder), "--variant", variant,
        "--callers", *map(str, given.callers),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


async def measure(given: argparse.Namespace) -> Row:
    """One variant: tokens per second and milliseconds per token at every number of callers."""
    from altiplano.serving.engine.vllm import VllmEngine
    from altiplano.serving.speculation.bridge import Bridge

    entry = settings(given)
    with draft_server(given, entry) as address:
        found = {} if address is None else {"one": {"address": address}}
        times = Times()
        bridge = Bridge("bench", times, read_notices=lambda: found)
        draft = None if given.variant == "none" else given.folder / "draft"
        engine = VllmEngine(entry, given.folder / "target", draft, bridge.channel)
        try:
            began = time.perf_counter()
            await engine.start()
            bridge.start()
            row: Row = {"startup_s": time.perf_counter() - began}
            await ask(engine, given, 2 * max(given.callers), max(given.callers))
            for callers in given.callers:
                await asyncio.sleep(_REPORT_S)
                before, times.ms = bridge.counts, []
                row[str(callers)] = await ask(engine, given, 3 * callers, callers)
                await asyncio.sleep(_REPORT_S)
                row[str(callers)]["draft"] = spent(before, bridge.counts, times.ms)
        finally:
            engine.shutdown()
            bridge.close()
    return row


def settings(given: argparse.Namespace) -> ModelSettings:
    """The engine's settings of a variant."""
    on_gpu = given.device == "cuda"
    return ModelSettings(
        name="bench", path=str(given.folder / "target"), dtype="bfloat16" if on_gpu else "float32",
        gpus_per_replica=int(on_gpu), enforce_eager=not on_gpu, max_model_len=512,
        kv_cache_gib=0.1,
        draft=DraftSettings(**VARIANTS[given.variant], num_gpus=int(on_gpu)),
    )  # fmt: skip


async def ask(engine: "VllmEngine", given: argparse.Namespace, jobs: int, callers: int) -> Row:
    """`callers` at once ask for `jobs` answers in all."""
    draw = np.random.default_rng(0)
    vocab = SHAPES[given.shape]["vocab_size"]
    tokens = TOKENS if given.shape != "tiny" else 32
    waiting = iter([draw.integers(3, vocab, PROMPT).tolist() for _ in range(jobs)])
    answers: list[tuple[int, float]] = []

    async def caller() -> None:
        for prompt in waiting:
            answers.append(await answer(engine, prompt, tokens))

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    wall = time.perf_counter() - began
    return {
        "tokens_per_s": sum(count for count, _ in answers) / wall,
        "per_token_ms": 1e3 * statistics.median(seconds for _, seconds in answers),
    }


async def answer(engine: "VllmEngine", prompt: list[int], tokens: int) -> tuple[int, float]:
    """Tokens of one answer, and seconds per token after the first step."""
    from altiplano.serving.messages import Job, Sampling

    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    job = Job(id=secrets.token_hex(16), prompt=prompt, sampling=sampling)
    count, first, at_first = 0, 0.0, 0
    async for step in engine.generate(job):
        if not count:
            first, at_first = time.perf_counter(), len(step.tokens)
        count += len(step.tokens)
    return count, (time.perf_counter() - first) / max(1, count - at_first)


def spent(before: Any, after: Any, times_ms: list[float]) -> Row:
    """What the proposer counted between two reports (`channel.Report`), and its times."""
    proposed, accepted = after.proposed - before.proposed, after.accepted - before.accepted
    return {
        "steps": after.steps - before.steps,
        "proposed": proposed,
        "acceptance": accepted / proposed if proposed else None,
        "ahead_hits": after.ahead_hits - before.ahead_hits,
        "ahead_misses": after.ahead_misses - before.ahead_misses,
        "fallbacks": {
            reason: count - before.fallbacks.get(reason, 0)
            for reason, count in after.fallbacks.items()
        },
        "draft_ms": statistics.median(times_ms) if times_ms else None,
        "tokens_per_step": after.tokens_per_step,
    }


class Times:
    """The bridge's metrics: only the times of drafts are kept, its totals tell the rest."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def add(self, name: str, amount: float, **tags: str) -> None:
        """Nothing."""

    def set(self, name: str, value: float) -> None:
        """Nothing."""

    def time(self, name: str, milliseconds: float) -> None:
        """Keep it."""
        self.ms.append(milliseconds)


@contextmanager
def draft_server(given: argparse.Namespace, entry: ModelSettings) -> Iterator[str | None]:
    """The address of a draft server, a process of its own; None where the variant has none."""
    if entry.draft.placement != "replica":
        yield None
        return
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    work = (given.folder / "draft", given.device, entry, theirs)
    process = context.Process(target=serve_draft, args=work, daemon=True)
    process.start()
    try:
        if not mine.poll(120):
            raise RuntimeError("the draft server does not come up")
        yield mine.recv()
    finally:
        process.terminate()
        process.join(10)


def serve_draft(model: Path, device: str, entry: ModelSettings, caller: Any) -> None:
    """The draft server's process: tell its address, answer until it is ended."""
    from altiplano.serving.speculation.drafter import Drafter
    from altiplano.serving.speculation.protocol import vocab_digest
    from altiplano.serving.speculation.server import DraftServer

    drafter = Drafter(
        model, device=device, dtype=entry.dtype, cache_gib=entry.draft.cache_gib,
        max_len=entry.max_model_len, threads=1 if device == "cpu" else None,
    )  # fmt: skip
    server = DraftServer(drafter, vocab_digest=vocab_digest(model), host="127.0.0.1")
    server.start()
    caller.send(server.address)
    threading.Event().wait()


if __name__ == "__main__":
    main()
