"""Parameters of a Llama and the operations of training it, in closed form, before it exists.

Knows shapes and what a stage trains; no tensors, no torch, no files. Costs microseconds. Tests
hold it against real models, the published counts of LLaMA-7B and 13B, and PyTorch's own counter.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from altiplano.config.training import LoraSettings, TrainSettings
from altiplano.errors import ModelError

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


def require_shape(
    published: Mapping[str, Any] | None, found: Mapping[str, Any], origin: str
) -> None:
    """Compare a model's config.json with the shape that a config says it has.

    Args:
        published: `base_model.shape`; None says nothing.
        found: the config.json.
        origin: where it lies, for the message.

    Raises:
        ModelError: they differ; names every key with both values.
    """
    if published is None:
        return
    wanted, real = (
        {"vocab_size": int(config["vocab_size"]), **asdict(LlamaShape.from_config(config))}
        for config in (published, found)
    )
    # A published shape says nothing of biases.
    differing = [
        f"{key} is {real[key]}, not {wanted[key]}"
        for key in wanted
        if wanted[key] != real[key] and not key.endswith("_bias")
    ]
    if differing:
        raise ModelError(
            f"{origin} is not the model that `base_model.shape` describes: "
            f"{'; '.join(differing)}: correct `base_model.path` or `base_model.shape`"
        )


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
        settings: what the stage trains.
        rows_padding: rows of the matrices after the pieces. They are part of whole matrices that
            are trained, though their gradient is zero.
    """
    whole = vocab_new + rows_padding
    if settings.full:
        return {**count_parameters(shape, whole), "lora": 0}
    rows = {"none": 0, "new": vocab_new - vocab_old, "all": whole}[settings.rows]
    per_matrix = rows * shape.hidden_size
    embedding = settings.row_matrices in ("both", "embedding") or shape.tie_word_embeddings
    head = settings.row_matrices in ("both", "head") and not shape.tie_word_embeddings
    return {
        "embedding": per_matrix if embedding else 0,
        "head": per_matrix if head else 0,
        "blocks": 0,
        "norm": 0,
        "lora": shape.num_hidden_layers * _adapters_of_block(shape, settings.lora)
        + _adapter_size(settings.lora, "lm_head", shape.hidden_size, whole),
    }


def _adapter_size(lora: LoraSettings | None, name: str, inputs: int, outputs: int) -> int:
    """r * (inputs + outputs) of an adapted layer (Hu et al. 2021); DoRA adds one per output."""
    if lora is None or name not in lora.modules:
        return 0
    return lora.r * (inputs + outputs) + (outputs if lora.dora else 0)


def _adapters_of_block(shape: LlamaShape, lora: LoraSettings | None) -> int:
    return sum(_adapter_size(lora, name, *size) for name, size in shape.linear_sizes.items())


def flops_per_token(
    shape: LlamaShape,
    vocab: int,
    settings: TrainSettings,
    sequence_length: float,
    *,
    vocab_old: int = 0,
    target_share: float = 1.0,
) -> float:
    """Floating-point operations that one trained token needs, forward and backward.

    A matrix product of m x k by k x n is 2 m k n operations. Per token, with P the sizes of the
    blocks' matrices, Q the width of the queries, c the mean number of keys a token sees, V x H the
    head, t the share of tokens that are targets, R the trained rows of the head and A the
    adapters' parameters:

        forward            2 P + 4 L Q c + 2 A + 2 t V H
        gradient of input  2 P + 8 L Q c + 2 A + 2 t V H    (only above something that is trained)
        gradient of weight 2 A + 2 t R H, and 2 P where all is trained

    Frozen matrices need no gradient of weight, so adapters and new rows cost about 4 P instead of
    6 P. Work done twice to save memory (gradient checkpointing, the loss's chunks) is not counted:
    divided by time and peak speed this is model FLOPs utilisation (Chowdhery et al. 2022).
    Normalisations, softmax and the embedding's look-up are left out.

    Args:
        shape: of the model.
        vocab: rows of the head.
        settings: what the stage trains.
        sequence_length: mean length of what attention stays within: a document, or a block where
            documents are longer. Attention is causal, so c = (length + 1) / 2.
        vocab_old: rows of the head that `rows: new` leaves frozen.
        target_share: targets among the tokens.
    """
    layers = shape.num_hidden_layers
    trained = trainable_parameters(shape, vocab_old, vocab, settings)
    blocks = layers * sum(inputs * outputs for inputs, outputs in shape.linear_sizes.values())
    queries = shape.num_attention_heads * shape.head_dim
    attention = layers * queries * (sequence_length + 1) / 2
    head = target_share * vocab * shape.hidden_size
    adapters = trained["lora"]
    # Only a head whose rows alone are trained has nothing trained below it.
    below = settings.full or settings.lora is not None or trained["embedding"] > 0
    forward = 2 * (blocks + adapters + head) + 4 * attention
    of_inputs = 2 * (blocks + adapters + head) + 8 * attention if below else 0
    head_rows = trained["embedding" if shape.tie_word_embeddings else "head"]
    of_weights = 2 * (adapters + target_share * head_rows) + (2 * blocks if settings.full else 0)
    return forward + of_inputs + of_weights


def recomputed_flops_per_token(
    shape: LlamaShape, settings: TrainSettings, sequence_length: float
) -> float:
    """What gradient checkpointing adds: the forward pass of the blocks it runs again.

    Args: as of `flops_per_token`.
    """
    layers = shape.num_hidden_layers
    again = {"none": 0, "selective": layers // 2, "full": layers}[settings.gradient_checkpointing]
    matrices = sum(inputs * outputs for inputs, outputs in shape.linear_sizes.values())
    matrices += _adapters_of_block(shape, settings.lora)
    queries = shape.num_attention_heads * shape.head_dim
    return again * (2 * matrices + 2 * queries * (sequence_length + 1))
