"""What vLLM asks for proposals in every engine step (`custom_class`): our own draft.

vLLM loads `Proposer` by name inside the engine's process; the work is `Speculation`'s. It lets a
`Policy` decide how many tokens to propose, asks a draft in this process or a replica, and counts
what the target accepted. A draft can only cost time, never an answer: every error ends in a step
without proposals. Knows neither Ray nor how drafts work. With the policy off a step costs about 10
microseconds.
"""

import logging
import uuid
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from altiplano.config.serving import DraftSettings
from altiplano.serving.speculation.channel import Link, Report
from altiplano.serving.speculation.policy import Policy
from altiplano.serving.speculation.protocol import VERSION, Guess, Hello, Row
from altiplano.serving.speculation.sequences import Line, Mirror, check_ids, read_line

_log = logging.getLogger(__name__)

_LOG_EVERY_S = 60.0
_LATENCIES = 512


class Draft(Protocol):
    """Whoever makes the proposals."""

    steady: bool
    """Whether the latest call read only what was new: only then its time is typical."""

    def ready(self) -> bool:
        """Whether to ask now; counts why not. Cheap where the answer is no."""

    def propose(self, lines: list[Line]) -> list[list[int]]:
        """Proposals for each line, at most `line.k`; called only after `ready` said yes."""

    def close(self) -> None:
        """Let go of sockets and memory."""


class Drafting(Protocol):
    """What `LocalDraft` needs of `drafter.Drafter`."""

    max_tokens: int
    """Longest sequence it takes."""

    def propose(self, rows: list[Row]) -> list[Guess]:
        """One guess per row."""


class LocalDraft:
    """A draft in the engine's own process."""

    def __init__(self, drafter: Drafting, vocab_size: int) -> None:
        """Share `drafter` with nobody: it is taken to hold what it was last asked about."""
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._mirror = Mirror()
        self.steady = True

    def ready(self) -> bool:
        """Always."""
        return True

    def propose(self, lines: list[Line]) -> list[list[int]]:
        """As `Draft.propose`; computes in this thread.

        Raises:
            ValueError: the draft proposes ids the target does not have.
        """
        self.steady = True
        proposals: list[list[int]] = [[] for _ in lines]
        rooms = [min(line.k, self._drafter.max_tokens - line.length) for line in lines]
        asked = [index for index, room in enumerate(rooms) if room > 0]
        for whole in (False, True):  # The second time for those it no longer held.
            if not asked:
                break
            rows = [self._mirror.row(lines[i], rooms[i], whole=whole) for i in asked]
            self.steady &= all(row.base_len for row in rows)
            missing = []
            for index, guess in zip(asked, self._drafter.propose(rows), strict=True):
                proposals[index] = guess.tokens[: rooms[index]]
                self.steady &= bool(guess.tokens)
                if guess.missing:
                    missing.append(index)
                    self._mirror.forget(lines[index].now)
            asked = missing
        check_ids(proposals, self._vocab_size)
        return proposals

    def close(self) -> None:
        """Nothing to let go of."""


