"""Reading corpora and instruction records: documents and conversations, one at a time.

Every problem is a `DataError` with file and byte or line; with `on_error: skip` the document is
left out and counted by reason instead. Deliberately knows nothing of tokens. Text and JSON lines
are streamed; a `.json` file is held in memory while it is read.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, Literal

from altiplano.config.schema import InstructionSource, TextSource
from altiplano.errors import DataError
from altiplano.storage import expand, open_binary

OnError = Literal["fail", "skip"]
Resolve = Callable[[str], str]
"""From a path as the config has it to an absolute path or URL (`Project.resolve`)."""

PIECE_BYTES = 4 << 20
"""A document longer than this is read in pieces of this size, each a document of its own."""
_BOM = b"\xef\xbb\xbf"
_TURN_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    language: str
    origin: str
    """File and line or byte, for messages."""


@dataclass(frozen=True)
class Record:
    """One conversation, ending in an answer."""

    messages: list[dict[str, str]]
    language: str
    origin: str


@dataclass
class Problems:
    """What to do with a document that cannot be used, and how many there were, by reason."""

    on_error: OnError
    skipped: Counter[str] = field(default_factory=Counter)

    def report(self, reason: str, message: str) -> None:
        """Stop with the message, or count the reason.

        Raises:
            DataError: `on_error` is `fail`.
        """
        if self.on_error == "fail":
            raise DataError(f"{message}; mend it, or set `data.on_error: skip` to leave it out")
        self.skipped[reason] += 1


def read_text(
    source: TextSource,
    resolve: Resolve,
    on_error: OnError = "fail",
    problems: Problems | None = None,
) -> Iterator[Document]:
    """Documents of one corpus in the order of its files, without the blank ones.

    Args:
        source: what to read.
        resolve: turns the config's path into an absolute one.
        on_error: stop or skip.
        problems: collects what was skipped; replaces `on_error` where given.

    Raises:
        DataError: missing, empty, not UTF-8, not JSON, or without the text's key.
    """
    problems = problems or Problems(on_error)
    count = 0
    for path in expand(resolve(source.path)):
        for text, origin in _texts(path, source, problems):
            for piece in _pieces(text):
                yield Document(piece, source.language, origin)
                count += 1
                if count == source.max_documents:
                    return
    if count == 0:
        raise DataError(
            f"the corpus {source.path} holds no usable text "
            f"({sum(problems.skipped.values())} documents skipped): give one that does"
        )


def training_texts(
    sources: Iterable[TextSource],
    resolve: Resolve,
    *,
    languages: Iterable[str] | None = None,
    held_out: float = 0.0,
    on_error: OnError = "fail",
) -> Iterator[str]:
    """Texts of the training split; what vocabularies are trained on.

    Args:
        sources: the corpora.
        resolve: as for `read_text`.
        languages: only these; all by default.
        held_out: share of the documents that is kept out.
        on_error: as for `read_text`.
    """
    wanted = None if languages is None else set(languages)
    for source in sources:
        if wanted is None or source.language in wanted:
            for document in read_text(source, resolve, on_error):
                if not is_held_out(document.text, held_out):
                    yield document.text


def is_held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out split, by a hash of its normalised content.

    The same text is on the same side wherever and however often it occurs, and whatever its line
    ends, spaces at borders or Unicode composition.
    """
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    digest = hashlib.sha256(normal.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_records(
    source: InstructionSource,
    resolve: Resolve,
    on_error: OnError = "fail",
    problems: Problems | None = None,
) -> Iterator[Record]:
    """Conversations of one file or glob of instruction records.

    Understands Alpaca's `instruction`, `input` (optional) and `output`, `messages` with `role` and
    `content`, and ShareGPT's `conversations` with `from` and `value`.

    Raises:
        DataError: missing, empty, not JSON, or a record without an answer.
    """
    problems = problems or Problems(on_error)
    count = 0
    for path in expand(resolve(source.path)):
        for value, origin in _json_values(path, _json_form(path), problems):
            for item in value if isinstance(value, list) else [value]:
                messages = _messages(item)
                if messages is None:
                    problems.report("no_answer", f"{origin}: {_describe(item)}")
                    continue
                if _has_surrogate("".join(m["content"] for m in messages)):
                    problems.report("invalid_unicode", f"{origin}: a lone surrogate in a text")
                    continue
                yield Record(messages, source.language, origin)
                count += 1
                if count == source.max_records:
                    return
    if count == 0:
        raise DataError(
            f"{source.path} holds no usable instruction record "
            f"({sum(problems.skipped.values())} skipped): give one that does"
        )


def _texts(path: str, source: TextSource, problems: Problems) -> Iterator[tuple[str, str]]:
    form = source.format
    if form == "auto":
        form = _json_form(path) if path.endswith((".json", ".jsonl")) else "paragraphs"
    if form not in ("json", "jsonl"):
        yield from _plain_texts(path, form, problems)
        return
    for value, origin in _json_values(path, form, problems):
        found = list(_walk(value, source.text_key.split(".")))
        if not found:
            keys = f"keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
            problems.report(
                "no_text", f"{origin} has no text at `{source.text_key}` (it has {keys})"
            )
        for text in found:
            if _has_surrogate(text):
                problems.report("invalid_unicode", f"{origin}: a lone surrogate in the text")
            elif text.strip():
                yield text.strip(), origin


def _plain_texts(path: str, form: str, problems: Problems) -> Iterator[tuple[str, str]]:
    with open_binary(path) as handle:
        for offset, raw in _plain_documents(handle, form):
            try:
                text = raw.decode("utf-8").replace("\r\n", "\n").strip()
            except UnicodeDecodeError as error:
                at = offset + error.start
                problems.report(
                    "invalid_utf8", f"{path}: byte {at} is not UTF-8 ({raw[error.start]:#04x})"
                )
                continue
            if text:
                yield text, f"{path} at byte {offset}"


def _plain_documents(handle: IO[bytes], form: str) -> Iterator[tuple[int, bytes]]:
    """Raw documents and where they start: lines, blank-line separated blocks, or the file."""
    held: list[bytes] = []
    start = size = 0
    for offset, line in _raw_lines(handle):
        if not held:
            start, size = offset, 0
        held.append(line)
        size += len(line)
        blank = form == "paragraphs" and not line.strip()
        cut = size >= PIECE_BYTES or not line.endswith(b"\n")
        if form == "lines" or blank or cut:
            yield start, b"".join(held)
            held = []
    if held:
        yield start, b"".join(held)


def _raw_lines(handle: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their offsets; one longer than PIECE_BYTES comes in pieces of whole characters."""
    offset, rest = 0, b""
    while line := handle.readline(PIECE_BYTES):
        if offset == 0 and line.startswith(_BOM):
            offset, line = len(_BOM), line[len(_BOM) :]
        line, rest = rest + line, b""
        if not line.endswith(b"\n") and len(line) >= PIECE_BYTES - len(_BOM):
            border = _character_border(line)
            line, rest = line[:border], line[border:]
        yield offset, line
        offset += len(line)
    if rest:
        yield offset, rest


def _character_border(raw: bytes) -> int:
    """Length of `raw` without a last UTF-8 character that may be cut."""
    for back in range(1, min(4, len(raw)) + 1):
        if raw[-back] & 0xC0 != 0x80:
            return len(raw) - back if raw[-back] >= 0xC0 else len(raw)
    return len(raw)


def _pieces(text: str) -> Iterator[str]:
    """A JSON text may be as long as it likes; plain text comes in pieces already."""
    for start in range(0, len(text), PIECE_BYTES):
        yield text[start : start + PIECE_BYTES]


def _json_form(path: str) -> Literal["json", "jsonl"]:
    return "jsonl" if PurePosixPath(path).suffix == ".jsonl" else "json"


def _json_values(path: str, form: str, problems: Problems) -> Iterator[tuple[Any, str]]:
    """Parsed values of a JSON file (a list's items, else the whole) or of JSON lines."""
    with open_binary(path) as handle:
        if form == "jsonl":
            for number, line in enumerate(handle, start=1):
                raw = line.removeprefix(_BOM) if number == 1 else line
                if raw.strip():
                    yield from _parse(raw.strip(), path, number, problems)
            return
        for value, _ in _parse(handle.read().removeprefix(_BOM), path, 1, problems):
            if isinstance(value, list):
                yield from ((item, f"{path} record {n}") for n, item in enumerate(value, start=1))
            else:
                yield value, path


def _parse(raw: bytes, path: str, line: int, problems: Problems) -> Iterator[tuple[Any, str]]:
    try:
        yield json.loads(raw.decode("utf-8")), f"{path}:{line}"
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        problems.report("invalid_utf8", f"{path}:{at}: byte {error.start} is not UTF-8")
    except RecursionError:
        problems.report("invalid_json", f"{path}:{line}: JSON nested too deeply")
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        hint = " (JSON lines? name it .jsonl)" if error.msg == "Extra data" else ""
        problems.report("invalid_json", f"{place}: not JSON: {error.msg}{hint}")


def _walk(value: Any, keys: list[str]) -> Iterator[str]:
    """Texts at a path of keys; lists on the way and at the end are walked."""
    if isinstance(value, list):
        for item in value:
            yield from _walk(item, keys)
    elif not keys:
        if isinstance(value, str):
            yield value
    elif isinstance(value, dict) and keys[0] in value:
        yield from _walk(value[keys[0]], keys[1:])


def _messages(item: Any) -> list[dict[str, str]] | None:
    """A record as messages, or None where it is none or does not end in an answer."""
    if not isinstance(item, dict):
        return None
    for key, (role_key, text_key) in _TURN_KEYS.items():
        if key in item:
            return _from_turns(item[key], role_key, text_key)
    texts = [item.get(key) or "" for key in ("instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts):
        return None
    question = "\n".join(text for text in texts[:2] if text.strip())
    if not question.strip() or not texts[2].strip():
        return None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": texts[2]}]


def _from_turns(turns: Any, role_key: str, text_key: str) -> list[dict[str, str]] | None:
    if not isinstance(turns, list):
        return None
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            return None
        role = turn.get(role_key)
        messages.append({"role": _ROLES.get(str(role), str(role)), "content": turn[text_key]})
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in spoken]
    answered = all(m["content"].strip() for m in spoken if m["role"] == "assistant")
    whole = roles == ["user", "assistant"] * (len(roles) // 2) and roles
    return messages if whole and answered else None


def _describe(item: Any) -> str:
    has = f"keys {sorted(item)}" if isinstance(item, dict) else f"a {type(item).__name__}"
    return (
        f"an instruction record without an answer: it has {has}; expected `instruction` and a "
        f"filled `output`, or `messages` that alternate user and assistant and end with an answer"
    )


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text) if not text.isascii() else False
