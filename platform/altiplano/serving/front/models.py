"""A served model as the HTTP side sees it: its name, its text, and a client to its replicas.

Knows Ray Serve's handles and their errors (nothing else in `front` does), not HTTP and not what
happens in a replica. Opening reads config.json and the tokenizer: about 0.1 s per model.
"""

import asyncio
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
