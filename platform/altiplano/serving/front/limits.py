"""How much one caller may ask per minute, and how much one request may ask for.

Rates are token buckets: a minute's worth may come at once, then it refills evenly. Knows nothing of
keys or HTTP but its statuses. A look at a bucket costs under a microsecond.
"""

import time
from collections.abc import Callable

from altiplano.config.serving import LimitSettings
from altiplano.serving.front.errors import ApiError


class Bucket:
    """A minute's worth of something, refilled evenly.

    Args:
        per_minute: what a minute holds; also the most that may be taken at once.
        clock: seconds, never going back.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._seen = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 where it is, a minute at most where it never fits."""
        self._refill()
        missing = min(amount, self.per_minute) - self._level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take `amount`, there or not: what is owed is refilled first."""
        self._refill()
        self._level -= amount

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._seen) * self.per_minute / 60)
        self._seen = now


def check_request(
    limits: LimitSettings,
    context: int,
    *,
    prompt_tokens: int,
    max_tokens: int | None,
    answers: int,
    default_max_tokens: int | None,
) -> int:
    """Refuse a request that asks for more than it may, before a model sees it.

    Args:
        limits: `serve.limits`.
        context: tokens the model's context holds.
        prompt_tokens: length of the prompt, in tokens.
        max_tokens: longest answer asked for; None where the request names none.
        answers: answers asked for (`n`, `best_of` or beams).
        default_max_tokens: longest answer of a request that names none; None is what is left.

    Returns:
        Tokens each answer may have: at least 1, and no more than the context leaves.

    Raises:
        ApiError: 400, naming both numbers.
    """
    if prompt_tokens < 1:
        raise ApiError(400, "the prompt is empty: give at least one token", code="empty_prompt")
    longest = min(limits.max_prompt_tokens or context, context - 1)
    if prompt_tokens > longest:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens and may have {longest} "
            f"(the context holds {context}, the answer included): shorten it",
            code="context_length_exceeded",
        )
    if answers > limits.max_n:
        raise ApiError(400, f"{answers} answers are asked for and {limits.max_n} may be", param="n")
    room = context - prompt_tokens
    if max_tokens is None:
        return min(room, default_max_tokens or room, limits.max_tokens or room)
    allowed = min(room, limits.max_tokens or room)
    if max_tokens > allowed:
        raise ApiError(
            400,
            f"`max_tokens` is {max_tokens} and may be {allowed}: the context holds {context} "
            f"tokens, the prompt has {prompt_tokens}",
            code="context_length_exceeded",
            param="max_tokens",
        )
    return max_tokens
