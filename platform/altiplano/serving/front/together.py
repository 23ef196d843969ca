"""Several answers at once: all of them to their ends, or their pieces as they come.

The first error ends the others, and so does a caller that gives up. Knows nothing of answers.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def gathered(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all of it, in order."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            await end(task)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What the streams give, as it comes. Close it, and they are closed."""
    if len(streams) == 1:
        async with aclosing(streams[0]):
            async for item in streams[0]:
                yield item
        return
    queue: asyncio.Queue[tuple[T | None, Exception | None]] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        over = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((item, None))
        except Exception as error:
            over = error
        queue.put_nowait((None, over))

    tasks = [asyncio.ensure_future(drain(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            received, error = await queue.get()
            if error is not None:
                raise error
            if received is None:
                running -= 1
            else:
                yield received
    finally:
        for task in tasks:
            await end(task)


async def end(task: "asyncio.Future[Any]") -> None:
    """Cancel a task, unless it is over, and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
