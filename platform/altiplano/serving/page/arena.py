"""The arena's votes on disk, and the table of ratings they give.

A vote is one line of `elo.jsonl`; the table is always computed from all votes, so that their order
does not matter and nothing can drift. Ratings are those of Bradley and Terry (1952), "Rank analysis
of incomplete block designs", on the scale of Elo: 400 points are odds of ten to one, the middle is
1000. Knows nothing of models or answers, and keeps no text. Thousands of votes cost milliseconds.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Winner = Literal["left", "right", "tie", "bad"]
"""Who answered better; `bad` is both badly, and counts as a tie."""

START = 1000.0
_POINTS = 400 / math.log(10)
_TWO_SIDED_95 = 1.96
_SHARE_OF_LEFT: dict[Winner, float] = {"left": 1.0, "right": 0.0, "tie": 0.5, "bad": 0.5}


@dataclass(frozen=True)
class Vote:
    """One comparison of two models."""

    left: str
    right: str
    winner: Winner
    blind: bool = False
    """Whether the voter did not know the models."""


@dataclass(frozen=True)
class Rating:
    """One line of the table."""

    model: str
    rating: float
    """In points of Elo."""
    margin: float
    """Half of the interval that holds the rating with 95 % probability, in points."""
    votes: int
    won: float
    """Share of the votes won, ties by half."""


class Votes:
    """The votes in a folder; one process writes, any may read."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made with the first vote."""
        self._file = folder / "elo.jsonl"

    def add(self, vote: Vote) -> None:
        """Append one vote; it is on disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**asdict(vote), "time": round(time.time())}, ensure_ascii=False)
        with self._file.open("ab+") as file:
            # A process that was killed while it wrote may have left half a line.
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Vote]:
        """All votes, oldest first; half a line, left by a killed process, is no vote."""
        return list(self._lines()) if self._file.is_file() else []

    def _lines(self) -> Iterator[Vote]:
        for line in self._file.read_bytes().splitlines():
            try:
                said = json.loads(line)
                vote = Vote(said["left"], said["right"], said["winner"], said["blind"])
            except (ValueError, KeyError, TypeError):
                continue
            if vote.winner in get_args(Winner) and vote.left != vote.right:
                yield vote


def table(votes: list[Vote]) -> list[Rating]:
    """Ratings of all models that were voted on, the best first.

    The likeliest strengths, given the votes and one tie of each model with a model of 1000 points:
    without that prior, a model that won every vote would be infinitely strong. The margin is that
    of the normal approximation (inverse of the Hessian).
    """
    names = sorted({name for vote in votes for name in (vote.left, vote.right)})
    if not names:
        return []
    row = {name: index for index, name in enumerate(names)}
    pairs = np.array([(row[vote.left], row[vote.right]) for vote in votes])
    share = np.array([_SHARE_OF_LEFT[vote.winner] for vote in votes])
    strength, covariance = _fit(len(names), pairs, share)
    played = np.bincount(pairs.ravel(), minlength=len(names))
    won = np.bincount(pairs[:, 0], share, len(names)) + np.bincount(
        pairs[:, 1], 1 - share, len(names)
    )
    ratings = [
        Rating(
            name,
            START + _POINTS * strength[index],
            _TWO_SIDED_95 * _POINTS * math.sqrt(covariance[index, index]),
            int(played[index]),
            float(won[index] / played[index]),
        )
        for name, index in row.items()
    ]
    return sorted(ratings, key=lambda rating: -rating.rating)


def _fit(models: int, pairs: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths (natural logarithm of odds) [models] and their covariance [models, models].

    Newton's method on a strictly concave function, each step halved until it climbs.
    """
    sides = np.zeros((len(pairs), models))
    sides[np.arange(len(pairs)), pairs[:, 0]] += 1
    sides[np.arange(len(pairs)), pairs[:, 1]] -= 1
    sides = np.concatenate([sides, np.eye(models)])
    share = np.concatenate([share, np.full(models, 0.5)])

    def likelihood(strength: np.ndarray) -> float:
        odds = sides @ strength
        return float(np.sum(share * odds - np.logaddexp(0, odds)))

    strength = np.zeros(models)
    for _ in range(100):
        chance = 1 / (1 + np.exp(-sides @ strength))
        slope = sides.T @ (share - chance)
        hessian = (sides * (chance * (1 - chance))[:, None]).T @ sides
        if np.abs(slope).max() < 1e-9:
            break
        step = np.linalg.solve(hessian, slope)
        while likelihood(strength + step) < likelihood(strength) - 1e-12:
            step /= 2
        strength = strength + step
    return strength, np.linalg.inv(hessian)
