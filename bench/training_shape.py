"""Model and data of the training benchmarks: written once, read by every measured process.

The model is a Llama of random weights with the vocabulary of Chinese LLaMA-2: 32,000 old pieces
and 23,296 new ones. Text is the first half of a Chinese novel, a line a document; records are
Alpaca's Chinese demo in its usual template, cut at a block's length, with the prompt masked. Both
sides of a comparison get the very same tokens, so nothing here times a tokenizer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB_OLD = 32_000
LENGTH = 512
"""Tokens of a block, and the longest record."""
BLOCKS_PER_STEP = 4
LORA = {"r": 8, "alpha": 32}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip
MODEL, RECORDS = "model", {"text": "text.npz", "instruct": "instruct.npz"}
_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


@dataclass(frozen=True)
class Documents:
    """Texts or records as tokens, one after the other."""

    ids: npt.NDArray[np.int32]
    """[N]."""
    lengths: npt.NDArray[np.int64]
    """[n], adding up to N."""
    loss: npt.NDArray[np.uint8]
    """[N], 1 where a token is a training target."""


def write_inputs(folder: Path, shared: Path, shape: str) -> None:
    """Write the model, both token files and both stores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.model.load import save_model
    from altiplano.vocabulary.load import Vocabulary

    vocabulary = Vocabulary(shared / "tokenizers" / "chinese_llama2_55296.model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary.size, max_position_embeddings=LENGTH, **SHAPES[shape]
    )
    (folder / MODEL).mkdir(parents=True)
    save_model(LlamaForCausalLM(config).bfloat16(), folder / MODEL)
    for name, documents in (
        ("text", _texts(shared, vocabulary)),
        ("instruct", _records(shared, vocabulary)),
    ):
        np.savez(folder / RECORDS[name], **vars(documents))
        _write_store(folder / name, documents, vocabulary.size, whole=name == "instruct")


def read_documents(folder: Path, name: str) -> Documents:
    """What `write_inputs` wrote: `text` or `instruct`."""
    return Documents(**np.load(folder / RECORDS[name]))


def _texts(shared: Path, vocabulary) -> Documents:  # type: ignore[no-untyped-def]
    lines = (shared / "text" / "hongloumeng.txt").read_text(encoding="utf-8-sig").splitlines()
    lines = [stripped for line in lines if (stripped := line.strip())]
    rows = [
        [vocabulary.bos_id, *ids, vocabulary.eos_id]
        for ids in vocabulary.encode_batch(lines[: len(lines) // 2])
    ]
    return _join(rows, [[0] + [1] * (len(row) - 1) for row in rows])


def _records(shared: Path, vocabulary) -> Documents:  # type: ignore[no-untyped-def]
    file = shared / "instruct" / "alpaca_zh_demo.json"
    records = json.loads(file.read_text(encoding="utf-8"))
    prompts = vocabulary.encode_batch(
        [
            _PROMPT.format(instruction="\n".join(filter(None, (r["instruction"], r["input"]))))
            for r in records
        ]
    )
    answers = vocabulary.encode_batch([r["output"] for r in records])
    rows, losses = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = [vocabulary.bos_id, *prompt, *answer, vocabulary.eos_id][:LENGTH]
        start = min(1 + len(prompt), LENGTH)
        rows.append(row)
        losses.append([0] * start + [1] * (len(row) - start))
    return _join(rows, losses)


def _join(rows: list[list[int]], losses: list[list[int]]) -> Documents:
    return Documents(
        np.concatenate([np.array(row, np.int32) for row in rows]),
        np.array([len(row) for row in rows]),
        np.concatenate([np.array(loss, np.uint8) for loss in losses]),
    )


def _write_store(folder: Path, documents: Documents, vocab_size: int, *, whole: bool) -> None:
    from altiplano.data.tokens.pack import Sequences, pack_records, pack_text
    from altiplano.data.tokens.store import StoreWriter

    pack = pack_records if whole else pack_text
    stream = [Sequences(documents.ids, documents.lengths, documents.loss)]
    with StoreWriter(
        folder, sequence_length=LENGTH, vocab_size=vocab_size, pad_id=0,
        tokenizer_fingerprint="bench",
    ) as writer:  # fmt: skip
        for blocks in pack(stream, LENGTH):
            writer.add(blocks)
