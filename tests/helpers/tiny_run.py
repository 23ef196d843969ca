"""A tiny model and token store on disk, for tests that train."""

from pathlib import Path

import numpy as np

from altiplano.data.tokens.pack import FIRST, TARGET, TOKEN, Blocks
from altiplano.data.tokens.store import StoreWriter

VOCAB_OLD, VOCAB_NEW, LENGTH = 60, 80, 32


def write_model(directory: Path, *, tied: bool = False, vocab: int = VOCAB_NEW) -> Path:
    """A random two-block Llama, saved in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.model.load import save_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    directory.mkdir(parents=True)
    save_model(LlamaForCausalLM(config), directory)
    return directory


def write_store(directory: Path, blocks: int = 24, *, seed: int = 0) -> Path:
    """Blocks of two documents whose tokens count up, with unequal numbers of targets."""
    rng = np.random.default_rng(seed)
    steps = np.arange(LENGTH)
    with StoreWriter(
        directory, sequence_length=LENGTH, vocab_size=VOCAB_NEW, pad_id=0,
        tokenizer_fingerprint="tiny",
    ) as store:  # fmt: skip
        for number in range(blocks):
            cut = int(rng.integers(4, LENGTH - 4))
            starts = np.where(steps < cut, *rng.integers(0, VOCAB_NEW, 2))
            is_target = rng.random(LENGTH) < 0.2 + 0.7 * (number % 2)
            is_target[[1, 2]] = True
            is_first = (steps == 0) | (steps == cut)
            flags = TOKEN | np.where(is_first, FIRST, np.where(is_target, TARGET, 0))
            tokens = (starts + steps) % VOCAB_NEW
            store.add(Blocks(tokens[None].astype(np.int32), flags[None].astype(np.uint8)))
    return directory
