"""The published recipes' way, in a process of its own: transformers' Trainer with PEFT.

LoRA on the seven projections, `modules_to_save` embedding and head, bf16 by the trainer's flag,
batches of four. Text is joined and cut at every block (`group_texts`); records are padded to the
longest of their batch. Run by `training.py`; prints one JSON line.

    python bench/training_peer.py FOLDER text|instruct STEPS [--load float32|bfloat16]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from training_shape import BLOCKS_PER_STEP, LENGTH, LORA, MODEL, MODULES, read_documents
from training_used import memory_peak, size_of

Example = dict[str, list[int]]


def main() -> None:
    """Measure one kind of data."""
    parser = argparse.ArgumentParser(description="One measured training of the peer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=["text", "instruct"])
    parser.add_argument("steps", type=int)
    parser.add_argument("--load", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(measure(given.folder, given.task, given.steps, given.load)))


def measure(folder: Path, task: str, steps: int, load: str) -> dict[str, float]:
    """Train; the first step is not counted."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    examples = text_blocks(folder) if task == "text" else records(folder)
    ends: list[tuple[float, float]] = []
    collator = Collator()

    class Clock(TrainerCallback):
        """Notes when every step is done, by the wall and by the processors."""

        def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            """A step is done."""
            ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, per_device_train_batch_size=BLOCKS_PER_STEP, max_steps=steps + 1,
            learning_rate=2e-4, weight_decay=0.01, warmup_steps=1, lr_scheduler_type="cosine",
            bf16=True, use_cpu=True, save_strategy="no", logging_strategy="steps", logging_steps=1,
            report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            make_model(folder, load), arguments, data_collator=collator, train_dataset=examples,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        peak = memory_peak()
        started = time.perf_counter()
        trainer._save_checkpoint(trainer.model, trial=None)
        save_seconds = time.perf_counter() - started
        saved = size_of(Path(output))
    tokens = sum(collator.batch_tokens[1 : steps + 1])
    seconds, cpu = (ends[-1][k] - ends[0][k] for k in (0, 1))
    return {
        "tokens_per_s": tokens / seconds,
        "records_per_s": steps * BLOCKS_PER_STEP / seconds,
        "cpu_s_per_step": cpu / steps,
        "s_per_step": seconds / steps,
        "peak_memory_MB": peak / 1e6,
        "checkpoint_MB": saved / 1e6,
        "save_stops_s": save_seconds,
        "last_loss": [r["loss"] for r in trainer.state.log_history if "loss" in r][-1],
    }


def make_model(folder: Path, load: str) -> torch.nn.Module:
    """The model with LoRA and full copies of embedding and head."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / MODEL, dtype=getattr(torch, load))
    config = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0, target_modules=MODULES,
        modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def text_blocks(folder: Path) -> list[Example]:
    """All documents joined and cut at every block, as the recipes' `group_texts` does."""
    ids = read_documents(folder, "text").ids
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def records(folder: Path) -> list[Example]:
    """Records as they are, prompts masked."""
    documents = read_documents(folder, "instruct")
    labels = np.where(documents.loss == 1, documents.ids, -100)
    cuts = np.cumsum(documents.lengths)[:-1]
    return [
        {"input_ids": ids.tolist(), "labels": target.tolist()}
        for ids, target in zip(np.split(documents.ids, cuts), np.split(labels, cuts), strict=True)
    ]


class Collator:
    """Pads to the longest; notes how many tokens every batch had."""

    def __init__(self) -> None:
        self.batch_tokens: list[int] = []

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """One batch."""
        lengths = [len(example["input_ids"]) for example in examples]
        self.batch_tokens.append(sum(lengths))

        def rows(key: str, filler: int) -> torch.Tensor:
            return torch.tensor(
                [e[key] + [filler] * (max(lengths) - len(e[key])) for e in examples]
            )

        ids = rows("input_ids", -1)
        return {
            "input_ids": ids.clamp(min=0),
            "attention_mask": (ids >= 0).long(),
            "labels": rows("labels", -100),
        }


if __name__ == "__main__":
    main()
