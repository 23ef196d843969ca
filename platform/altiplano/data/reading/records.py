"""Instruction records: Alpaca, ShareGPT, `messages` and Vicuna's lists, as conversations.

Every record that is none is a problem with its place, its keys and what was expected. Knows the
shapes people publish; files are `files`'s affair, templates `chat`'s. Costs little beside parsing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from altiplano.config.data import InstructionSource
from altiplano.data.chat.templates import Message
from altiplano.data.reading.files import CHUNK_BYTES, Chunk, read_values
from altiplano.data.reading.problems import Problems
from altiplano.data.reading.sources import Resolve, plan_source

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_EXPECTED = (
    "expected `instruction` and `output` (Alpaca), `messages` of `role` and `content`, "
    "`conversations` of `from` and `value` (ShareGPT), or lists `input` and `output` (Vicuna)"
)


@dataclass(frozen=True)
class Record:
    """One conversation: [system,] user, assistant, ..., ending in an answer; no text is blank."""

    messages: list[Message]
    language: str
    origin: str
    """File and record, for messages."""


class _Unusable(Exception):
    """A record that is no conversation: (reason, what is wrong)."""


def plan_records(
    source: InstructionSource, resolve: Resolve, *, chunk_bytes: int = CHUNK_BYTES
) -> list[Chunk]:
    """The parts of a source that can be read on their own, in order.

    Args:
        source: what to read; `max_records` is the reader's of all parts to keep.
        resolve: from the config's path to an absolute one.
        chunk_bytes: about how large a part is.

    Raises:
        DataError: nothing is there.
    """
    return plan_source(source, resolve, otherwise="json", chunk_bytes=chunk_bytes)


def read_records(source: InstructionSource, chunk: Chunk, problems: Problems) -> Iterator[Record]:
    """Conversations of one part, in order.

    Raises:
        DataError: a record cannot be used and `problems` says to stop.
    """
    for value, origin in read_values(chunk, problems):
        try:
            messages = _messages(value)
        except _Unusable as unusable:
            reason, what = unusable.args
            problems.report(
                reason, origin, what, json.dumps(value, ensure_ascii=False, default=str)
            )
            continue
        yield Record(messages, source.language, origin)


def _messages(record: Any) -> list[Message]:
    """A record of any known shape as a checked conversation."""
    if not isinstance(record, dict):
        raise _Unusable("not_a_record", f"a {type(record).__name__} is no record: {_EXPECTED}")
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            turns = _turns(record[key], key)
            break
    else:
        if isinstance(record.get("input"), list) or isinstance(record.get("output"), list):
            turns = _paired(record)
        elif "instruction" in record or "output" in record:
            turns = _alpaca(record)
        else:
            raise _Unusable("not_a_record", f"no conversation: it {_has(record)}; {_EXPECTED}")
    if (system := record.get("system")) is not None and turns[:1] and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return _checked(turns, record)


def _turns(turns: Any, key: str) -> list[tuple[str, Any]]:
    """(role, text) of every turn of a list of turns."""
    if not isinstance(turns, list):
        raise _Unusable("wrong_type", f"`{key}` is a {type(turns).__name__}, not a list of turns")
    found = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _Unusable(
                "wrong_type", f"turn {number} of `{key}` is a {type(turn).__name__}, not an object"
            )
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise _Unusable(
                "unknown_role",
                f"turn {number} of `{key}` {_has(turn)} and speaks as {role!r}; expected `role` or "
                f"`from`, one of {', '.join(_ROLES)}",
            )
        found.append((_ROLES[role], turn.get(text_key)))
    return found


def _alpaca(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`instruction` and `input` make the question; `history` holds earlier pairs."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise _Unusable(
            "wrong_type", f"`history` is a {type(history).__name__}, not a list of pairs"
        )
    turns: list[tuple[str, Any]] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Unusable(
                "list_too_short", f"pair {number} of `history` is not [question, answer]"
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    asked = [record.get(key) for key in ("instruction", "input")]
    if wrong := [text for text in asked if not isinstance(text, str | None)]:
        raise _Unusable("wrong_type", f"the question is a {type(wrong[0]).__name__}, not a text")
    question = "\n".join(text for text in asked if text and text.strip())
    return [*turns, ("user", question), ("assistant", record.get("output"))]


def _paired(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Vicuna: the questions in `input`, their answers in `output`."""
    asked, answered = record.get("input"), record.get("output")
    if not isinstance(asked, list) or not isinstance(answered, list):
        raise _Unusable(
            "wrong_type",
            f"`input` is a {type(asked).__name__} and `output` a {type(answered).__name__}: "
            f"give lists of equal length, or texts",
        )
    if len(answered) != len(asked):
        raise _Unusable(
            "list_too_short",
            f"`input` has {len(asked)} questions and `output` {len(answered)} answers: "
            f"each question needs one",
        )
    pairs = zip(asked, answered, strict=True)
    return [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]


def _checked(turns: list[tuple[str, Any]], record: Mapping[str, Any]) -> list[Message]:
    """The turns as messages; a blank system message is left out."""
    for number, (role, text) in enumerate(turns, start=1):
        if not isinstance(text, str | None):
            raise _Unusable(
                "wrong_type",
                f"the text of turn {number} ({role}) is a {type(text).__name__}: give a text",
            )
        if text and _has_surrogate(text):
            raise _Unusable(
                "invalid_unicode",
                f"turn {number} ({role}) holds a lone surrogate, half of a character",
            )
    if turns[:1] and turns[0][0] == "system" and not (turns[0][1] or "").strip():
        turns = turns[1:]
    spoken = turns[1:] if turns[:1] and turns[0][0] == "system" else turns
    if not spoken or spoken[-1][0] != "assistant" or not (spoken[-1][1] or "").strip():
        raise _Unusable(
            "no_answer", f"the conversation does not end in an answer: it {_has(record)}"
        )
    roles = [role for role, _ in spoken]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise _Unusable(
            "roles_out_of_order",
            f"the turns are {', '.join(roles)}: expected user, assistant, user, ... after at most "
            f"one system message",
        )
    for number, (role, text) in enumerate(turns, start=1):
        if not (text or "").strip():
            raise _Unusable("empty_turn", f"turn {number} ({role}) has no text")
    return [{"role": role, "content": text} for role, text in turns]


def _has(record: Mapping[str, Any]) -> str:
    filled = [key for key, value in record.items() if value not in (None, "", [])]
    empty = [key for key in record if key not in filled]
    return f"has {', '.join(filled) or 'nothing'}" + (
        f" (empty: {', '.join(empty)})" if empty else ""
    )


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
