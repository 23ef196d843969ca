"""What the routes share: the models, the bounds, and whether every model has been heard of.

Knows which name means which model (or adapter), not how an answer is made.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from altiplano.config.serving import LimitSettings
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.keys import Caller, KeyRing
from altiplano.serving.front.models import ServedModel, TargetLost
from altiplano.serving.front.telemetry import Telemetry

_RETRY_S = 1.0


def _version() -> str:
    try:
        return metadata.version("altiplano")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass
class FrontState:
    """Everything a route needs; made once per HTTP replica."""

    models: Sequence[ServedModel]
    """The first is what a request gets that names none."""
    limits: LimitSettings
    keys: KeyRing
    telemetry: Telemetry
    cors_origins: Sequence[str] = ()
    echo_id: bool = True
    """Whether answers carry the request's id; Ray Serve adds it itself."""
    metrics: Callable[[], str] = lambda: ""
    """Text of `/metrics`."""
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time of the start, in seconds."""

    def find(self, name: str | None, caller: Caller) -> tuple[ServedModel, str | None]:
        """The model of that name, and the name of the adapter where it is one's.

        Raises:
            ApiError: 404, nothing is served under that name to this caller.
        """
        name = name or self.models[0].name
        if caller.may_use(name):
            for model in self.models:
                if model.name == name:
                    return model, None
                if name in model.adapters:
                    return model, name
        offered = ", ".join(each for each in self.names() if caller.may_use(each))
        raise ApiError(
            404,
            f"there is no model {name!r} here; there is {offered or 'none for this key'}",
            code="model_not_found",
            param="model",
        )

    def names(self) -> list[str]:
        """Names of all models and adapters."""
        return [name for model in self.models for name in (model.name, *model.adapters)]

    def versions(self) -> dict[str, str]:
        """Versions of this package and of the engines heard of."""
        engines = {model.about.engine for model in self.models if model.about is not None}
        return {"version": _version(), "engine": ", ".join(sorted(engines))}

    def missing(self) -> list[str]:
        """Names of models that should have replicas and were not heard of yet."""
        return [model.name for model in self.models if model.about is None and not model.sleeps]

    async def hear(self) -> None:
        """Ask every model that should have replicas about itself, until each has answered."""
        await asyncio.gather(*(self._hear(model) for model in self.models if not model.sleeps))

    async def _hear(self, model: ServedModel) -> None:
        while model.about is None:
            try:
                model.about = await model.client.describe()
            except (TargetLost, ApiError):
                await asyncio.sleep(_RETRY_S)
        model.context = min(model.context, model.about.max_model_len)
