"""Parameter counts of a Llama in closed form, before any weight exists.

Knows shapes and what a stage trains; no tensors, no torch, no files. Costs microseconds. A test
holds it against counts of real models and against the published ones of LLaMA-7B and 13B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from altiplano.config.training import TrainSettings

Counts = dict[str, int]
"""Parameters by component: `embedding`, `head`, `blocks`, `norm`, `lora`."""


@dataclass(frozen=True)
class LlamaShape:
    """What of a Llama's config decides how many parameters it has."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape in a `config.json`, with transformers' defaults for keys it leaves out."""
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name -> (inputs, outputs)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }


def count_parameters(shape: LlamaShape, vocab: int) -> Counts:
    """All parameters of a model with `vocab` rows, by component; a tied head counts as 0."""
    sizes = shape.linear_sizes
    block = sum(inputs * outputs for inputs, outputs in sizes.values()) + 2 * shape.hidden_size
    for name, (_, outputs) in sizes.items():
        in_attention = name in ("q_proj", "k_proj", "v_proj", "o_proj")
        has_bias = shape.attention_bias if in_attention else shape.mlp_bias
        block += outputs if has_bias else 0
    return {
        "embedding": vocab * shape.hidden_size,
        "head": 0 if shape.tie_word_embeddings else vocab * shape.hidden_size,
        "blocks": shape.num_hidden_layers * block,
        "norm": shape.hidden_size,
    }


def trainable_parameters(
    shape: LlamaShape,
    vocab_old: int,
    vocab_new: int,
    settings: TrainSettings,
    *,
    rows_padding: int = 0,
) -> Counts:
    """Parameters a stage gives to its optimizer, by component.

    Args:
        shape: of the model.
        vocab_old: pieces of the base vocabulary.
        vocab_new: pieces now.
        settings: what the stage trains. LoRA adds r * (inputs + outputs) per linear layer
            (Hu et al. 2021); names that are no linear layer of a Llama add nothing.
        rows_padding: rows of the matrices after the pieces. They are part of whole matrices that
            are trained, though their gradient is zero.
    """
    if settings.full:
        return {**count_parameters(shape, vocab_new + rows_padding), "lora": 0}
    whole = vocab_new + rows_padding
    rows = {"none": 0, "new": vocab_new - vocab_old, "all": whole}[settings.rows]
    per_matrix = rows * shape.hidden_size
    lora = 0
    if settings.lora is not None:
        adapted = [
            size for name, size in shape.linear_sizes.items() if name in settings.lora.modules
        ]
        per_block = sum(settings.lora.r * (inputs + outputs) for inputs, outputs in adapted)
        lora = shape.num_hidden_layers * per_block
    return {
        "embedding": per_matrix,
        "head": 0 if shape.tie_word_embeddings else per_matrix,
        "blocks": 0,
        "norm": 0,
        "lora": lora,
    }