class Speculation:
    """Asks a draft as often as a policy finds worth it, and counts what comes of it."""

    def __init__(
        self, draft: Draft, policy: Policy, counts: Report, *, longest: int, most: int
    ) -> None:
        """Nothing is asked yet.

        Args:
            counts: totals are kept there.
            longest: tokens a sequence may have.
            most: tokens the target verifies per row and step.
        """
        self._draft = draft
        self._policy = policy
        self.counts = counts
        self._longest = longest
        self._most = most
        counts.accepted_at = [0] * most
        self._proposed: dict[int, int] = {}
        """Tokens proposed in the last step, by digest of the sequence."""
        self._lengths: set[int] = set()
        """Lengths of the rows after the last step."""
        self._steady = True
        """Whether the last call's time was typical."""
        self._left_at = 0.0
        self._draft_s = 0.0
        self._logged_at = -_LOG_EVERY_S

    def propose(
        self,
        sampled: list[list[int]],
        lengths: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
    ) -> list[list[int]]:
        """Proposals for the next step.

        Args:
            sampled: per row what this step made; empty while its prompt is computed.
            lengths: [at least rows] length of each row, with what this step made.
            ids: [at least rows, max_model_len] ids of each row.

        Returns:
            Per row at most `num_speculative_tokens` ids; empty where it is decoded plainly.
        """
        began = perf_counter()
        try:
            proposals = self._step(sampled, lengths, ids, began)
        except Exception as error:
            self._report(error)
            proposals = [[] for _ in sampled]
        self._left_at = perf_counter()
        self._draft_s = self._left_at - began
        return proposals

    def close(self) -> None:
        """Let go of the draft."""
        self._draft.close()

    def _step(
        self,
        sampled: list[list[int]],
        lengths: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
        began: float,
    ) -> list[list[int]]:
        lines = self._lines(sampled, lengths, ids) if self._proposed else {}
        self._observe(sampled, lengths, list(lines.values()), began)
        proposals: list[list[int]] = [[] for _ in sampled]
        k = self.counts.tokens_per_step = min(self._policy.tokens(len(sampled)), self._most)
        if not k or not self._draft.ready():
            return proposals
        lines = lines or self._lines(sampled, lengths, ids)
        for line in lines.values():
            line.k = min(line.k, k)
        for index, tokens in zip(lines, self._draft.propose(list(lines.values())), strict=True):
            if tokens:
                proposals[index] = tokens
                self._proposed[lines[index].now] = len(tokens)
        self._steady = self._draft.steady
        if len(self.counts.latencies_ms) < _LATENCIES:
            self.counts.latencies_ms.append((perf_counter() - began) * 1000)
        return proposals

    def _lines(
        self,
        sampled: list[list[int]],
        lengths: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
    ) -> dict[int, Line]:
        """The rows that made something, by index."""
        return {
            index: read_line(ids[index], int(lengths[index]), fresh, self._longest)
            for index, fresh in enumerate(sampled)
            if fresh
        }

    def _observe(
        self,
        sampled: list[list[int]],
        lengths: npt.NDArray[np.int32],
        lines: list[Line],
        began: float,
    ) -> None:
        """Count what became of the last step's proposals and tell the policy."""
        proposed = accepted = [0] * len(sampled)
        if lines:
            proposed = [self._proposed.get(line.before, 0) for line in lines]
            accepted = [
                min(count, len(line.fresh) - 1) for count, line in zip(proposed, lines, strict=True)
            ]
            self._count(proposed, accepted)
        self._proposed = {}
        if self._only_decoded(sampled, lengths) and self._steady:
            step_s = began - self._left_at
            self._policy.observe(len(sampled), proposed, accepted, step_s, self._draft_s)
        self._steady = True

    def _only_decoded(self, sampled: list[list[int]], lengths: npt.NDArray[np.int32]) -> bool:
        """Whether every row of this step was one of the last step's and went on.

        Only the time of such a step says what a step costs. Told by the rows' lengths, which may
        err where a new prompt is as long as an old row was; naming rows would cost ten times more.
        """
        after = lengths[: len(sampled)].tolist()
        rows = list(zip(sampled, after, strict=True))
        before, self._lengths = self._lengths, {length for fresh, length in rows if fresh}
        return bool(rows) and all(fresh and length - len(fresh) in before for fresh, length in rows)

    def _count(self, proposed: list[int], accepted: list[int]) -> None:
        counts = self.counts
        counts.steps += any(proposed)
        counts.proposed += sum(proposed)
        counts.accepted += sum(accepted)
        for count in accepted:
            for position in range(count):
                counts.accepted_at[position] += 1

    def _report(self, error: Exception) -> None:
        """Count an error of ours and log it, with its traceback, once a minute."""
        self._proposed = {}
        self._steady = False
        self.counts.fell_back("error")
        if monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = monotonic()
            _log.error("speculation failed in this step, decoding plainly", exc_info=error)


class Proposer:
    """The object that vLLM's model runner calls `drafter`."""

    def __init__(self, vllm_config: Any) -> None:
        """Read `additional_config["altiplano_draft"]`; nothing is loaded yet.

        Raises:
            ValueError: the target is tensor-parallel, whose ranks would propose differently.
        """
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if ranks != 1:
            raise ValueError(
                f"this draft is for targets on one GPU, the target has {ranks}: set "
                f"serve.draft.method=draft_model"
            )
        self._config: dict[str, Any] = vllm_config.additional_config["altiplano_draft"]
        self._settings = DraftSettings(**self._config["settings"])
        self._vllm = vllm_config
        self._speculation: Speculation | None = None

    def load_model(self, *_: object, **__: object) -> None:
        """Called once by vLLM after the target is loaded: load the draft, or look for replicas."""
        counts = Report()
        link = Link(self._config["channel"], counts)
        is_replica = self._config["placement"] == "replica"
        most = self._vllm.speculative_config.num_speculative_tokens
        self._speculation = Speculation(
            self._remote(link, counts) if is_replica else self._local(),
            Policy(min(self._settings.tokens, most), self._settings.adaptive),
            counts,
            longest=self._vllm.model_config.max_model_len,
            most=most,
        )

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """As `Speculation.propose`; called by name, once per engine step."""
        assert self._speculation is not None, "vLLM loads before it asks"
        return self._speculation.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)

    def _local(self) -> Draft:
        from altiplano.serving.speculation.drafter import Drafter

        config = self._vllm.model_config
        drafter = Drafter(
            Path(self._config["model"]),
            device=str(self._vllm.device_config.device),
            cache_gib=self._settings.cache_gib,
            max_len=config.max_model_len,
        )
        return LocalDraft(drafter, config.get_vocab_size())

    def _remote(self, link: Link, counts: Report) -> Draft:
        from altiplano.serving.speculation.client import RemoteDraft

        rows = self._vllm.model_config.get_vocab_size()
        hello = Hello(VERSION, self._config["vocab_digest"], rows)
        return RemoteDraft(hello, self._settings, link, counts, uuid.uuid4().hex)
