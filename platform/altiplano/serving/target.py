"""A replica of a model: takes jobs from Ray Serve's handles, gives steps to the HTTP side's socket.

One handle call per job, which lasts as long as the job: with it Serve routes, queues, scales,
cancels and drains. The tokens go past Serve, one message per engine step and HTTP replica. A draft,
wherever it runs, is no part of this replica's health. Importing this is cheap; a replica imports
vLLM when it is made.
"""

from collections.abc import Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from altiplano.config.serving import ModelSettings
from altiplano.errors import ServeError
from altiplano.serving.engine.arguments import drafts_itself
from altiplano.serving.engine.base import EngineLost, InvalidJob
from altiplano.serving.messages import Embedding, Job, Outcome, Step, pack, unpack

if TYPE_CHECKING:
    from altiplano.serving.engine.base import Engine
    from altiplano.serving.link import Outbox
    from altiplano.serving.speculation.bridge import Bridge

_LOOPBACK = ("127.", "localhost", "::1")


class Target:
    """One replica, one engine."""

    _engine: "Engine | None" = None
    _bridge: "Bridge | None" = None
    _outbox: "Outbox | None" = None

    async def __init__(  # type: ignore[misc]  # Serve awaits a constructor that is a coroutine
        self, entry: dict[str, Any], model_dir: str, draft_dir: str | None, data_host: str
    ) -> None:
        """Load the model.

        Args:
            entry: `ModelSettings` as a dict.
            model_dir, draft_dir: as `check.Part` has them.
            data_host: `serve.data_host`.

        Raises:
            ServeError: the engine cannot start, or the HTTP side may be out of reach.
        """
        from altiplano.serving.engine.vllm import VllmEngine
        from altiplano.serving.link import Outbox

        require_reachable(data_host, machines())
        settings = ModelSettings.model_validate(entry)
        draft = Path(draft_dir) if draft_dir is not None else None
        if drafts_itself(settings, draft):
            self._bridge = _open_bridge(settings)
        channel = self._bridge.channel if self._bridge is not None else None
        self._outbox = Outbox()
        self._engine = VllmEngine(settings, Path(model_dir), draft, channel)
        try:
            await self._engine.start()
        except BaseException:
            # Serve keeps the process of a replica that failed for a while.
            self.__del__()
            raise
        if self._bridge is not None:
            self._bridge.start()

    async def generate(self, job: bytes) -> bytes:
        """Run a job, its steps sent to its `reply_to`; cancelling it ends it in the engine.

        Args:
            job: a packed `Job`.

        Returns:
            A packed `Outcome`. It may overtake the last steps: `tokens` says how many there are.
        """
        request = unpack(job, Job)
        assert isinstance(request, Job) and self._engine is not None and self._outbox is not None
        return pack(await run_job(self._engine, request, self._outbox.send))

    async def embed(self, job: bytes) -> bytes:
        """Embed a packed `Job`'s prompt; returns a packed `Embedding`."""
        request = unpack(job, Job)
        assert isinstance(request, Job) and self._engine is not None
        try:
            return pack(Embedding("done", vector=await self._engine.embed(request.prompt)))
        except InvalidJob as error:
            return pack(Embedding("invalid", str(error)))
        except EngineLost as error:
            return pack(Embedding("lost", str(error)))

    async def describe(self) -> bytes:
        """A packed `About`."""
        assert self._engine is not None
        return pack(self._engine.about())

    async def adapter(self, action: Literal["load", "unload"], name: str, path: str) -> bytes:
        """Load or drop a LoRA adapter here.

        Args:
            path: its directory or URL; of no meaning to `unload`.

        Returns:
            A packed `Outcome`; once loaded, `message` is the path for `Job.adapter_path`.
        """
        assert self._engine is not None
        try:
            if action == "load":
                return pack(Outcome("done", await self._engine.load_adapter(name, path)))
            await self._engine.unload_adapter(name)
        except InvalidJob as error:
            return pack(Outcome("invalid", str(error)))
        except EngineLost as error:
            return pack(Outcome("lost", str(error)))
        return pack(Outcome("done"))

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that raises here.

        Raises:
            EngineLost: the engine is dead.
        """
        assert self._engine is not None
        await self._engine.check_health()

    def __del__(self) -> None:
        """End the engine's processes; Serve calls it when the last job is over."""
        if self._engine is not None:
            self._engine.shutdown()
        if self._bridge is not None:
            self._bridge.close()
        if self._outbox is not None:
            self._outbox.close()


async def run_job(engine: "Engine", job: Job, send: Callable[[str, Step], None]) -> Outcome:
    """Run a job to its end; cancelling this ends it in the engine.

    Args:
        send: takes each step and where it goes.
    """
    made = 0
    try:
        async with aclosing(engine.generate(job)) as steps:
            async for step in steps:
                made += len(step.tokens)
                send(job.reply_to, step)
    except InvalidJob as error:
        return Outcome("invalid", str(error), made)
    except EngineLost as error:
        return Outcome("lost", str(error), made)
    return Outcome("done", tokens=made)


def machines() -> set[str]:
    """Addresses of the machines of the connected cluster."""
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def require_reachable(data_host: str, addresses: Iterable[str]) -> None:
    """Refuse a loopback data address on a cluster of several machines: tokens would get lost.

    Raises:
        ServeError: says what to set.
    """
    found = sorted(addresses)
    if len(found) > 1 and data_host.strip("[]").startswith(_LOOPBACK):
        raise ServeError(
            f"serve.data_host is {data_host}, which is reached from its own machine only, and the "
            f"cluster has {len(found)} machines ({', '.join(found[:4])}): set serve.data_host=node"
        )


def _open_bridge(settings: ModelSettings) -> "Bridge":
    from altiplano.serving.speculation.bridge import Bridge, RayMetrics, drafts_on_board

    by_replica = settings.draft.placement == "replica"
    notices = drafts_on_board(settings.name) if by_replica else None
    return Bridge(settings.name, RayMetrics(settings.name), notices)
