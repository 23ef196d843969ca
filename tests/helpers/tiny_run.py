"""A tiny model and token store on disk, for tests that train."""

from pathlib import Path

import numpy as np

from altiplano.data.pack import Block
from altiplano.data.store import StoreWriter

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
    with StoreWriter(directory, sequence_length=LENGTH, vocab_size=VOCAB_NEW, pad_id=0) as store:
        for number in range(blocks):
            cut = int(rng.integers(4, LENGTH - 4))
            starts = np.where(np.arange(LENGTH) < cut, *rng.integers(0, VOCAB_NEW, 2))
            ids = (starts + np.arange(LENGTH)) % VOCAB_NEW
            segments = np.where(np.arange(LENGTH) < cut, 1, 2)
            loss = (rng.random(LENGTH) < 0.2 + 0.7 * (number % 2)).astype(np.uint8)
            loss[[1, 2]] = 1
            store.add(Block(ids, segments, loss))
    return directory
