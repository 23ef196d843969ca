"""One answer as it grows from its steps: text, stop strings, logprobs, token ids, why it ended.

The same for streamed and whole answers, so both say the same. Knows no HTTP and no engine. Costs a
microsecond per token, and as much again with stop strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.text import Detokenizer, StopScan, TextCodec
from altiplano.serving.messages import Step, TokenLogprob

_LEAST_LOGPROB = -9999.0
"""JSON has no infinity; vLLM's server writes this too."""


@dataclass(frozen=True)
class Wish:
    """What a request wants of its answers' text."""

    stops: Sequence[str] = ()
    include_stop: bool = False
    min_tokens: int = 0
    """Stop strings are not looked for in so many first tokens."""
    special: bool = False
    """Spell special tokens."""
    top: int | None = None
    """Likeliest tokens reported per position; None reports nothing."""
    only_prompt: bool = False
    """Nothing is to be made: the token that the engine makes all the same is dropped."""


class Answer:
    """An answer to `prompt`; feed it steps until `finish` is set."""

    def __init__(self, index: int, codec: TextCodec, prompt: Sequence[int], wish: Wish) -> None:
        self.index = index
        self.codec = codec
        self._prompt = prompt
        self._wish = wish
        self.reset()

    def reset(self) -> None:
        """Forget everything: the answer begins anew."""
        self.pieces: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[list[TokenLogprob]] = []
        self.prompt_logprobs: list[list[TokenLogprob] | None] | None = None
        self.cached_tokens = 0
        self.proposed = self.accepted = 0
        """Tokens a draft proposed, and how many of them this answer has."""
        self.finish: str | None = None
        """`stop` or `length`, once it is over."""
        self.stop_reason: str | int | None = None
        """The stop string or stop token id that ended it, where one did."""
        self._detokenizer = Detokenizer(self.codec, self._prompt, special=self._wish.special)
        self._scan = StopScan(self._wish.stops, self._wish.include_stop)

    @property
    def text(self) -> str:
        """Everything that came out so far."""
        return "".join(self.pieces)

    def add(self, step: Step) -> str:
        """Take a step; return the text that is sure by now.

        Raises:
            ApiError: 500, the engine failed at this answer.
        """
        if step.finish == "error":
            raise ApiError(500, "the engine failed at this answer")
        self.cached_tokens = self.cached_tokens or step.cached_tokens
        self.proposed, self.accepted = step.proposed, step.accepted
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        if self._wish.only_prompt:
            self.finish = "length"
            return ""
        if self._wish.stops:
            piece, taken = self._scanned(step)
        else:
            piece, taken = self._detokenizer.feed(self._spelled(step)), len(step.tokens)
        self.ids += step.tokens[:taken]
        if step.logprobs is not None:
            self.logprobs += step.logprobs[:taken]
        if self._scan.found is not None:
            self.finish, self.stop_reason = "stop", self._scan.found
        elif step.finish is not None:
            piece += self._scan.finish()
            self.finish, self.stop_reason = step.finish, step.stop_token
        if piece:
            self.pieces.append(piece)
        return piece

    def _spelled(self, step: Step) -> list[int]:
        """The tokens that make text: not the one that ended it."""
        if step.finish == "stop" and not self._wish.include_stop:
            return step.tokens[:-1]
        return step.tokens

    def _scanned(self, step: Step) -> tuple[str, int]:
        """Text up to a stop string, and how many tokens it took, one after the other."""
        text = ""
        for place, id_ in enumerate(self._spelled(step)):
            piece = self._detokenizer.feed([id_])
            if len(self.ids) + place < self._wish.min_tokens:
                text += piece
                continue
            text += self._scan.feed(piece)
            if self._scan.found is not None:
                return text, place + 1
        return text, len(step.tokens)


def chat_logprobs(
    codec: TextCodec, positions: Sequence[Sequence[TokenLogprob]], top: int
) -> list[dict[str, Any]]:
    """Logprobs in the form of chat answers.

    Args:
        positions: per token: the chosen one first, then the likeliest.
        top: how many of the likeliest to tell.
    """
    return [
        {
            **_entry(codec, position[0]),
            "top_logprobs": [_entry(codec, each) for each in _likeliest(position, top)],
        }
        for position in positions
    ]


@dataclass
class Cursor:
    """Where in a text the next token begins."""

    offset: int = 0
    """Characters before it."""
    begins: bool = False
    """The text begins with it, so that its first space is the tokenizer's."""

    def pass_over(self, codec: TextCodec, id_: int) -> str:
        """The token's text on its own; the cursor then stands behind what it adds."""
        text = codec.text_of(id_)[0]
        if not codec.is_special(id_):
            self.offset += len(text) - (self.begins and text.startswith(" "))
            self.begins = False
        return text


def completion_logprobs(
    codec: TextCodec,
    ids: Sequence[int],
    positions: Sequence[Sequence[TokenLogprob] | None],
    top: int,
    cursor: Cursor,
) -> dict[str, list[Any]]:
    """Logprobs in the form of completions.

    Args:
        ids: the tokens.
        positions: as many; None where there is none (the first token of a prompt).
        top: how many of the likeliest to tell, beside the chosen one.
        cursor: stands before the first token, afterwards behind the last.
    """
    offsets, tokens = [], []
    for id_ in ids:
        offsets.append(cursor.offset)
        tokens.append(cursor.pass_over(codec, id_))
    return {
        "tokens": tokens,
        "token_logprobs": [_shown(each[0][1]) if each else None for each in positions],
        "top_logprobs": [
            {
                codec.text_of(id_)[0]: _shown(logprob)
                for id_, logprob, _ in [*_likeliest(each, top), each[0]]
            }
            if each
            else None
            for each in positions
        ],
        "text_offset": offsets,
    }


def _entry(codec: TextCodec, token: TokenLogprob) -> dict[str, Any]:
    text, data = codec.text_of(token[0])
    return {"token": text, "logprob": _shown(token[1]), "bytes": list(data)}


def _likeliest(position: Sequence[TokenLogprob], top: int) -> list[TokenLogprob]:
    unique = {token[0]: token for token in position}
    return sorted(unique.values(), key=lambda token: token[2])[:top]


def _shown(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
