"""A finished run as small as vLLM serves it: `merge/` and `draft/` with one tokenizer."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.artifact import Manifest, write_artifact

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)
_FIRST_TEXT_ID = 259
"""After <unk>, <s>, </s> and the 256 byte pieces."""


@dataclass(frozen=True)
class Shape:
    """What a test may vary."""

    vocab_size: int = 400
    head_dim: int = 32
    seed: int = 0
    context: int = 256


def write_served_run(directory: Path, shape: Shape = Shape()) -> Path:
    """Write a random target of three layers and its first layer as draft; return `directory`.

    The later layers write little, so that the draft is often right.
    """
    target = _target(shape)
    _write_model(directory / "merge", "merge", target, shape)
    _write_model(directory / "draft", "draft", _first_layer(target), shape)
    return directory


def write_small_model(directory: Path, shape: Shape = Shape()) -> Path:
    """Write only a model of one layer, as an artifact; return `directory`."""
    _write_model(directory, "draft", _first_layer(_target(shape)), shape)
    return directory


def _target(shape: Shape) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(shape.seed)
        model = LlamaForCausalLM(config).eval()
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
        # Never likeliest: control and byte pieces, so that every answer is whole characters.
        model.lm_head.weight[:_FIRST_TEXT_ID] = 0
    return model


def _first_layer(target: "LlamaForCausalLM") -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    draft = LlamaForCausalLM(LlamaConfig(**{**target.config.to_dict(), "num_hidden_layers": 1}))
    draft.load_state_dict(target.state_dict(), strict=False)
    return draft.eval()


def _write_model(directory: Path, stage: str, model: "LlamaForCausalLM", shape: Shape) -> None:
    from altiplano.vocabulary.load import tokenizer_fingerprint

    vocab_new = shape.vocab_size
    manifest = Manifest(kind="model", stage=stage, section={}, inputs={}, vocab_new=vocab_new)
    with write_artifact(directory, manifest) as partial:
        model.save_pretrained(partial)
        _write_tokenizer(partial, shape)
        manifest.tokenizer_fingerprint = tokenizer_fingerprint(partial)


def _write_tokenizer(directory: Path, shape: Shape) -> None:
    """Train a tokenizer on words drawn by `shape.seed` and write it."""
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.train import train_sentencepiece

    draw = random.Random(shape.seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(600)]
    file = directory / "trained.model"
    train_sentencepiece(lines, vocab_size=shape.vocab_size, output=file, purpose="base")
    save_tokenizer(file.read_bytes(), directory, chat_template=_TEMPLATE)
    file.unlink()
