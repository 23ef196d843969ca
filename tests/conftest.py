"""Fixtures every test may ask for: the shared real data, one local Ray cluster, a tiny Llama.

Heavy imports stay inside the fixtures, so that a light test file is collected in an instant.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from altiplano.config.serving import ServeSection
from altiplano.serving.environment import prepare
from tests.helpers.s3 import point_at_loopback, s3_bucket, s3_server  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent

# No test has business on a network, and a fork after tokenizers' threads started only warns.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny matrices on a busy machine: two threads wait for each other ten times longer than one works.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
# Ray Train takes one report per look at its workers, every 2 s unless told otherwise.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
# Ray would write a token into the home directory; RAY_AUTH_MODE=token make test tries that mode.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers and the commands that tests start find the library and the test helpers as we do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "platform"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Serve as `altiplano serve` starts it; its processes read these when they start.
prepare(ServeSection())

# Before any cluster starts: its workers read s3:// addresses too, and never a real one.
point_at_loopback()

# Time on a shared machine says nothing about correctness.
settings.register_profile("altiplano", deadline=None)
settings.load_profile("altiplano")


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared real data, or skip: it is no part of the project."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("real data is not here: ../shared/data is no part of the project")
    return data


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, str]]:
    """Start one local Ray cluster for the whole session; yield its address information."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300 * 1024**2,
        log_to_driver=False,
    )
    yield dict(context.address_info)
    ray.shutdown()


@pytest.fixture
def tiny_llama() -> Callable[..., "LlamaForCausalLM"]:
    """Return a maker of random Llamas: hidden 64, two heads of 32, fp32."""

    def make(
        vocab_size: int = 320, *, tied: bool = False, layers: int = 2, seed: int = 0
    ) -> "LlamaForCausalLM":
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make
