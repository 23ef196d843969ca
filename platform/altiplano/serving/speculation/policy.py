"""How many tokens a draft should propose, and whether at all: from measured time and acceptance.

Knows neither engines nor drafts.
"""


class Policy:
    """Choose the number of proposed tokens per step."""

    def __init__(self, max_tokens: int, adaptive: bool) -> None: ...

    def tokens(self, batch: int) -> int:
        """Return how many tokens to propose for each of `batch` rows; 0 is none."""
        raise NotImplementedError

    def observe(
        self,
        batch: int,
        proposed: list[int],
        accepted: list[int],
        step_s: float,
        draft_s: float,
    ) -> None:
        """Take in one engine step. Steps that computed prompts are not to be told."""
        raise NotImplementedError

    @property
    def on(self) -> bool:
        """Whether it speculates, probes aside."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """Why it is on or off, in a few words."""
        raise NotImplementedError
