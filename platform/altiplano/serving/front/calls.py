"""Calls of tools, read from what a model says while it says it.

Hermes' form is `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, also amid text; Llama 3's
is an answer that is nothing but `{"name": .., "parameters": {..}}`. Whatever is no call of a known
tool stays text. Knows no tokens, no HTTP, and not how the model was told of its tools.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BARE = ('{"name"', '[{"name"')
"""How an answer begins that is a call in Llama 3's form, blanks left out."""

Delta = dict[str, Any]
"""A part of a message, as in `choices[].delta` of a stream."""
Mode = Literal["auto", "required", "named"]


class Reader:
    """Reads one answer: feed it the text as it comes, then `finish`.

    Args:
        mode: `auto` finds calls in text; `required` reads a list of them, which a grammar made;
            `named` takes all the text as the arguments of the one tool.
        names: tools there are.
        parallel: whether one answer may call several times; else the first call counts.

    Attributes:
        content: text of the message so far.
        calls: its calls so far, as in `message.tool_calls`.
    """

    def __init__(self, mode: Mode, names: Sequence[str], parallel: bool) -> None:
        self._mode = mode
        self._names = names
        self._parallel = parallel
        self._held = ""
        self._begun = False
        self.content = ""
        self.calls: list[dict[str, Any]] = []

    def feed(self, piece: str) -> list[Delta]:
        """Take a piece of text; return what is sure by now."""
        if self._mode == "named":
            return [self._argument(piece)] if piece else []
        self._held += piece
        return [] if self._mode == "required" else self._scan()

    def finish(self) -> list[Delta]:
        """What is left once the answer is over."""
        held, self._held = self._held, ""
        if self._mode == "named":
            return []
        if held.startswith(OPEN):
            # Models may end where they should have closed.
            return self._call_or_text(held.removeprefix(OPEN), held)
        bare = self._mode == "required" or (not self._begun and _maybe_bare(held))
        return self._bare(held) if bare else self._text(held)

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the answer ended, in OpenAI's words: what had to call one tool ends with `stop`."""
        called = self.calls and reason == "stop" and self._mode != "named"
        return "tool_calls" if called else reason

    def message(self) -> dict[str, Any]:
        """The whole message."""
        text = None if self.calls and not self.content.strip() else self.content
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant", "content": text, "refusal": None, **calls}

    def _scan(self) -> list[Delta]:
        """Give out text and whole calls in Hermes' form; hold what may yet become one."""
        deltas: list[Delta] = []
        if not self._begun and _maybe_bare(self._held):
            return deltas
        while True:
            place = self._held.find(OPEN)
            if place < 0:
                kept = _overlap(self._held, OPEN)
                split = len(self._held) - kept
                deltas += self._text(self._held[:split])
                self._held = self._held[split:]
                return deltas
            deltas += self._text(self._held[:place])
            self._held = self._held[place:]
            end = self._held.find(CLOSE)
            if end < 0:
                return deltas
            whole = self._held[: end + len(CLOSE)]
            self._held = self._held[len(whole) :]
            deltas += self._call_or_text(whole[len(OPEN) : -len(CLOSE)], whole)

    def _call_or_text(self, inside: str, whole: str) -> list[Delta]:
        call = _call(parsed(inside), self._names)
        return self._text(whole) if call is None else self._called(*call)

    def _bare(self, text: str) -> list[Delta]:
        """An answer that is one call, several in a row, or a list of them; else text."""
        found = _values(text)
        calls = [_call(value, self._names) for value in found]
        if not found or None in calls:
            # What a grammar made can only be cut short; its calls that are whole count.
            calls = [call for call in calls if call] if self._mode == "required" else []
            if not calls:
                return self._text(text)
        return [delta for call in calls if call is not None for delta in self._called(*call)]

    def _text(self, text: str) -> list[Delta]:
        if not text or (self.calls and not text.strip()):
            return []
        self._begun = self._begun or bool(text.strip())
        self.content += text
        return [{"content": text}]

    def _called(self, name: str, arguments: str) -> list[Delta]:
        self._begun = True
        if self.calls and not self._parallel:
            return []
        call = _new_call(name, arguments)
        self.calls.append(call)
        # Its own copy: the call's arguments may grow.
        part = {"index": len(self.calls) - 1, **call, "function": dict(call["function"])}
        return [{"tool_calls": [part]}]

    def _argument(self, piece: str) -> Delta:
        """The next piece of the named tool's arguments."""
        if not self.calls:
            return self._called(self._names[0], piece)[0]
        self.calls[0]["function"]["arguments"] += piece
        return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


def _new_call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _call(value: Any, names: Sequence[str]) -> tuple[str, str] | None:
    """Name and arguments (JSON) of a call of a known tool."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parsed(arguments)
    if not isinstance(arguments, dict):
        return None
    return value["name"], json.dumps(arguments, ensure_ascii=False)


def parsed(text: str) -> Any:
    """The JSON value in a text; None where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _values(text: str) -> list[Any]:
    """JSON values one after the other (`;` between them), or those of a list that may be cut."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].removesuffix("]")
    values: list[Any] = []
    decoder = json.JSONDecoder()
    while text := text.lstrip(" \n\r\t;,"):
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return [*values, None]
        values.append(value)
        text = text[end:]
    return values


def _maybe_bare(text: str) -> bool:
    """Whether a call in Llama 3's form begins like this, or may yet."""
    start = "".join(text[:64].split())
    return any(form.startswith(start) or start.startswith(form) for form in _BARE)


def _overlap(text: str, word: str) -> int:
    """Characters at the end of `text` that `word` begins with."""
    return next((n for n in range(len(word) - 1, 0, -1) if text.endswith(word[:n])), 0)
