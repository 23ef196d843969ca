"""A Llama for guessing: few operations per token, keys and values in a cache that is not its own.

Written for small models, where the time goes into operations rather than arithmetic: q, k and v are
one product, gate and up another; the norms' weights are folded into the matrices behind them; a
norm is three operations; rotary positions are one complex product (the halves of q and k are
interleaved at load, which changes no dot product). It computes what transformers computes, to
float rounding. It does not know sequences, only where their keys and values lie (`Places`).
Loading reads the weights once; they then take the model's size, and a tied head is stored twice.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from altiplano.errors import ModelError
from altiplano.model.load import EMBEDDING, HEAD, read_config, weight_files
from altiplano.serving.speculation.head import Head

_ROTARY_KINDS = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on how long the text is."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int
    """Positions it was made for."""
    eps: float


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of a batch whose cache blocks lie next to each other, equally large."""

    rows: slice
    start: int
    """First token of the first block."""
    size: int
    """Tokens per block."""
    length: int
    """Tokens of a block that some row attends to."""
    mask: Tensor | None
    """[rows, 1, queries, length], added to the scores; None where everything is seen."""


@dataclass(frozen=True)
class Places:
    """Where a batch of B rows of C tokens stands and keeps its keys and values."""

    positions: Tensor
    """[B * C], of the tokens in their sequences."""
    written: Tensor
    """[B * C * kv_heads], rows of the arena that take the new keys (and values)."""
    runs: list[Run]
    """In the order of the rows; together all of them."""


@dataclass(frozen=True)
class _Layer:
    """One block's matrices, [in, out], the norms before them folded in."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class Llama:
    """The model's weights and its forward pass."""

    def __init__(self, model_dir: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read a Hugging Face directory.

        Args:
            dtype: type of weights and products; sums between blocks stay float32.

        Raises:
            ModelError: no Llama, or one with biases, another activation or rotary kind.
        """
        config = _llama_config(model_dir)
        self.shape = _shape(config)
        self._dtype = dtype
        stored = _read_tensors(model_dir)
        shape = self.shape
        # y = x / sqrt(mean(x^2) + eps) * w  is  x / sqrt(|x|^2 + n eps)  times  sqrt(n) w.
        self._norm_floor = torch.tensor(math.sqrt(shape.hidden * shape.eps), device=device)

        def joined(*names: str, norm: str | None = None, paired: tuple[int, ...] = ()) -> Tensor:
            parts = [stored[name].float() for name in names]
            for index in paired:
                parts[index] = _pair_halves(parts[index], shape.head_dim)
            weight = torch.cat(parts)
            if norm is not None:
                weight = weight * (stored[norm].float() * math.sqrt(shape.hidden))
            return weight

        def matrix(*names: str, norm: str | None = None, paired: tuple[int, ...] = ()) -> Tensor:
            weight = joined(*names, norm=norm, paired=paired).to(device=device, dtype=dtype)
            # CPUs multiply one row faster by float32 columns, by bfloat16 rows.
            return weight.t().contiguous() if dtype == torch.float32 else weight.t()

        self._layers = []
        for number in range(shape.layers):
            at = f"model.layers.{number}."
            attention, mlp = at + "self_attn.", at + "mlp."
            q, k, v = (f"{attention}{kind}_proj.weight" for kind in "qkv")
            gate, up = mlp + "gate_proj.weight", mlp + "up_proj.weight"
            after = at + "post_attention_layernorm.weight"
            self._layers.append(
                _Layer(
                    qkv=matrix(q, k, v, norm=at + "input_layernorm.weight", paired=(0, 1)),
                    out=matrix(attention + "o_proj.weight"),
                    gate_up=matrix(gate, up, norm=after),
                    down=matrix(mlp + "down_proj.weight"),
                )
            )
        self._embedding = stored[EMBEDDING].to(device=device, dtype=dtype)
        head = EMBEDDING if config.tie_word_embeddings or HEAD not in stored else HEAD
        self._head = Head(joined(head, norm="model.norm.weight"), device=device, dtype=dtype)
        self._turns = _turns(config, shape.max_len).to(device)

    @torch.inference_mode()
    def advance(self, ids: Tensor, places: Places, arena: Tensor) -> Tensor:
        """Read tokens, put their keys and values into the arena.

        Args:
            ids: [B, C], the next C tokens of B sequences.
            places: where they go.
            arena: [layers, 2, rows, head_dim]; a block of n tokens is kv_heads * n rows, by head.

        Returns:
            [B, hidden]: the state of each row's last token, for `choose` or `logits`.
        """
        shape = self.shape
        states = functional.embedding(ids.flatten(), self._embedding).float()
        turns = self._turns[places.positions].unsqueeze(1)
        rotated = (shape.heads + shape.kv_heads) * shape.head_dim
        for number, layer in enumerate(self._layers):
            qkv = torch.mm(self._norm(states), layer.qkv)
            self._rotate(qkv[:, :rotated], turns)
            queries, keys, values = qkv.split(
                [shape.heads * shape.head_dim] + [shape.kv_heads * shape.head_dim] * 2, dim=1
            )
            for kept, new in zip(arena[number], (keys, values), strict=True):
                kept.index_copy_(0, places.written, new.reshape(-1, shape.head_dim))
            seen = self._attend(queries, places.runs, arena[number], ids.shape[1])
            states.add_(torch.mm(seen, layer.out))
            gate, up = torch.mm(self._norm(states), layer.gate_up).chunk(2, dim=1)
            states.add_(torch.mm(functional.silu(gate).mul_(up), layer.down))
        return states.view(*ids.shape, -1)[:, -1]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Scores [B, vocab] of what comes after the states [B, hidden]."""
        return self._head.logits(self._norm(states))

    @torch.inference_mode()
    def choose(self, states: Tensor) -> Tensor:
        """Ids [B] of what most likely comes after the states [B, hidden]."""
        return self._head.best(self._norm(states))

    def _norm(self, states: Tensor) -> Tensor:
        """RMS norm without its weight and without the factor sqrt(hidden): both are folded in."""
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return (states / torch.hypot(length, self._norm_floor)).to(self._dtype)

    def _rotate(self, queries_keys: Tensor, turns: Tensor) -> None:
        """Rotary positions, in place.

        Args:
            queries_keys: [T, heads * head_dim], pairs next to each other.
            turns: [T, 1, head_dim / 2], complex.
        """
        pairs = queries_keys.unflatten(1, (-1, self.shape.head_dim // 2, 2))
        if self._dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(turns)
        else:
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turns))

    def _attend(self, queries: Tensor, runs: list[Run], kept: Tensor, count: int) -> Tensor:
        """Attention of [B * C, heads * head_dim] queries over each row's own block."""
        shape = self.shape
        rows, groups = queries.shape[0] // count, shape.heads // shape.kv_heads
        by_head = queries.view(rows, count, shape.kv_heads, groups, shape.head_dim)
        by_head = by_head.permute(0, 2, 3, 1, 4).flatten(2, 3)
        seen = []
        for run in runs:
            num = run.rows.stop - run.rows.start
            first, last = run.start * shape.kv_heads, (run.start + num * run.size) * shape.kv_heads
            blocks = kept[:, first:last].view(2, num, shape.kv_heads, run.size, shape.head_dim)
            keys, values = blocks[:, :, :, : run.length]
            # Heads that share keys are further queries, so that no key is copied per head.
            mask = run.mask
            if mask is not None and groups > 1:
                mask = mask.repeat(1, 1, groups, 1)
            seen.append(
                functional.scaled_dot_product_attention(
                    by_head[run.rows], keys, values, attn_mask=mask
                )
            )
        joined = seen[0] if len(seen) == 1 else torch.cat(seen)
        return joined.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4).reshape(rows * count, -1)


