"""Bytes that one worker of a training stage holds, by component, in closed form.

Weights, gradients and optimizer are exact up to alignment. Activations are those that the backward
pass keeps: what PyTorch's autograd saves of a Llama block, counted tensor by tensor. Temporary
tensors, the allocator's gaps and the libraries' own gigabyte or so are not in it.
"""

from dataclasses import dataclass

from altiplano.config.training import TrainSettings
from altiplano.model.counts import Counts, LlamaShape

FP32 = 4
LOSS_CHUNK_TOKENS = 512
"""`model.loss.CHUNK_TOKENS`: rows of logits that exist at a time."""
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + FP32 / (64 * 256)}
"""Of one value. NF4 keeps a byte per 64 values, and a float per 256 of those bytes (Dettmers et al.
2023); 8 bits keep a float per output, which is left out."""

Bytes = dict[str, int]


@dataclass(frozen=True)
class Sharing:
    """How a stage's workers hold it (keys of `cluster`)."""

    workers: int
    strategy: str
    offload: bool
    on_gpu: bool

    @property
    def parts(self) -> int:
        """Into how many shards the optimizer is cut."""
        return self.workers if self.strategy != "ddp" else 1


@dataclass(frozen=True)
class Load:
    """What a worker holds and computes in one forward pass."""

    shape: LlamaShape
    parameters: Counts
    """Without adapters."""
    trainable: Counts
    vocab: int
    """Rows of the head."""
    batch_tokens: int
    teacher_parameters: int


def compute_bytes(settings: TrainSettings, *, on_gpu: bool) -> int:
    """Bytes of a value in the forward pass; `auto` is bfloat16 on GPUs, else float32 at worst."""
    narrow = settings.precision == "bfloat16" or (settings.precision == "auto" and on_gpu)
    return 2 if narrow else FP32


def worker_memory(settings: TrainSettings, load: Load, sharing: Sharing) -> tuple[Bytes, Bytes]:
    """Bytes by component: on the device that computes, and of it offloaded to the CPU's memory."""
    narrow = compute_bytes(settings, on_gpu=sharing.on_gpu)
    trained = sum(load.trainable.values()) * FP32
    weights = _frozen_bytes(settings, load, narrow) + trained
    stage = int(sharing.strategy[-1]) if sharing.strategy != "ddp" else 0
    # DeepSpeed steps on a flat fp32 copy of its shard beside the two moments.
    moments = (3 if stage else 2) * trained
    # DDP's buckets hold the sums beside the gradients they came from.
    copies = 2 if stage == 0 and sharing.workers > 1 else 1
    shared = {
        "weights": _share(weights, stage >= 3, sharing.workers),
        "gradients": _share(copies * trained, stage >= 2, sharing.workers),
        "optimizer": _share(moments, stage >= 1, sharing.workers),
    }
    # ZeRO 3 gathers a block, or a whole embedding, while it is computed.
    gathered = _largest_part(load, narrow) if stage >= 3 else 0
    device: Bytes = {
        **shared,
        "narrow copies": _narrow_copies(load, narrow),
        "gathered": gathered,
        "activations": activation_bytes(load.shape, settings, load.batch_tokens, narrow),
        "logits": _logits_bytes(load, narrow),
        "teacher": load.teacher_parameters * narrow,
    }
    host: Bytes = {}
    if sharing.offload and sharing.on_gpu:
        moved = ["optimizer", *(["gradients"] if stage >= 2 else [])]
        moved += ["weights"] if stage >= 3 else []
        host = {name: device[name] for name in moved}
        device |= dict.fromkeys(moved, 0)
    return device, host


def _narrow_copies(load: Load, narrow: int) -> int:
    """Autocast keeps a copy of trained weights through the backward pass; rows of the embedding
    are looked up, not multiplied."""
    multiplied = sum(load.trainable.values()) - load.trainable["embedding"]
    return multiplied * narrow if narrow < FP32 else 0


def _logits_bytes(load: Load, narrow: int) -> int:
    """One chunk's logits and probabilities, and the gradient of the head's trained rows, which the
    loss makes in the forward pass beside the one that is accumulated."""
    chunk = min(load.batch_tokens, LOSS_CHUNK_TOKENS) * load.vocab
    return chunk * (narrow + FP32) + load.trainable["head"] * FP32


def _share(total: int, shared: bool, workers: int) -> int:
    return -(-total // workers) if shared else total


def _frozen_bytes(settings: TrainSettings, load: Load, narrow: int) -> int:
    """Weights that are not trained; only the blocks' matrices are quantised."""
    frozen = sum(load.parameters.values()) - (sum(load.trainable.values()) - load.trainable["lora"])
    if settings.quantize == "none":
        return frozen * narrow
    matrices = load.shape.num_hidden_layers * sum(
        inputs * outputs for inputs, outputs in load.shape.linear_sizes.values()
    )
    return round(matrices * _QUANTIZED_BYTES[settings.quantize]) + (frozen - matrices) * narrow


def _largest_part(load: Load, narrow: int) -> int:
    block = load.parameters["blocks"] // max(1, load.shape.num_hidden_layers)
    matrices = [load.parameters[name] for name in ("embedding", "head")]
    trained = [load.trainable[name] for name in ("embedding", "head")]
    wide = [
        (whole - part) * narrow + part * FP32 for whole, part in zip(matrices, trained, strict=True)
    ]
    return max(block * (FP32 if load.trainable["blocks"] else narrow), *wide)


def activation_bytes(
    shape: LlamaShape, settings: TrainSettings, batch_tokens: int, narrow: int
) -> int:
    """What the backward pass of the blocks needs of a micro-batch.

    A recomputed block keeps its fp32 input. It is computed again where later blocks' tensors lay,
    so only a recomputed last block adds to the peak.
    """
    layers = shape.num_hidden_layers
    block = _block_bytes(shape, settings, narrow)
    recomputed = {"none": range(0), "selective": range(1, layers, 2), "full": range(layers)}[
        settings.gradient_checkpointing
    ]
    whole = layers - len(recomputed) + (layers - 1 in recomputed)
    return batch_tokens * (whole * block + len(recomputed) * shape.hidden_size * FP32)


def _block_bytes(shape: LlamaShape, settings: TrainSettings, narrow: int) -> int:
    """Bytes per token that autograd saves in one block.

    Always: both norms' fp32 inputs, queries, keys, values and result of attention, and three of
    the MLP's tensors. Beside them the inputs of the products whose weights are trained, and the
    norms' results where norms are.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = (
        heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    kept = 2 * hidden * FP32 + (2 * queries + 2 * keys + 3 * inner) * narrow
    if settings.full:
        # Autocast casts the fp32 stream anew for each product.
        streams = 2 * hidden if narrow == FP32 else 5 * hidden
        return kept + 2 * hidden * FP32 + (streams + inner) * narrow
    if settings.lora is None:
        return kept
    adapted = [name for name in shape.linear_sizes if name in settings.lora.modules]
    if settings.lora.dropout:
        copies = 2  # the mask, and the input under it
    elif narrow < FP32:
        copies = 1
    else:
        # Without casts or masks, adapters share their layer's input; o_proj's is attention's.
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        adapted = list({shared.get(name, name) for name in adapted} - {"o_proj"})
        copies = 1
    widths = sum(shape.linear_sizes[name][0] for name in adapted)
    return kept + copies * widths * narrow
