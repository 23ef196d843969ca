"""Read a llama2.c checkpoint (format v0) into a transformers `LlamaForCausalLM`.

The only real pre-trained Llama weights small enough for a test come in this format. The file holds
seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative
vocabulary size means a head of its own), then fp32 matrices, each kind for all layers in turn.

Two differences are bridged: llama2.c rotates neighbouring values (2i, 2i+1) of a head where
transformers rotates the halves (i, i + head_dim/2), and vLLM's CPU attention wants a head size of
32 or more where these models have 8 (`widen_heads`). It knows nothing of training or serving.
Costs milliseconds and a megabyte for the models at hand.

    python -m tests.helpers.llama2c --model FILE.bin --tokenizer FILE.model --output DIR
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from altiplano.vocabulary.convert import save_tokenizer

HEADER_INTS = 7


@dataclass
class Cursor:
    """A position in the checkpoint's run of fp32 values."""

    values: np.ndarray
    position: int = 0

    def take(self, *shape: int) -> torch.Tensor:
        """Return the next tensor of this shape, copied."""
        end = self.position + math.prod(shape)
        tensor = torch.from_numpy(self.values[self.position : end].reshape(shape).copy())
        self.position = end
        return tensor


def halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder q or k rows `[num_heads * head_dim, hidden]` from rotated pairs to rotated halves."""
    rows, hidden = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def read_model(path: Path) -> LlamaForCausalLM:
    """Return the checkpoint at `path` as an fp32 model; `AssertionError` if its size is wrong."""
    raw = path.read_bytes()
    header = np.frombuffer(raw, dtype="<i4", count=HEADER_INTS)
    hidden, intermediate, layers, heads, kv_heads, signed_vocab, seq_len = (int(n) for n in header)
    head_dim, vocab = hidden // heads, abs(signed_vocab)
    kv_rows = kv_heads * head_dim
    cursor = Cursor(np.frombuffer(raw, dtype="<f4", offset=HEADER_INTS * 4))
    state = {"model.embed_tokens.weight": cursor.take(vocab, hidden)}
    for name, shape in (
        ("input_layernorm", (hidden,)),
        ("self_attn.q_proj", (hidden, hidden)),
        ("self_attn.k_proj", (kv_rows, hidden)),
        ("self_attn.v_proj", (kv_rows, hidden)),
        ("self_attn.o_proj", (hidden, hidden)),
        ("post_attention_layernorm", (hidden,)),
        ("mlp.gate_proj", (intermediate, hidden)),
        ("mlp.down_proj", (hidden, intermediate)),
        ("mlp.up_proj", (intermediate, hidden)),
    ):
        for layer in range(layers):
            state[f"model.layers.{layer}.{name}.weight"] = cursor.take(*shape)
    state["model.norm.weight"] = cursor.take(hidden)
    cursor.take(2, seq_len, head_dim // 2)  # cosines and sines: the configuration implies them
    tied = signed_vocab > 0
    head = state["model.embed_tokens.weight"] if tied else cursor.take(vocab, hidden)
    state["lm_head.weight"] = head
    assert cursor.position == len(cursor.values), f"{path} is not a llama2.c v0 file"

    for layer in range(layers):
        for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            state[key] = halves_from_pairs(state[key], count)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=seq_len,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.load_state_dict(state)
    return model.eval()


def widen_heads(model: LlamaForCausalLM, head_dim: int = 32) -> LlamaForCausalLM:
    """Return a model of head size `head_dim` that computes the same function.

    Rotated pair i of the old head becomes pair i * head_dim / old, whose frequency
    theta^(-2i/old) is the same; all other rows of q, k, v and columns of o are zero. q grows by
    sqrt(head_dim / old) because attention divides by sqrt(head_dim).
    """
    config = model.config
    old = config.head_dim
    assert head_dim % old == 0, f"head size {head_dim} is no multiple of {old}"
    pair = torch.arange(old // 2) * (head_dim // old)
    place = torch.cat([pair, pair + head_dim // 2])

    def spread(weight: torch.Tensor) -> torch.Tensor:
        """Put rows `[heads * old, n]` at their places in `[heads * head_dim, n]` zeros."""
        rows = weight.view(-1, old, weight.shape[1])
        wide = weight.new_zeros(rows.shape[0], head_dim, weight.shape[1])
        wide[:, place] = rows
        return wide.flatten(0, 1)

    state = model.state_dict()
    for key, weight in state.items():
        if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            state[key] = spread(weight)
        elif key.endswith("o_proj.weight"):
            state[key] = spread(weight.T).T.contiguous()
        if key.endswith("q_proj.weight"):
            state[key] = state[key] * math.sqrt(head_dim / old)
    wide_config = LlamaConfig.from_dict(config.to_dict() | {"head_dim": head_dim})
    wide = LlamaForCausalLM(wide_config)
    wide.load_state_dict(state)
    return wide.eval()


def write_base(model_file: Path, tokenizer_file: Path, output: Path, head_dim: int = 32) -> Path:
    """Write the checkpoint as a Hugging Face model directory that vLLM can serve; return it."""
    output.mkdir(parents=True, exist_ok=True)
    widen_heads(read_model(model_file), head_dim).save_pretrained(output)
    save_tokenizer(tokenizer_file.read_bytes(), output)
    return output


def main() -> None:
    """Read the command line and write one model directory."""
    parser = argparse.ArgumentParser(description="llama2.c v0 checkpoint to a Hugging Face model")
    parser.add_argument("--model", type=Path, required=True, help="stories260K.bin and the like")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its SentencePiece .model")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--head-dim", type=int, default=32, help="head size to widen to")
    arguments = parser.parse_args()
    print(write_base(arguments.model, arguments.tokenizer, arguments.output, arguments.head_dim))


if __name__ == "__main__":
    main()
