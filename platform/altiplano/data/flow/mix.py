"""Mixing: how often each document is trained on, so that the sources have their shares.

A pure function of token counts; it knows nothing of files or texts. A source's factor f gives every
document floor(f) copies and one more with probability f - floor(f), decided by the document's own
content key, so that the choice is the same on every machine. Shares are exact for the expected
number of tokens; few or very long documents miss them by their own length. Costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from altiplano.config.data import ReplaySection, TextSource
from altiplano.errors import DataError

_DIGITS = 9
"""Factors are rounded to this many decimals, so that 2 does not become 1.9999999999999998."""


@dataclass(frozen=True)
class Portion:
    """One source after cleaning."""

    source: TextSource
    tokens: int
    """Of all documents that are left, each counted once."""


def copy_factors(
    text: Sequence[Portion], replay: Sequence[Portion] = (), section: ReplaySection | None = None
) -> dict[str, float]:
    """Mean number of copies of a source's documents, by the source's label.

    Without weights a source's factor is its `repeat`. With weights the factors make the tokens
    proportional to the weights, as many as possible with no factor above its `repeat`. Replayed
    sources keep their proportions to each other and are scaled to `section.share` of all tokens.

    Args:
        text: the corpora.
        replay: the replayed corpora, with `section`.
        section: share and limit of the replay.

    Raises:
        DataError: a weighted source holds nothing, or the replay would come too often.
    """
    factors = _factors(text)
    if section is not None:
        wanted = _total(text, factors) * section.share / (1 - section.share)
        factors |= _scaled_replay(replay, wanted, section)
    return factors


def copies(keys: npt.NDArray[np.uint64], factor: float) -> npt.NDArray[np.int64]:
    """Copies of each document, [n], from its content key, [n]."""
    whole = int(factor)
    extra = keys < np.uint64((factor - whole) * 2.0**64)
    return whole + extra.astype(np.int64)


def _factors(portions: Sequence[Portion]) -> dict[str, float]:
    """Factors within one list of sources."""
    weights = [portion.source.weight for portion in portions]
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(portions):
        return {portion.source.label: portion.source.repeat for portion in portions}
    for portion in portions:
        if portion.tokens == 0:
            raise DataError(
                f"the source {portion.source.label} has weight {portion.source.weight:g} but no "
                f"document is left of it: give it more text, loosen `data.clean`, or take it out"
            )
    shares = [weight / sum(given) for weight in given]
    total = min(
        portion.source.repeat * portion.tokens / share
        for portion, share in zip(portions, shares, strict=True)
    )
    return {
        portion.source.label: min(
            portion.source.repeat, round(share * total / portion.tokens, _DIGITS)
        )
        for portion, share in zip(portions, shares, strict=True)
    }


def _scaled_replay(
    replay: Sequence[Portion], wanted: float, section: ReplaySection
) -> dict[str, float]:
    relative = _factors(replay)
    have = _total(replay, relative)
    if have == 0:
        raise DataError(
            "no document of `data.replay` is left: give it more text, or loosen `data.clean`"
        )
    most = max(relative.values())
    if wanted / have * most > section.max_repeat:
        available = have * section.max_repeat / most
        reachable = available / (available + wanted / section.share * (1 - section.share))
        raise DataError(
            f"`data.replay` holds {_tokens(have)}, but {section.share:.2%} of the training tokens "
            f"are {_tokens(wanted)}, more than max_repeat {section.max_repeat:g} allows "
            f"({_tokens(available)}): lower `data.replay.share` to {_rounded_down(reachable)}, "
            f"give more text, or raise `data.replay.max_repeat`"
        )
    return {label: round(factor * wanted / have, _DIGITS) for label, factor in relative.items()}


def _total(portions: Sequence[Portion], factors: dict[str, float]) -> float:
    return sum(factors[portion.source.label] * portion.tokens for portion in portions)


def _tokens(count: float) -> str:
    return f"{count:,.0f} tokens"


def _rounded_down(share: float) -> str:
    return f"{int(share * 10_000) / 10_000:.4f}"
