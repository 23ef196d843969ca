"""Fold a chain of adapters into its base checkpoint, one weight file at a time.

Every changed tensor is summed in fp32 and rounded once; every other tensor passes through as it
is. Files, tensor names and index stay the base's; rows that only pad its matrices are left out.
Knows nothing of manifests or of whether the parts belong together (`merge.check` does). Memory:
the largest weight file, in the output type, and one matrix in fp32.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.errors import ModelError
from altiplano.model.load import (
    EMBEDDING,
    HEAD,
    PIECES,
    copy_tokenizer,
    iter_tensors,
    num_pieces,
    read_config,
    weight_files,
)

if TYPE_CHECKING:
    import torch

    from altiplano.model.fold import AdapterStack

_INDEX = "model.safetensors.index.json"


def merge_checkpoint(
    model_dir: Path, adapter_dirs: Sequence[Path], vocab_old: int, output: Path, dtype: str = "auto"
) -> dict[str, int]:
    """Write `model_dir` with its adapters folded in to `output`.

    Args:
        model_dir: Hugging Face directory the first adapter was trained on.
        adapter_dirs: adapters in the order in which they were trained.
        vocab_old: rows below it belong to the base vocabulary.
        output: existing directory to fill: weights, configs and tokenizer files.
        dtype: torch name of the type of the merged weights; `auto` keeps every tensor's own.

    Returns:
        `tensors`, `tensors_merged`, `parameters` and `bytes` (of the tensors written).

    Raises:
        ModelError: an adapter tensor fits nothing, has another shape, or a sum leaves the range of
            `dtype`; names it.
    """
    from altiplano.model.fold import AdapterStack

    config = read_config(model_dir)
    # A tied head is the embedding: a copy of it in the file would go stale here.
    skipped = {HEAD} if config.get("tie_word_embeddings") else set()
    stack = AdapterStack(adapter_dirs, vocab_old)
    names = {name for name, _ in iter_tensors(model_dir)} - skipped
    if unused := stack.unused(names):
        raise ModelError(
            f"{len(unused)} adapter tensors fit nothing in {model_dir}: {', '.join(unused[:5])}; "
            f"they were trained on another architecture: give the model they belong to"
        )
    metrics = {"tensors": 0, "tensors_merged": 0, "parameters": 0, "bytes": 0}
    for file in weight_files(model_dir):
        _merge_file(file, output / file.name, stack, num_pieces(config), skipped, dtype, metrics)
    _write_index(model_dir, output, skipped, metrics)
    _write_configs(model_dir, output, config, dtype)
    copy_tokenizer(model_dir, output)
    return metrics


def _merge_file(
    source: Path,
    target: Path,
    stack: "AdapterStack",
    pieces: int,
    skipped: set[str],
    dtype: str,
    metrics: dict[str, int],
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    merged = {}
    with safe_open(source, framework="pt") as stored:
        for name in sorted(set(stored.keys()) - skipped):
            tensor = stored.get_tensor(name)
            if name in (EMBEDDING, HEAD):
                tensor = tensor[:pieces]
            wanted = _wanted_type(tensor, dtype)
            if stack.touches(name):
                metrics["tensors_merged"] += 1
                tensor = stack.fold(name, tensor)
            merged[name] = _rounded(name, tensor, wanted)
            metrics["tensors"] += 1
            metrics["parameters"] += merged[name].numel()
            metrics["bytes"] += merged[name].nbytes
    if merged:
        save_file(merged, target, metadata={"format": "pt"})


def _wanted_type(tensor: "torch.Tensor", dtype: str) -> "torch.dtype":
    import torch

    types = {"auto": tensor.dtype} | {
        str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)
    }
    return types[dtype] if tensor.is_floating_point() else tensor.dtype


def _rounded(name: str, tensor: "torch.Tensor", wanted: "torch.dtype") -> "torch.Tensor":
    rounded = tensor.to(wanted).contiguous()
    if not rounded.isfinite().all():
        raise ModelError(
            f"{name} holds values that are not finite in {wanted} (largest before rounding: "
            f"{tensor.float().abs().max().item():.3g}); set merge.dtype=bfloat16, or check the "
            f"training that made the adapter"
        )
    return rounded


def _write_index(model_dir: Path, output: Path, skipped: set[str], metrics: dict[str, int]) -> None:
    file = model_dir / _INDEX
    if not file.is_file():
        return
    index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    placed = {name: shard for name, shard in index["weight_map"].items() if name not in skipped}
    sizes = {"total_size": metrics["bytes"], "total_parameters": metrics["parameters"]}
    index = {"metadata": sizes, "weight_map": placed}
    (output / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(model_dir: Path, output: Path, config: dict[str, Any], dtype: str) -> None:
    config = {**config, "vocab_size": num_pieces(config)}
    config.pop(PIECES, None)
    if dtype != "auto":
        # Readers of before transformers 5 look for the second name.
        config = {**config, "dtype": dtype, "torch_dtype": dtype}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
    generation = model_dir / "generation_config.json"
    if generation.is_file():
        shutil.copy2(generation, output / generation.name)
