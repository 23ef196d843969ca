"""A served model as the HTTP side sees it: its name, its text, and a client to its replicas.

Knows Ray Serve's handles and their errors (nothing else in `front` does), not HTTP and not what
happens in a replica. Opening reads config.json and the tokenizer: about 0.1 s per model.
"""

import asyncio
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from altiplano.config.serving import ModelSettings
from altiplano.model.load import read_config
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.text import TextCodec
from altiplano.serving.link import Inbox
from altiplano.serving.messages import About, Embedding, Job, Outcome, pack, unpack


class TargetLost(Exception):
    """The replica that worked on a job is gone; another may take it up."""


class TargetClient(Protocol):
    """How jobs reach a model's replicas; cancelling a call frees its place at once."""

    async def call(self, job: Job) -> Outcome:
        """Run a job, whose steps come through the inbox.

        Raises:
            TargetLost: the replica died.
            ApiError: 503 where every queue is full.
        """
        ...

    async def embed(self, job: Job) -> Embedding:
        """Embed a job's prompt; raises as `call`."""
        ...

    async def describe(self) -> About:
        """What a replica says of itself; wakes one where none runs. Raises as `call`."""
        ...

    async def adapter(self, action: str, name: str, path: str) -> Outcome:
        """Have one replica `load` or `unload` a LoRA adapter; `message` is its path for jobs.

        Raises as `call`.
        """
        ...


class HandleClient:
    """A Ray Serve deployment handle as `TargetClient`."""

    def __init__(self, handle: Any, *, by_prefix: bool = False) -> None:
        """Make one.

        Args:
            handle: of a `Target` deployment.
            by_prefix: tell its router what a prompt begins with (`prefix_routing`).
        """
        self._handle = handle
        self._by_prefix = by_prefix

    async def call(self, job: Job) -> Outcome:
        """As `TargetClient.call`."""
        outcome = unpack(await _reply(self._for(job).generate.remote(pack(job))), Outcome)
        assert isinstance(outcome, Outcome)
        if outcome.status == "lost":
            raise TargetLost(outcome.message)
        return outcome

    async def embed(self, job: Job) -> Embedding:
        """As `TargetClient.embed`."""
        embedding = unpack(await _reply(self._for(job).embed.remote(pack(job))), Embedding)
        assert isinstance(embedding, Embedding)
        if embedding.status == "lost":
            raise TargetLost(embedding.message)
        return embedding

    async def describe(self) -> About:
        """As `TargetClient.describe`."""
        about = unpack(await _reply(self._handle.describe.remote()), About)
        assert isinstance(about, About)
        return about

    async def adapter(self, action: str, name: str, path: str) -> Outcome:
        """As `TargetClient.adapter`."""
        outcome = unpack(await _reply(self._handle.adapter.remote(action, name, path)), Outcome)
        assert isinstance(outcome, Outcome)
        if outcome.status == "lost":
            raise TargetLost(outcome.message)
        return outcome

    def _for(self, job: Job) -> Any:
        if not self._by_prefix:
            return self._handle
        from altiplano.serving.routing import prefix_key

        return self._handle.options(session_id=prefix_key(job.prompt))


async def _reply(response: Any) -> bytes:
    """Await a handle's response; give the call up when we are given up."""
    from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    try:
        reply: bytes = await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except BackPressureError:
        raise ApiError(
            503, "the model has more requests than it may queue", code="overloaded", retry_after_s=1
        ) from None
    except DeploymentUnavailableError:
        raise ApiError(
            503, "the model is not served at the moment", code="unavailable", retry_after_s=5
        ) from None
    except (RayActorError, TaskCancelledError) as error:
        raise TargetLost(str(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, RayActorError):
            raise TargetLost(str(error)) from error
        raise
    return reply


@dataclass
class ServedModel:
    """A model behind this address."""

    name: str
    entry: ModelSettings
    directory: Path
    codec: TextCodec
    client: TargetClient
    inbox: Inbox
    context: int
    """Tokens that a prompt and its answer may have together."""
    fingerprint: str
    """OpenAI's `system_fingerprint`: changes when the model does."""
    about: About | None = None
    """What its replicas said of themselves; None until one did."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Path of each loaded LoRA adapter by name; `admin.py` keeps it."""

    @property
    def sleeps(self) -> bool:
        """Whether it may have no replica at all, so that asking would wake one."""
        return self.entry.min_replicas == 0


def open_model(
    entry: ModelSettings, directory: Path, client: TargetClient, inbox: Inbox
) -> ServedModel:
    """Read what the HTTP side needs of a model directory.

    Raises:
        ArtifactError, ModelError, ServeError: no usable config or tokenizer.
    """
    config = read_config(directory)
    own = config.get("max_position_embeddings") or 2048
    return ServedModel(
        name=entry.name,
        entry=entry,
        directory=directory,
        codec=TextCodec(directory),
        client=client,
        inbox=inbox,
        context=min(own, entry.max_model_len or own),
        fingerprint=_fingerprint(directory),
    )


def _fingerprint(directory: Path) -> str:
    """A digest of the config and of the weights' sizes and times; to read them takes too long."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return f"fp_{digest.hexdigest()[:12]}"
