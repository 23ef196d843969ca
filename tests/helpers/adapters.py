"""LoRA adapters in PEFT's format for the tiny served model, with random weights."""

import json
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, RANK = 3, 64, 4


def write_adapter(
    directory: Path, seed: int = 0, width: int = HIDDEN, rank: int = RANK, **config: Any
) -> Path:
    """Write an adapter of the query projections; return `directory`.

    Args:
        width: input size of its matrices; another than the model's fits nothing.
        config: further keys of `adapter_config.json`.
    """
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=draw)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
