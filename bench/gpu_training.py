"""Training speed of a 7B model on one GPU: our engine, Liger's kernels, and both heads alone.

    python bench/gpu_training.py --output FILE.json [--shape tiny --device cpu]

It was not run on a GPU yet: on a CPU the tiny shape only shows that the code runs. No Ray, no
files: random weights in bfloat16, random tokens, every block of 4,096 packed with documents of
different lengths. Trained are the new rows of Chinese LLaMA-2's vocabulary and LoRA of rank 64.

- `ours`: FlashAttention 2 where flash-attn is installed, else PyTorch's SDPA by document.
- `liger`: transformers with PEFT (`modules_to_save` embedding and head: it has no new rows alone)
  and Liger's kernels; left out where liger-kernel is not installed.
- `heads`: our loss and Liger's fused linear cross-entropy on the same states; both give gradients
  of states and weights, Liger's of the whole matrix.

`mfu` is `model.counts.flops_per_token` (products of weights and attention within the mean document,
forward and backward; frozen matrices need no gradient of weight) times tokens per second, over
`matrix_speed`, which is measured. The peer trains more rows, and its arithmetic is counted so.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from record import make_parser, write_record

from altiplano.config.training import TrainSettings
from altiplano.data.tokens.store import Batch
from altiplano.model import attention
from altiplano.model.adapt import make_trainee
from altiplano.model.counts import LlamaShape, flops_per_token
from altiplano.model.loss import summed_cross_entropy
from altiplano.model.recompute import apply_recompute
from altiplano.train.batch import make_inputs
from altiplano.train.machine import choose_machine, matrix_speed
from altiplano.train.strategy import Rank, Sharing, make_strategy
from altiplano.train.worker import make_objective

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 55_296,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 640,
    },
}  # fmt: skip
LENGTHS = {"7b": 4096, "tiny": 128}
OLD_SHARE = 32_000 / 55_296
MEAN_DOCUMENTS = 8
"""Documents of a block, on average."""

Row = dict[str, Any]


def main() -> None:
    """Measure all, print and write."""
    parser = make_parser("Training of a 7B model on one GPU")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of a micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="counted steps")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="full")
    given = parser.parse_args()
    device = torch.device(given.device)
    rows: dict[str, Row] = {"ours": measure_ours(given, device)}
    rows["our head"] = measure_head(given, device, our_head)
    if find_spec("liger_kernel") is not None:
        rows["liger"] = measure_liger(given, device)
        rows["liger's head"] = measure_head(given, device, liger_head)
    for name, row in rows.items():
        print(name, row)
    write_record(given.output, {"rows": rows}, packages=("torch", "transformers", "peft"))


def settings_of(given: argparse.Namespace, *, rows: str = "new") -> TrainSettings:
    """New (or all) rows and LoRA of rank 64."""
    tokens = given.blocks * LENGTHS[given.shape]
    return TrainSettings(
        rows=rows, lora={"r": 64, "alpha": 128}, learning_rate=1e-4, precision="bfloat16",
        tokens_per_step=tokens, micro_batch_tokens=tokens, gradient_checkpointing=given.recompute,
    )  # fmt: skip


def make_model(given: argparse.Namespace, device: torch.device) -> Any:
    """Random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[given.shape], max_position_embeddings=LENGTHS[given.shape])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def make_batch(given: argparse.Namespace, generator: np.random.Generator) -> Batch:
    """Full blocks of random tokens in documents of random lengths."""
    length = LENGTHS[given.shape]
    shape = (given.blocks, length)
    ids = generator.integers(0, SHAPES[given.shape]["vocab_size"], shape)
    first = generator.random(shape) < MEAN_DOCUMENTS / length
    first[:, 0] = True
    at = np.arange(length)
    positions = at - np.maximum.accumulate(np.where(first, at, 0), axis=1)
    labels = np.full(shape, -100)
    labels[:, :-1] = np.where(first[:, 1:], -100, ids[:, 1:])
    return Batch(ids, positions, np.cumsum(first, axis=1), labels)


