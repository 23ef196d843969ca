"""Which LoRA adapters an engine holds: loaded at first use, kept while used, the oldest replaced.

Knows numbers and counts, not weights: how one is put in and taken out is told it. An adapter is its
name and its address; each loading gets a number of its own, so that nothing an engine remembers of
earlier weights under the same name (its KV cache) is taken for the new ones'.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from altiplano.serving.engine.base import InvalidJob

PutIn = Callable[[str, int, str], Awaitable[Path]]
"""Load: unique name, number (from 1), address; returns where it lies. Raises `InvalidJob`."""
TakeOut = Callable[[int], Awaitable[None]]


@dataclass
class Slot:
    """One adapter."""

    name: str
    """Unique, also among earlier weights of the same adapter."""
    number: int
    directory: Path
    users: int = 0


class AdapterSlots:
    """At most `capacity` adapters."""

    def __init__(self, capacity: int, put_in: PutIn, take_out: TakeOut) -> None:
        self._capacity = capacity
        self._put_in, self._take_out = put_in, take_out
        self._slots: dict[tuple[str, str], Slot] = {}
        """In order of their last use."""
        self._changing = asyncio.Lock()
        self._loaded = 0

    @asynccontextmanager
    async def use(self, name: str, address: str) -> AsyncIterator[Slot]:
        """Have an adapter loaded within the block.

        Raises:
            InvalidJob: it cannot be loaded, or all places are taken by adapters in use.
        """
        slot = await self._get(name, address)
        slot.users += 1
        try:
            yield slot
        finally:
            slot.users -= 1

    async def drop(self, name: str) -> None:
        """Take out the adapters of this name that no job uses; others go when room is needed."""
        async with self._changing:
            idle = [key for key, slot in self._slots.items() if key[0] == name and not slot.users]
            for key in idle:
                await self._take_out(self._slots.pop(key).number)

    async def _get(self, name: str, address: str) -> Slot:
        key = name, address
        if key not in self._slots:
            async with self._changing:
                if key not in self._slots:
                    await self._make_room()
                    self._loaded += 1
                    unique, number = f"{name}#{self._loaded}", self._loaded
                    directory = await self._put_in(unique, number, address)
                    self._slots[key] = Slot(unique, number, directory)
        slot = self._slots.pop(key)
        self._slots[key] = slot
        return slot

    async def _make_room(self) -> None:
        if len(self._slots) < self._capacity:
            return
        idle = next((key for key, slot in self._slots.items() if not slot.users), None)
        if idle is None:
            raise InvalidJob(
                f"all {self._capacity} places for adapters are in use: try again later, or raise "
                f"serve.max_adapters"
            )
        await self._take_out(self._slots.pop(idle).number)
