"""The blocks' frozen matrices in 8 or 4 bits, through bitsandbytes.

Only the linear layers of the blocks: embedding, head and norms keep their type. Quantise after
earlier stages are folded in and before adapters go in. Knows nothing of adapters; a merge adds
them to the unquantised base. Memory: about 0.52 byte per weight in 4 bits (NF4, its scales
quantised too), 1 in 8 bits; while it works, one matrix more.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from altiplano.errors import TrainingError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Input features of larger magnitude are multiplied in 16 bits (LLM.int8, Dettmers et al. 2022).
_OUTLIER = 6.0


def quantize_blocks(
    model: "LlamaForCausalLM", bits: Literal["8bit", "4bit"], device: torch.device | None = None
) -> None:
    """Replace the blocks' linear layers by quantised ones, in place.

    Args:
        model: frozen, on the CPU, in the type that is computed in.
        bits: 4bit is NF4 with double quantisation (QLoRA, Dettmers et al. 2023).
        device: where the quantised matrices go, one by one, so that the device never holds the
            unquantised model; by default they stay.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f"`quantize: {bits}` needs bitsandbytes ({error}): install Altiplano with its extra "
            f"`gpu` or `cpu`, or set `quantize: none`"
        ) from error
    target = device or model.device
    convert = _in_4_bits if bits == "4bit" else _in_8_bits
    linear = [
        (parent, name, layer)
        for parent in model.model.layers.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    for parent, name, layer in linear:
        setattr(parent, name, convert(layer, target))
    # The marks that transformers sets and PEFT looks for.
    model.is_loaded_in_4bit = bits == "4bit"
    model.is_loaded_in_8bit = bits == "8bit"


def _in_4_bits(layer: nn.Linear, device: torch.device) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantised: nn.Linear = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        device="meta",
    )
    quantised.weight = Params4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=quantised,
    ).to(device)
    return _with_bias(quantised, layer, device)


def _in_8_bits(layer: nn.Linear, device: torch.device) -> nn.Linear:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    quantised: nn.Linear = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=_OUTLIER,
        device="meta",
    )
    weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    quantised.weight = weight.to(device)
    return _with_bias(quantised, layer, device)


def _with_bias(quantised: nn.Linear, layer: nn.Linear, device: torch.device) -> nn.Linear:
    if layer.bias is not None:
        quantised.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return quantised
