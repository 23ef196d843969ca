"""Serve one model by `ray.serve.llm` until Ctrl-C: the peer of `serving.py`, not for use alone.

Run with direct streaming (`serving_servers.py` sets it), where the engine's replica is the ingress.
Its default that would be unfair is set: streamed pieces are not batched.
"""

import signal
import sys
import threading

import ray
from ray import serve
from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_openai_app


def main() -> None:
    """MODEL NAME PORT DTYPE MAX_LEN MAX_SEQUENCES KV_BYTES."""
    model, name, port, dtype, max_len, max_sequences, kv_bytes = sys.argv[1:]
    config = LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=name, model_source=model),
        accelerator_config={"kind": "cpu"},
        engine_kwargs={
            "dtype": dtype, "max_model_len": int(max_len), "max_num_seqs": int(max_sequences),
            "kv_cache_memory_bytes": int(kv_bytes), "enforce_eager": True,
        },
        deployment_config={
            "autoscaling_config": {"min_replicas": 1, "max_replicas": 1},
            "ray_actor_options": {"num_cpus": 0},
        },
        experimental_configs={"stream_batching_interval_ms": 0},
    )  # fmt: skip
    # First: building the application would start a cluster of its own kind.
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    application = build_openai_app({"llm_configs": [config]})
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(application)
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
