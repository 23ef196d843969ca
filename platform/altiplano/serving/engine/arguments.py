"""From a model's settings to vLLM's engine arguments, and what cannot be had before it is tried.

The only file that knows the names of vLLM's options. Knows nothing of jobs. Importing it is cheap.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.serving import ModelSettings
from altiplano.errors import ServeError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

QUIET = {
    # vLLM reports nothing home, asks no hub, and says only what somebody must act on.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Its frontend tokenises nothing here; forks after tokenizers' threads started only warn.
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a process that imports vLLM, and of the engine's own processes."""

_MAX_LOGPROBS = 64
# Ray's own executor would want a placement group; the GPUs are the replica's already.
_GPU_EXECUTOR = "mp"
# Scheduler and model in one process. With vLLM's choice for CPUs, a process of its own for the
# model, the scheduler spins on a second core while it waits.
_CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_PROPOSER = "altiplano.serving.speculation.proposer.Proposer"
_CPU_WORKER = "altiplano.serving.engine.worker.ExactCpuWorker"
_QUANTIZATION = {"8bit": "fp8_per_channel", "4bit": "mxfp4"}
"""vLLM 0.29 has no bitsandbytes any more; these quantise 16-bit weights while loading too."""


def environment(entry: ModelSettings) -> dict[str, str]:
    """Variables that the engine's process reads when it starts.

    Args:
        entry: on CPUs `cpus_per_replica` is the number of its threads.
    """
    if entry.gpus_per_replica > 0:
        return {}
    threads = {"OMP_NUM_THREADS": str(max(1, int(entry.cpus_per_replica)))}
    # Nothing is compiled then, but for helpers that would want a compiler at the first request
    # for logprobs.
    return {**threads, "TORCH_COMPILE_DISABLE": "1"} if entry.enforce_eager else threads


