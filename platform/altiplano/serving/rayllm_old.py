"""From the `serve` section and model directories to a Ray Serve application on vLLM.

The only file that knows `ray.serve.llm` and vLLM's options; it does not know artifacts, ports or
lifecycles. The same code serves on CPUs and GPUs. Importing `ray.serve.llm` costs several seconds
and happens on the first call.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.config.schema import ServeSection

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.llm import LLMConfig

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes vLLM 0.29's CPU attention has kernels for; others fail at the first step."""

_QUIET = {
    # vLLM reports nothing home, asks no hub, and says only what somebody must act on.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_INGRESS_REQUESTS_PER_REPLICA = 4
"""The HTTP router holds this many times what the engines hold; then clients get a 503."""


def llm_config(
    section: ServeSection, model_dir: Path, draft_dir: Path | None = None
) -> "LLMConfig":
    """Describe one engine to `ray.serve.llm`.

    Args:
        section: the `serve` section.
        model_dir: Hugging Face model directory with its tokenizer, readable from every node.
        draft_dir: a smaller model with the same tokenizer that speculates in the engine
            (Leviathan et al. 2023); the sampled distribution stays the target's.
    """
    from ray.serve.llm import LLMConfig, ModelLoadingConfig

    on_gpu = section.gpus_per_replica > 0
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(
            model_id=section.model_name, model_source=str(model_dir)
        ),
        accelerator_config={"kind": "gpu" if on_gpu else "cpu"},
        engine_kwargs=_engine_arguments(section, draft_dir),
        deployment_config={
            "autoscaling_config": {
                "min_replicas": section.min_replicas,
                "max_replicas": section.max_replicas,
                "target_ongoing_requests": section.target_ongoing_requests,
            },
            "max_ongoing_requests": section.max_ongoing_requests,
            # What stops an engine from starting is seldom gone at the second try.
            "max_constructor_retry_count": 1,
            # The bundle below holds what a replica takes; by default Serve adds one CPU more.
            "ray_actor_options": {"num_cpus": 0},
        },
        # One token as soon as it is there, instead of a batch every 50 ms.
        experimental_configs={"stream_batching_interval_ms": 0},
        runtime_env={"env_vars": dict(_QUIET)},
        server_cls=_server_class() if answers_greedily(section, draft_dir) else None,
    )


def answers_greedily(section: ServeSection, draft_dir: Path | None) -> bool:
    """Whether the service reads every request at temperature 0 (see `serving/greedy.py`)."""
    return draft_dir is not None and section.speculate and section.gpus_per_replica == 0


def _server_class() -> type:
    from altiplano.serving.greedy import GreedyServer

    return GreedyServer


def build_application(
    section: ServeSection, model_dir: Path, draft_dir: Path | None = None
) -> "Application":
    """Build the OpenAI-compatible application: one HTTP router and the engine's replicas.

    Args: as `llm_config`.
    """
    _import_quietly()
    from ray.serve.llm import build_openai_app

    at_once = section.max_ongoing_requests * section.max_replicas * _INGRESS_REQUESTS_PER_REPLICA
    return build_openai_app(
        {
            "llm_configs": [llm_config(section, model_dir, draft_dir)],
            "ingress_deployment_config": {
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": 1,
                    "target_ongoing_requests": at_once,
                },
                "max_ongoing_requests": at_once,
                "ray_actor_options": {"num_cpus": 0},
            },
        }
    )


def _import_quietly() -> None:
    """Import `ray.serve.llm` without its log lines, now and later, in this process.

    Its import puts a JSON handler at level INFO on the root logger, so that from then on every
    library's chatter would be printed, and vLLM warns of the GPU kernels it does not find.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    import ray.serve.llm

    root.setLevel(level)
    root.handlers = handlers
    logging.getLogger(ray.serve.__name__).setLevel(logging.WARNING)


def _engine_arguments(section: ServeSection, draft_dir: Path | None) -> dict[str, Any]:
    """vLLM's AsyncEngineArgs."""
    arguments: dict[str, Any] = {
        "dtype": section.dtype,
        "enforce_eager": section.enforce_eager,
        "max_num_seqs": section.max_ongoing_requests,
        "tensor_parallel_size": max(1, section.gpus_per_replica),
        "trust_remote_code": False,
    }
    if section.gpus_per_replica == 0:
        # VLLM_CPU_KVCACHE_SPACE, the usual way, takes whole GiB only.
        arguments["kv_cache_memory_bytes"] = int(section.kv_cache_gib * 2**30)
    if section.max_model_len is not None:
        arguments["max_model_len"] = section.max_model_len
    if draft_dir is not None and section.speculate:
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": str(draft_dir),
            "num_speculative_tokens": section.draft_tokens,
            "draft_tensor_parallel_size": arguments["tensor_parallel_size"],
        }
    return arguments
