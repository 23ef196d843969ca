"""Windows over held-out text: every token is predicted once, with as much before it as fits.

Knows neither models nor vocabularies. Costs nothing but lists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A run of tokens the model sees at once."""

    token_ids: list[int]
    """Inputs and their successor: position t predicts `token_ids[t + 1]`."""
    first_scored: int
    """Predictions of positions before this one were scored in the window before."""


def take_bytes(texts: Sequence[str], max_bytes: int) -> list[str]:
    """The first documents up to `max_bytes` of UTF-8, empty ones left out, the last one cut."""
    taken: list[str] = []
    left = max_bytes
    for text in texts:
        part = text.encode()[:left].decode(errors="ignore")
        if part:
            taken.append(part)
        left -= len(text.encode())
        if left <= 0:
            break
    return taken


def split_windows(token_ids: Sequence[int], length: int) -> Iterator[Window]:
    """Windows of at most `length` inputs over [BOS, tokens...]; every token is scored once."""
    stride = max(1, length // 2)
    targets = len(token_ids) - 1
    scored = 0
    for start in range(0, max(targets, 1), stride):
        end = min(start + length, targets)
        if end > scored:
            yield Window(list(token_ids[start : end + 1]), scored - start)
            scored = end
        if end == targets:
            return
