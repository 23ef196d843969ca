"""LoRA and its variants, through PEFT: put into a model, and to and from PEFT's file format.

rsLoRA, DoRA and dropout are PEFT's own. PiSSA's start is computed here, in fp32, and kept, because
the saved adapter is relative to the *original* base: sBA + W_residual = W + s(BA - B0 A0), an
ordinary adapter of rank 2r, so folding, merging and other tools need no special case.
Knows nothing of rows, optimizers or where files lie. Costs one SVD sketch per layer with PiSSA.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from altiplano.config.training import LoraSettings
from altiplano.errors import TrainingError
from altiplano.model.fold import ADAPTER_WEIGHTS
from altiplano.model.rows import PaddedHead

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaForCausalLM

# PEFT imports bitsandbytes where it is installed, which then misses an optional package aloud.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ADAPTER = "default"
KEY_PREFIX = "base_model.model."
_MARK = ".lora_"
_MAGNITUDE = "lora_magnitude_vector"
# Columns of the sketch beyond r, and its power iterations: the usual choice (Halko et al. 2011).
_OVERSAMPLING, _ITERATIONS = 8, 4


class PrincipalPart(NamedTuple):
    """What PiSSA took out of a frozen matrix: scale * b @ a, fp32, on the CPU."""

    a: torch.Tensor
    """[r, in]"""
    b: torch.Tensor
    """[out, r]"""


def lora_problems(model: "LlamaForCausalLM", lora: LoraSettings) -> list[str]:
    """What in these settings this model cannot do; one phrase each."""
    linear = {
        name.rsplit(".", 1)[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    problems = []
    if unknown := [name for name in lora.modules if name not in linear]:
        problems.append(
            f"`lora.modules` names {unknown}, the model's linear layers are {sorted(linear)}"
        )
    if "lm_head" in lora.modules and isinstance(model.lm_head, PaddedHead):
        problems.append(
            "`lora.modules` names lm_head, whose padding rows an adapter would train: set "
            "`extend.pad_to_multiple: 1`, or train its rows with `rows: new`"
        )
    if "lm_head" in lora.modules and model.config.tie_word_embeddings:
        problems.append(
            "`lora.modules` names lm_head, which is the embedding in this model and would be "
            "trained apart from it: drop it, or train its rows with `rows`"
        )
    smallest = min((min(linear[n].weight.shape) for n in lora.modules if n in linear), default=0)
    if lora.init == "pissa" and 0 < smallest < lora.r:
        problems.append(
            f"`lora.init: pissa` needs {lora.r} singular vectors (`lora.r`), the smallest of "
            f"`lora.modules` has {smallest}: lower `lora.r`"
        )
    return problems


def inject_lora(
    model: "LlamaForCausalLM", lora: LoraSettings, seed: int
) -> dict[str, PrincipalPart]:
    """Put trainable fp32 adapters onto a frozen model's linear layers.

    Where base and adapters differ in type, the forward pass has to run under autocast: A and B are
    then rounded to the base's type, while activations stay in it.

    Args:
        model: frozen; its blocks may be quantised (`quantize_blocks`).
        seed: of the A matrices. PiSSA has no randomness: every worker and every run on the same
            base begins alike, up to the rounding of the SVD.

    Returns:
        With `init: pissa` what each layer's frozen matrix lost, by layer name; else nothing.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(lora), model, adapter_name=ADAPTER)
    principal = {}
    for name, layer in _layers(model):
        for parameter_name, parameter in layer.named_parameters():
            if _MARK in f".{parameter_name}":
                # PEFT makes them in the base's type; the optimizer needs fp32.
                parameter.data = parameter.data.float()
        # Under autocast PEFT would cast every input to fp32, only for autocast to cast it back.
        # DoRA keeps the cast, because it takes the norm of the whole matrix in the input's type.
        layer.cast_input_dtype_enabled = lora.dora
        if lora.dora:
            _begin_with_exact_magnitude(layer)
        if lora.init == "pissa":
            principal[name] = _take_principal_part(layer)
    return principal