def engine_arguments(
    entry: ModelSettings,
    model_dir: Path,
    draft_dir: Path | None = None,
    channel: str | None = None,
) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`.

    Args:
        entry: the model's settings.
        model_dir: Hugging Face model directory with its tokenizer.
        draft_dir: a smaller model with the same tokenizer; None decodes plainly.
        channel: address at which the proposer reaches `speculation/bridge.py`.

    Raises:
        ServeError: settings that exclude each other.
    """
    on_gpu = entry.gpus_per_replica > 0
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "served_model_name": [entry.name],
        "dtype": entry.dtype,
        "enforce_eager": entry.enforce_eager,
        "max_num_seqs": entry.max_ongoing_requests,
        "tensor_parallel_size": max(1, entry.gpus_per_replica),
        "distributed_executor_backend": _GPU_EXECUTOR if on_gpu else _CPU_EXECUTOR,
        # What a request may ask for, and what a beam of the widest kind needs beside.
        "max_logprobs": _MAX_LOGPROBS,
        "enable_prefix_caching": entry.task == "generate",
        "trust_remote_code": False,
        "disable_log_stats": False,
        # One backend for all: "auto" takes that of the first guided request for every later one.
        # No blanks between a JSON answer's parts: a small model may write them for ever.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if entry.max_model_len is not None:
        arguments["max_model_len"] = entry.max_model_len
    if not on_gpu:
        # VLLM_CPU_KVCACHE_SPACE, the usual way, takes whole GiB only.
        arguments["kv_cache_memory_bytes"] = int(entry.kv_cache_gib * 2**30)
        arguments["worker_cls"] = _CPU_WORKER
    if entry.quantization != "none":
        arguments["quantization"] = _QUANTIZATION[entry.quantization]
    if entry.task == "embed":
        arguments |= {"runner": "pooling", "convert": "embed"}
    if entry.max_adapters:
        arguments |= _adapter_arguments(entry, draft_dir)
    if draft_dir is not None and speculates(entry, draft_dir):
        arguments |= _draft_arguments(entry, model_dir, draft_dir, channel)
    return arguments


def speculates(entry: ModelSettings, draft_dir: Path | None) -> bool:
    """Whether a draft is used at all."""
    return draft_dir is not None and entry.draft.placement != "none" and entry.task == "generate"


def drafts_itself(entry: ModelSettings, draft_dir: Path | None) -> bool:
    """Whether our own proposer drafts, here or in a replica, and not vLLM's `draft_model`."""
    if not speculates(entry, draft_dir):
        return False
    method = entry.draft.method
    if method == "auto":
        method = "draft_model" if entry.gpus_per_replica else "drafter"
    return entry.draft.placement == "replica" or method == "drafter"


def _adapter_arguments(entry: ModelSettings, draft_dir: Path | None) -> dict[str, Any]:
    if speculates(entry, draft_dir):
        raise ServeError(
            f"model {entry.name}: serve.max_adapters is {entry.max_adapters}, and the draft "
            f"{draft_dir} speculates; it knows nothing of adapters and would guess badly for them: "
            f"set serve.draft.placement=none or serve.max_adapters=0"
        )
    return {
        "enable_lora": True,
        "max_loras": entry.max_adapters,
        # As many as may be registered: one that had to be read again could fail within a step,
        # which ends the engine.
        "max_cpu_loras": entry.max_adapters,
        "max_lora_rank": _next_rank(entry.max_adapter_rank),
    }


def _next_rank(rank: int) -> int:
    """The smallest rank vLLM sets memory aside for that holds this one."""
    for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        if allowed >= rank:
            return allowed
    raise ServeError(
        f"serve.max_adapter_rank is {rank}, vLLM takes 512 at most: merge such an adapter "
        f"(`altiplano merge CONFIG`)"
    )


def _draft_arguments(
    entry: ModelSettings, model_dir: Path, draft_dir: Path, channel: str | None
) -> dict[str, Any]:
    draft = entry.draft
    # So that an answer's usage can say what the draft was worth to it.
    told = {"per_request_spec_decode_metrics": "summary"}
    if not drafts_itself(entry, draft_dir):
        return {
            **told,
            "speculative_config": {
                "method": "draft_model",
                "model": str(draft_dir),
                "num_speculative_tokens": draft.tokens,
                "draft_tensor_parallel_size": max(1, entry.gpus_per_replica),
            },
        }
    from altiplano.serving.speculation.protocol import vocab_digest

    return {
        **told,
        "speculative_config": {
            "method": "custom_class",
            "model": _PROPOSER,
            "num_speculative_tokens": draft.tokens,
        },
        # Read by the proposer, in the engine's process.
        "additional_config": {
            "altiplano_draft": {
                "placement": draft.placement,
                "model": str(draft_dir),
                "settings": draft.model_dump(),
                "channel": channel,
                "vocab_digest": vocab_digest(model_dir),
            }
        },
    }


def require_cache(entry: ModelSettings, config: "VllmConfig") -> None:
    """Refuse a KV cache that cannot hold one request of full length, before weights are loaded.

    On CPUs only: on a GPU what is left for the cache is known once the weights are there, and vLLM
    says so (`explain_shortage`).

    Raises:
        ServeError: what is needed, what there is and the keys that change either.
    """
    available = config.cache_config.kv_cache_memory_bytes
    if available is None or entry.gpus_per_replica:
        return
    model, block = config.model_config, config.cache_config.block_size
    per_token = (
        2
        * model.get_num_layers(config.parallel_config)
        * model.get_num_kv_heads(config.parallel_config)
        * model.get_head_size()
        * model.dtype.itemsize
    )
    needed = -(-model.max_model_len // block) * block * per_token
    if needed > available:
        raise ServeError(
            _shortage(model.max_model_len, needed / 2**30, available / 2**30)
            + f": set serve.kv_cache_gib to at least {_ceil(needed / 2**30)}, or "
            f"serve.max_model_len to at most {available // (block * per_token) * block}"
        )


_VLLM_SHORTAGE = re.compile(
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, which is larger than the available "
    r"KV cache memory \(([\d.]+) GiB\)\.(?:.*?maximum model length is (\d+))?",
    re.DOTALL,
)


def explain_shortage(text: str) -> str | None:
    """vLLM's word for a KV cache that is too small, said with our keys; None for other text.

    Args:
        text: what the engine's process wrote.
    """
    found = _VLLM_SHORTAGE.search(text)
    if found is None:
        return None
    length, needed, available, longest = found.groups()
    advice = f"at most {longest}" if longest else "fewer tokens"
    return (
        _shortage(int(length), float(needed), float(available))
        + f" is left beside the weights: set serve.max_model_len to {advice}, or "
        f"serve.quantization=8bit, or use more GPUs (serve.gpus_per_replica)"
    )


def _shortage(length: int, needed_gib: float, available_gib: float) -> str:
    return (
        f"a request of full length ({length} tokens) needs {_ceil(needed_gib)} GiB of KV cache, "
        f"{available_gib:.2f} GiB"
    )


def _ceil(gib: float) -> str:
    """Two decimals, never below the number."""
    return f"{-(-gib * 100 // 1) / 100:.2f}"
