"""How many tokens a draft should propose, and whether at all: from measured time and acceptance.

Proposing k tokens pays where E(k) / T(k) is above 1 / T(0): E(k) = 1 + p1 + p1 p2 + ... tokens are
expected of a step (Leviathan et al. 2023, with an acceptance p_i per position), T(k) is the
measured time of drafting and verifying. Times are kept per batch size (powers of two), since
verifying costs a loaded engine more; acceptance is a matter of the text and kept once.

Where it does not pay, a short burst of probes asks again. What a burst lost decides how long the
next one waits (a hundred times as long), so that a draft that is never right costs about 1 %.
Knows neither engines nor drafts nor clocks. Costs microseconds per step.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

_BURST = 6
"""Steps that measure something before it is judged; the median of them ignores two mishaps."""
_SAMPLES = 9
"""Latest times kept per number of tokens."""
_REFRESH = 32
"""While on, one step in so many is plain and one tries a neighbour, lest their times go stale."""
_PROBE_TOKENS = 4
"""Tokens proposed by a probe."""
_MEMORY = 100.0
"""Trials that acceptance remembers."""
_PROBE_MEMORY = 2.0
"""Trials remembered into a probe, so that the probe decides."""
_BETTER = 1.01
"""A change must promise this much."""
_WAIT_PER_LOSS = 100.0
_LONGEST_WAIT_S = 30.0


class Policy:
    """Choose the number of proposed tokens per step."""

    def __init__(self, max_tokens: int, adaptive: bool) -> None:
        """Args:
        max_tokens: most tokens proposed.
        adaptive: false always proposes `max_tokens`.
        """
        assert max_tokens >= 1
        self._max = max_tokens
        self._adaptive = adaptive
        self._acceptance = _Acceptance([_Rate() for _ in range(max_tokens)])
        self._loads: dict[int, _Load] = {}
        self._batch = 1

    def tokens(self, batch: int) -> int:
        """Return how many tokens to propose for each of `batch` rows; 0 is none."""
        self._batch = batch
        return self._load(batch).plan(self._max) if self._adaptive else self._max

    def observe(
        self,
        batch: int,
        proposed: list[int],
        accepted: list[int],
        step_s: float,
        draft_s: float,
    ) -> None:
        """Take in one engine step. Not to be told: steps that computed a prompt.

        Args:
            batch: rows of the step.
            proposed: draft tokens verified in it, per row; all 0 is a plain step, also where
                drafts were asked for and did not come (to give such a draft up is the breaker's
                business).
            accepted: how many of them were right, per row.
            step_s: seconds from the end of drafting to the step's sampled tokens.
            draft_s: seconds that drafting the verified tokens took before.
        """
        assert batch == len(proposed) == len(accepted) >= 1
        self._batch = batch
        self._acceptance.add(proposed, accepted)
        load = self._load(batch)
        # A row without a draft in a batch with some still takes its part of the time.
        tokens = max(round(fmean(proposed)), int(any(proposed)))
        load.add(tokens, step_s + (draft_s if tokens else 0.0), 1 + fmean(accepted))
        load.decide(self._max, self._acceptance)

    @property
    def on(self) -> bool:
        """Whether it speculates at the present load, probes aside."""
        return not self._adaptive or self._load(self._batch).tokens > 0

    @property
    def reason(self) -> str:
        """Why it is on or off, in a few words."""
        return self._load(self._batch).reason if self._adaptive else "not adaptive"

    def _load(self, batch: int) -> "_Load":
        return self._loads.setdefault((batch - 1).bit_length(), _Load())


@dataclass
class _Rate:
    """An exponentially weighted share."""

    trials: float = 0.0
    hits: float = 0.0

    def add(self, trials: int, hits: int) -> None:
        kept = (1 - 1 / _MEMORY) ** trials
        self.trials = self.trials * kept + trials
        self.hits = self.hits * kept + hits

    def forget(self, memory: float) -> None:
        if self.trials > memory:
            self.hits *= memory / self.trials
            self.trials = memory


@dataclass
class _Acceptance:
    """How likely the token at each position is right, where all before it were."""

    rates: list[_Rate]

    def add(self, proposed: list[int], accepted: list[int]) -> None:
        for position, rate in enumerate(self.rates):
            trials = sum(p > position <= a for p, a in zip(proposed, accepted, strict=True))
            rate.add(trials, sum(a > position for a in accepted))

    def forget(self) -> None:
        for rate in self.rates:
            rate.forget(_PROBE_MEMORY)

    def expected(self) -> list[float]:
        """Return the tokens expected of a step that proposes 0, 1, ... tokens."""
        expected, product, last = [1.0], 1.0, 1.0
        for rate in self.rates:
            # A position nobody has tried yet is taken to be like the one before it.
            last = rate.hits / rate.trials if rate.trials else last
            product *= last
            expected.append(expected[-1] + product)
        return expected


@dataclass
class _Load:
    """Times and decision at one batch size; tokens and probes left are 0 where plain."""

    times: dict[int, deque[float]] = field(default_factory=dict)
    tokens: int = 0
    probes: int = 0
    steps: int = 0
    lost_s: float = 0.0
    """Against plain decoding, since it was last off."""
    plain_s: float = 0.0
    """Decoded plainly since then."""
    wait_s: float = 0.0
    """Plain decoding due before the next probe."""
    reason: str = "measuring plain decoding"

    def plan(self, most: int) -> int:
        """Return the tokens to propose in the next step."""
        if self.probes:
            return min(most, _PROBE_TOKENS)
        if not self.tokens or self.steps % _REFRESH == 0:
            return 0
        turn, rest = divmod(self.steps, _REFRESH)
        if rest == _REFRESH // 2:
            return min(max(1, self.tokens + (1 if turn % 2 else -1)), most)
        return self.tokens

    def add(self, tokens: int, seconds: float, emitted: float) -> None:
        """Take in a step that proposed `tokens` and gave `emitted` tokens per row."""
        self.steps += 1
        self.times.setdefault(tokens, deque(maxlen=_SAMPLES)).append(max(seconds, 1e-6))
        if tokens:
            self.probes = max(0, self.probes - 1)
            self.lost_s += seconds - emitted * self._time(0) if 0 in self.times else 0.0
        else:
            self.plain_s += seconds

    def decide(self, most: int, acceptance: _Acceptance) -> None:
        """Choose the number of tokens for the coming steps, or start a probe."""
        if self.probes or len(self.times.get(0, ())) < _BURST:
            return
        if not self.tokens and self.times.keys() == {0}:
            self._probe(acceptance)
            return
        gains = self._gains(most, acceptance.expected())
        best = max(range(most + 1), key=gains.__getitem__)
        if gains[best] < _BETTER * gains[self.tokens]:
            best = self.tokens
        if best == 0:
            self._rest(acceptance)
        self.tokens = best
        pays = max(gains[1:])
        self.reason = f"{best} tokens, {pays:.2f} of plain decoding's speed expected at best"

    def _rest(self, acceptance: _Acceptance) -> None:
        """Decode plainly for as long as the last try cost, many times over; then try again."""
        if self.lost_s or self.tokens:
            least = _WAIT_PER_LOSS * self._time(0)
            self.wait_s = min(max(_WAIT_PER_LOSS * self.lost_s, least), _LONGEST_WAIT_S)
            self.lost_s = self.plain_s = 0.0
        elif self.plain_s >= self.wait_s:
            self._probe(acceptance)

    def _probe(self, acceptance: _Acceptance) -> None:
        self.probes = _BURST
        self.reason = "probing"
        acceptance.forget()

    def _gains(self, most: int, expected: list[float]) -> list[float]:
        """Return the speed of each number of tokens as a multiple of plain decoding's."""
        plain = self._time(0)
        return [expected[tokens] * plain / self._time(tokens) for tokens in range(most + 1)]

    def _time(self, tokens: int) -> float:
        """Return the seconds of a step; on the line through the nearest two measured if it is not.

        Never less than a step that proposes fewer was measured to take.
        """
        if tokens in self.times:
            return median(self.times[tokens])
        below = max(known for known in self.times if known < tokens)
        above = [known for known in self.times if known > tokens]
        if not above and below == 0:
            return median(self.times[0])
        left, right = (below, min(above)) if above else (0, below)
        left_s, right_s = median(self.times[left]), median(self.times[right])
        slope = max(0.0, (right_s - left_s) / (right - left))
        return median(self.times[below]) + slope * (tokens - below)
