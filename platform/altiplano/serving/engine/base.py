"""What a replica needs of an engine, and the two ways in which one fails.

The rest of the service is written against this; `vllm.py` is the one engine there is. Knows no
engine's library; importing it costs nothing.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from altiplano.serving.messages import About, Job, Step

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes vLLM 0.29's CPU attention has kernels for; others fail at the first step."""


class InvalidJob(ValueError):
    """The engine refuses this job, and would again; the message is for whoever asked."""


class EngineLost(RuntimeError):
    """The engine is dead: every job it had is lost, and it takes no further one."""


class Engine(Protocol):
    """One model, loaded: jobs in, token ids out."""

    async def start(self) -> None:
        """Load the model; afterwards jobs are taken.

        Raises:
            ServeError: it cannot be served with these settings; the message names the key.
        """

    def generate(self, job: Job) -> AsyncGenerator[Step, None]:
        """Answer a job, one `Step` per engine step that made tokens for it; the last has `finish`.

        Closing the iterator, or cancelling who awaits it, ends the job in the engine at once.

        Raises:
            InvalidJob: nothing was made.
            EngineLost: it died meanwhile; what was yielded stands.
        """

    async def embed(self, prompt: list[int]) -> list[float]:
        """The embedding of a prompt: `hidden_size` numbers of Euclidean length 1.

        Raises:
            InvalidJob, EngineLost: as `generate`.
        """

    async def check_health(self) -> None:
        """Raise `EngineLost` where the engine is dead; a busy engine is healthy."""

    def about(self) -> About:
        """What is served; call it after `start`."""

    async def load_adapter(self, name: str, address: str) -> str:
        """Load a LoRA adapter, so that the first job that names it finds it there.

        Args:
            address: as `adapters.open_adapter` takes it.

        Returns:
            The address with the digest of the weights, for `Job.adapter_path`.

        Raises:
            InvalidJob: it cannot be loaded; the message says why.
        """

    async def unload_adapter(self, name: str) -> None:
        """Drop an adapter's weights; a name that is not loaded is no error."""

    def shutdown(self) -> None:
        """End the engine and its processes; calling it twice is no error."""