def inject_stored(model: "LlamaForCausalLM", directory: Path, adapter: str) -> None:
    """Put an adapter onto a model as PEFT itself reads it; names it `adapter`."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(directory))
    config.inference_mode = True
    with warnings.catch_warnings():
        # PEFT warns that there are several adapters: that is what a chain is.
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(config, model, adapter_name=adapter)
    stored = load_file(directory / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(model, stored, adapter_name=adapter)


def adapter_key(name: str) -> str:
    """PEFT's file key of an adapter parameter's name."""
    key = KEY_PREFIX + name.replace(f".{ADAPTER}.", ".")
    return key.removesuffix(".weight") if f".{_MAGNITUDE}." in name else key


def is_adapter(name: str) -> bool:
    """Whether a parameter name is that of an adapter's tensor."""
    return _MARK in name


def stored_form(
    name: str, tensor: torch.Tensor, principal: Mapping[str, PrincipalPart]
) -> torch.Tensor:
    """What the file holds for a trained tensor: itself, or with PiSSA [A; A0] and [B, -B0]."""
    layer, _, part = name.partition(_MARK)
    if layer not in principal:
        return tensor
    if part.startswith("A."):
        return torch.cat([tensor, principal[layer].a.to(tensor.device)])
    return torch.cat([tensor, -principal[layer].b.to(tensor.device)], dim=1)


def trained_form(
    name: str, stored: torch.Tensor, principal: Mapping[str, PrincipalPart]
) -> torch.Tensor:
    """The inverse of `stored_form`; other shapes than it makes come back as they are."""
    layer, _, part = name.partition(_MARK)
    if layer not in principal:
        return stored
    rank = principal[layer].a.shape[0]
    return stored[:rank] if part.startswith("A.") else stored[:, :rank]


def require_same_start(
    stored: Mapping[str, torch.Tensor], principal: Mapping[str, PrincipalPart], source: Path
) -> None:
    """Refuse a PiSSA adapter that was taken out of other matrices than this model's.

    Args:
        stored: the file's tensors by key, of the shapes that `stored_form` makes.

    Raises:
        TrainingError: names the file and the first layer that differs.
    """
    for layer, part in principal.items():
        a = stored[adapter_key(f"{layer}{_MARK}A.{ADAPTER}.weight")][len(part.a) :].float()
        b = -stored[adapter_key(f"{layer}{_MARK}B.{ADAPTER}.weight")][:, len(part.a) :].float()
        own = part.b @ part.a
        # Only the product is unique: singular vectors may change sign with the CPU.
        if (b @ a - own).norm() > 0.01 * own.norm():
            raise TrainingError(
                f"{source}: {layer} began with other principal vectors than this model has: it was "
                f"trained with `lora.init: pissa` on another base, or with another init"
            )


def write_adapter_config(file: Path, lora: LoraSettings) -> None:
    """PEFT's adapter_config.json for the saved form, so that other tools read the adapter."""
    config = _peft_config(lora).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    if lora.init == "pissa":
        config["r"] = 2 * lora.r
        config["lora_alpha"] = lora.alpha * (math.sqrt(2) if lora.rank_stabilized else 2)
    file.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def _peft_config(lora: LoraSettings):  # type: ignore[no-untyped-def]  # peft is imported late
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.modules),
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def _layers(model: "LlamaForCausalLM") -> Iterator[tuple[str, "LoraLayer"]]:
    from peft.tuners.lora import LoraLayer

    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )


@torch.no_grad()
def _begin_with_exact_magnitude(layer: "LoraLayer") -> None:
    """PEFT takes DoRA's first norms in the base's type; rounded, they would scale every output."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).float()
    layer.lora_magnitude_vector[ADAPTER].weight.copy_(weight.norm(dim=1))


@torch.no_grad()
def _take_principal_part(layer: "LoraLayer") -> PrincipalPart:
    """PiSSA (Meng et al. 2024): A and B become the largest singular vectors, the base the rest."""
    weight = layer.get_base_layer().weight
    rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
    full = weight.float()
    with torch.random.fork_rng(devices=[]):
        # A sketch of its own seed: the start depends on the base alone.
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(
            full, q=min(rank + _OVERSAMPLING, *full.shape), niter=_ITERATIONS
        )
    root = (values[:rank] / scale).sqrt()
    a, b = root[:, None] * right[:, :rank].T, left[:, :rank] * root
    layer.lora_A[ADAPTER].weight.copy_(a)
    layer.lora_B[ADAPTER].weight.copy_(b)
    weight.copy_(full - scale * b @ a)
    return PrincipalPart(a.contiguous().cpu(), b.contiguous().cpu())