def _llama_config(model_dir: Path) -> LlamaConfig:
    raw = read_config(model_dir)
    if raw.get("model_type") != "llama":
        raise ModelError(
            f"{model_dir} holds a model of type {raw.get('model_type')!r}; a draft must be a Llama"
        )
    config = LlamaConfig.from_pretrained(model_dir)
    rotary = config.rope_parameters["rope_type"]
    for what, unknown in {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        "attention biases": config.attention_bias,
        "MLP biases": config.mlp_bias,
        f"rotary positions of kind {rotary!r}": rotary not in _ROTARY_KINDS,
    }.items():
        if unknown:
            raise ModelError(
                f"the draft in {model_dir} has {what}, which our own draft loop does not compute "
                f"(it knows SiLU, no biases, {', '.join(_ROTARY_KINDS)}): give another draft, or "
                f"set `draft.placement: none`"
            )
    return config


def _shape(config: LlamaConfig) -> Shape:
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_len=config.max_position_embeddings,
        eps=config.rms_norm_eps,
    )


def _read_tensors(model_dir: Path) -> dict[str, Tensor]:
    stored = {}
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as tensors:
            stored.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return stored


def _pair_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, hidden] with value i of each head next to value i + head_dim / 2."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _turns(config: LlamaConfig, max_len: int) -> Tensor:
    """Rotation of every pair at every position: complex [max_len, head_dim / 2]."""
    rotary = config.rope_parameters
    if rotary["rope_type"] == "default":
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        frequencies, scale = 1.0 / rotary["rope_theta"] ** exponents, 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[rotary["rope_type"]](config)
    angles = torch.outer(torch.arange(max_len).float(), frequencies)
    return torch.polar(torch.full_like(angles, scale), angles)
