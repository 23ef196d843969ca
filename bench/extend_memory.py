"""Memory that extending a sharded checkpoint takes, beside loading it whole with transformers.

Makes a bfloat16 Llama of random weights in shards of about 100 MB, extends it in a fresh process
per way, and reports how far that process's resident memory rose above what its imports took.
Needs Linux (/proc), two gigabytes of disk and a minute.

    python bench/extend_memory.py --output extend_memory.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import make_parser, write_record

HIDDEN, INTERMEDIATE, VOCAB_OLD = 1024, 2816, 32000
SHARD_BYTES = 100_000_000
WAYS = ("subpiece_mean", "gaussian", "mean", "random", "transformers")


def write_checkpoint(directory: Path, layers: int) -> None:
    """A random Llama in shards, embedding first and head last."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_OLD, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers, num_attention_heads=16, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        tensor = (torch.randn(shape) * 0.02).bfloat16()
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def resident_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(source: Path, target: Path, way: str, added: int) -> dict[str, float]:
    """Extend in this process: its rise in MiB, and seconds."""
    import torch
    from transformers import LlamaForCausalLM

    from altiplano.model import new_rows
    from altiplano.model.extend import extend_checkpoint

    assert new_rows  # its import belongs to the baseline
    torch.randn(8, 8) @ torch.randn(8, 8)
    # Mostly bytes, as Chinese pieces are in an English vocabulary.
    subpieces = [[3 + (i * k) % 256 for k in range(1, 4)] + [i % VOCAB_OLD] for i in range(added)]
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    started = time.perf_counter()
    if way == "transformers":
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
        model.resize_token_embeddings(VOCAB_OLD + added, mean_resizing=False)
        model.save_pretrained(target, max_shard_size=SHARD_BYTES)
    else:
        extend_checkpoint(
            source, target, subpieces, vocab_old=VOCAB_OLD, init=way, special_ids={}, seed=0
        )
    seconds = time.perf_counter() - started
    peak = resident_mib("VmHWM") - before
    return {"peak_mib": round(peak, 1), "seconds": round(seconds, 2)}


def main() -> None:
    """Make the checkpoint, measure every way, write the record."""
    parser = make_parser("peak memory of extending a sharded checkpoint")
    parser.add_argument("--layers", type=int, default=26, help="blocks; 26 make eight shards")
    parser.add_argument("--added", type=int, default=20_000, help="new pieces")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "base"
        source.mkdir()
        write_checkpoint(source, given.layers)
        shards = [file.stat().st_size for file in source.glob("*.safetensors")]
        matrices = 2 * 2 * (VOCAB_OLD + given.added) * HIDDEN
        sizes = {"largest_shard": max(shards), "matrices": matrices, "model": sum(shards)}
        numbers = {f"{name}_mib": round(size / 2**20, 1) for name, size in sizes.items()}
        numbers |= {"shards": len(shards), "rows_added": given.added}
        print("  ".join(f"{name} {value:,}" for name, value in numbers.items()))
        ways = {}
        for way in WAYS:
            target = Path(folder) / way
            target.mkdir()
            child = [sys.executable, __file__, "--child", source, target, way, str(given.added)]
            said = subprocess.check_output([str(part) for part in child])
            ways[way] = json.loads(said.splitlines()[-1])
            print(f"{way:>14}: {ways[way]['peak_mib']:8,.1f} MiB  {ways[way]['seconds']:6.2f} s")
    packages = ("torch", "safetensors", "transformers")
    write_record(given.output, {**numbers, "ways": ways}, packages=packages)


def main_child() -> None:
    """One measurement in a process of its own; prints JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=4)
    source, target, way, added = parser.parse_args().child
    print(json.dumps(measure(Path(source), Path(target), way, int(added))))


if __name__ == "__main__":
    main_child() if "--child" in sys.argv else main()