def measure_ours(given: argparse.Namespace, device: torch.device) -> Row:
    """Our trainee, attention, loss and strategy."""
    settings = settings_of(given)
    width = SHAPES[given.shape]["hidden_size"]
    machine = choose_machine(settings, width, use_gpu=device.type == "cuda")
    attention.register()
    model = make_model(given, device)
    model.config._attn_implementation = machine.attention
    vocab_old = int(OLD_SHARE * model.config.vocab_size)
    trainee = make_trainee(model, settings, vocab_old, seed=0)
    trainee.model.to(device).train()
    apply_recompute(trainee.model, given.recompute)
    strategy = make_strategy(trainee, Sharing(), Rank(0, 1, lambda tensor: None), device)
    objective = make_objective(None, machine)

    def step(batch: Batch) -> None:
        """Take one optimizer step on a batch."""
        inputs = make_inputs(batch, machine.attention, device)
        targets = int((batch.labels >= 0).sum())

        def compute() -> torch.Tensor:
            with torch.autocast(device.type, machine.compute):
                return objective(trainee, inputs)

        strategy.backward(strategy.loss(compute) / targets, last=True)
        strategy.step(1.0, settings.max_grad_norm)

    return {**time_steps(given, device, step, settings, vocab_old), "machine": machine.reason}


def measure_liger(given: argparse.Namespace, device: torch.device) -> Row:
    """transformers and PEFT with Liger's kernels: full copies of embedding and head are trained."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from peft import LoraConfig, get_peft_model

    settings = settings_of(given, rows="all")
    assert settings.lora is not None
    base = make_model(given, device)
    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    base.config._attn_implementation = "flash_attention_2" if flash else "sdpa"
    apply_liger_kernel_to_llama(model=base)
    apply_recompute(base, given.recompute)
    base.enable_input_require_grads()
    config = LoraConfig(
        r=settings.lora.r, lora_alpha=settings.lora.alpha, task_type="CAUSAL_LM",
        target_modules=settings.lora.modules, modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, fused=True)

    def step(batch: Batch) -> None:
        """Take one optimizer step on a batch."""
        inputs = make_inputs(batch, "flash_attention_2", device)
        # transformers shifts labels itself.
        labels = torch.from_numpy(np.where(batch.position_ids == 0, -100, batch.input_ids))
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**inputs.model, labels=labels.view(1, -1).to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_steps(given, device, step, settings, 0)


def time_steps(
    given: argparse.Namespace,
    device: torch.device,
    step: Callable[[Batch], None],
    settings: TrainSettings,
    vocab_old: int,
) -> Row:
    """Tokens per second (median of the steps after two), MFU and peak memory."""
    shape = SHAPES[given.shape]
    generator = np.random.default_rng(0)
    seconds = []
    tokens = given.blocks * LENGTHS[given.shape]
    for _ in range(given.steps + 2):
        batch = make_batch(given, generator)
        started = time.perf_counter()
        step(batch)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    rate = tokens / statistics.median(seconds[2:])
    flops = flops_per_token(
        LlamaShape.from_config({**shape, "num_key_value_heads": shape["num_attention_heads"]}),
        shape["vocab_size"], settings, LENGTHS[given.shape] / MEAN_DOCUMENTS, vocab_old=vocab_old,
    )  # fmt: skip
    speed = matrix_speed(device, torch.bfloat16, width=shape["hidden_size"])
    return {"tokens_per_s": rate, "mfu": rate * flops / speed, **memory(device)}


def our_head(weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Our loss with a plain head that is trained as a whole."""
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = torch.nn.Parameter(weight)
    return lambda states, labels: summed_cross_entropy(states[None], labels[None], head)


def liger_head(weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    parameter = torch.nn.Parameter(weight)
    return lambda states, labels: loss(parameter, states, labels)


def measure_head(
    given: argparse.Namespace,
    device: torch.device,
    make: Callable[[torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
) -> Row:
    """Milliseconds of loss and gradients over one micro-batch's states, and peak memory."""
    shape = SHAPES[given.shape]
    tokens, vocab = given.blocks * LENGTHS[given.shape], shape["vocab_size"]
    width = shape["hidden_size"]
    compute = torch.bfloat16
    gc.collect()
    run = make(torch.randn(vocab, width, device=device, dtype=compute) / width**0.5)
    labels = torch.randint(0, vocab, (tokens,), device=device)
    memory(device)
    seconds = []
    for _ in range(given.steps + 2):
        states = torch.randn(tokens, width, device=device, dtype=compute, requires_grad=True)
        wait_for(device)
        started = time.perf_counter()
        run(states, labels).backward()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return {"ms": 1e3 * statistics.median(seconds[2:]), **memory(device)}


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> Row:
    """Peak of the GPU's memory since this was last asked; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_MB": peak / 1e6}


if __name__ == "__main__":
    main()
