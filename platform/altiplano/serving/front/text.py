"""Text to ids and back on the HTTP side: prompts, chat templates, answers piece by piece, stops.

Prompts become the ids that training saw (`tokenizer.json`, its template rendered and encoded as
one). Answers are put together from a table of every token's bytes, which is exact for the two kinds
of tokenizer that Llama models have (SentencePiece with byte pieces, BPE over bytes) and costs a
fraction of decoding anew. Knows no requests. Opening costs 0.1 s for 50,000 pieces.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from altiplano.errors import ServeError
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.template import Template
from altiplano.vocabulary.convert import fast_tokenizer, special_pieces
from altiplano.vocabulary.fastform import (
    CONFIG_FILE,
    FAST_FILE,
    SPECIAL_NAMES,
    open_fast,
    read_json,
    read_template,
    token_text,
)
from altiplano.vocabulary.proto import MODEL_FILE, SPACE, read_model

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, so also the most tokens that one may begin before an answer."""


@dataclass(frozen=True)
class _Table:
    """What each token adds to a text, by id."""

    bytes_: list[bytes]
    texts: list[str | None]
    """The same where it is whole characters."""


class TextCodec:
    """The tokenizer and the chat template of a model directory.

    Raises:
        ArtifactError: no usable tokenizer.
        ServeError: one whose decoder is not of the kinds above.
    """

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / CONFIG_FILE)
        self._content = _tokenizer_content(directory)
        self._fast: Tokenizer = open_fast(self._content)
        # Unlike in training, control pieces act: templates and raw prompts are written with them.
        self._fast.encode_special_tokens = False
        self._special = {
            token["id"]: token["content"]
            for token in self._content.get("added_tokens", [])
            if token["special"]
        }
        self._strips, self._raw = _decoding(self._content, self._fast, directory)
        source = read_template(directory, config)
        names = {name: text for name in SPECIAL_NAMES if (text := token_text(config, name))}
        self.template = Template(source, names) if source is not None else None
        """The chat template; None for a base model."""
        pieces = sorted(filter(None, self._special.values()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, pieces))) if pieces else None

    @property
    def size(self) -> int:
        """Number of tokens; ids run from 0 to `size - 1`."""
        return len(self._raw)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of a prompt; control pieces written in it act.

        Raises:
            ApiError: 400, the text holds a lone surrogate.
        """
        try:
            ids: list[int] = self._fast.encode(text, add_special_tokens=add_bos).ids
        except UnicodeEncodeError:
            raise ApiError(
                400, "the text holds half a surrogate pair (\\ud800 to \\udfff): it is not Unicode"
            ) from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids from the beginning of a text; special tokens are left out."""
        detokenizer = Detokenizer(self, [])
        return detokenizer.feed(ids) + detokenizer.finish()

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """A conversation as the template writes it.

        A space replaces control pieces in what people wrote, or they would act (as in training).

        Args:
            messages: `role`, `content` (text) and whatever else the template reads.
            variables: further names for the template: `add_generation_prompt`, `tools`.

        Raises:
            ApiError: 400, there is no template, or it refuses this conversation.
        """
        if self.template is None:
            raise ApiError(
                400,
                "this model has no chat template (it is a base model): use /v1/completions",
                code="no_chat_template",
                param="messages",
            )
        cleaned = [{**message, "content": self.clean(message["content"])} for message in messages]
        return self.template.render(cleaned, **variables)

    def text_of(self, id_: int) -> tuple[str, bytes]:
        """A token alone, special ones by name: its text (half a character as U+FFFD), its bytes."""
        special = self._special.get(id_)
        if special is not None:
            return special, special.encode()
        data = self._raw[id_] if 0 <= id_ < len(self._raw) else b""
        return data.decode(errors="replace"), data

    def is_special(self, id_: int) -> bool:
        """Whether a token is a control piece, which is no part of a text."""
        return id_ in self._special

    def starts_text(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to this prompt is the beginning of a text: nothing but special ids."""
        return all(id_ in self._special for id_ in prompt)

    @property
    def strips(self) -> bool:
        """Whether a text's first space is the tokenizer's, not the writer's."""
        return self._strips

    @cached_property
    def table(self) -> _Table:
        """What tokens add to a text; special ones nothing."""
        return _table([b"" if id_ in self._special else raw for id_, raw in enumerate(self._raw)])

    @cached_property
    def table_with_special(self) -> _Table:
        """What tokens add to a text; special ones their names."""
        return _table(
            [self._special.get(id_, "").encode() or raw for id_, raw in enumerate(self._raw)]
        )

    def clean(self, content: str) -> str:
        """What people wrote, a space in place of each control piece, which would act else."""
        return self._control.sub(" ", content) if self._control is not None else content


class Detokenizer:
    """The text of one answer, as its tokens come; half a character waits for its other half.

    Args:
        prompt: what the answer goes on from: it decides whether a first space is text.
        special: spell special tokens instead of leaving them out.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int], *, special: bool = False) -> None:
        self._table = codec.table_with_special if special else codec.table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = False
        self._strip = codec.strips and codec.starts_text(prompt)
        # A prompt of ids may end within a character; its rest is not an error of the answer's.
        if prompt and not self._strip:
            self._push(prompt[-_LONGEST_CHARACTER:])

    def feed(self, ids: Sequence[int]) -> str:
        """Text that these tokens complete."""
        text = self._push(ids)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """What still waits, as U+FFFD: call it where the text is known to end there."""
        self._waiting = False
        return self._decoder.decode(b"", True)

    def _push(self, ids: Sequence[int]) -> str:
        texts, size = self._table.texts, len(self._table.texts)
        parts = []
        for id_ in ids:
            if id_ >= size:
                continue
            text = texts[id_]
            if text is None or self._waiting:
                text = self._decoder.decode(self._table.bytes_[id_])
                self._waiting = bool(self._decoder.getstate()[0])
            parts.append(text)
        return parts[0] if len(parts) == 1 else "".join(parts)


@dataclass
class StopScan:
    """Finds stop strings in a text that comes in pieces, and lets nothing of them out."""

    stops: Sequence[str]
    include: bool = False
    """Let the stop string itself out."""
    found: str | None = None
    """The one that was found; nothing comes out any more."""
    _held: str = field(default="", repr=False)

    def feed(self, piece: str) -> str:
        """Text that is sure to come before any stop string."""
        if not self.stops or self.found is not None:
            return "" if self.found is not None else piece
        text = self._held + piece
        hits = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            # The first to be complete ends the answer, as if it had come letter by letter; of two
            # that end there the longer.
            at, self.found = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: at + len(self.found)] if self.include else text[:at]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, where the text ends without a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends in."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _tokenizer_content(directory: Path) -> dict[str, Any]:
    """The directory's tokenizer.json, made from its SentencePiece model where it has none."""
    content = read_json(directory / FAST_FILE)
    if not content and (directory / MODEL_FILE).is_file():
        proto = read_model(directory / MODEL_FILE)
        content = fast_tokenizer(proto, set(special_pieces(proto).values()))
    if not content:
        raise ServeError(f"{directory} has no tokenizer ({FAST_FILE} or {MODEL_FILE})")
    return content


def _decoding(
    content: dict[str, Any], fast: Tokenizer, directory: Path
) -> tuple[bool, list[bytes]]:
    """Whether a text loses its first space, and each token's bytes, as the decoder has them."""
    decoder = content.get("decoder") or {}
    steps = {step["type"]: step for step in [decoder, *decoder.get("decoders", [])] if step}
    tokens = [fast.id_to_token(id_) or "" for id_ in range(fast.get_vocab_size())]
    added = {token["content"] for token in content.get("added_tokens", [])}
    if "ByteLevel" in steps:
        letters = {letter: byte for byte, letter in _byte_letters().items()}
        return False, [_from_letters(token, added, letters) for token in tokens]
    if "ByteFallback" in steps or "Metaspace" in steps:
        metaspace = steps.get("Metaspace")
        strips = "Strip" in steps or bool(
            metaspace and metaspace.get("prepend_scheme", "always") != "never"
        )
        return strips, [_from_piece(token) for token in tokens]
    raise ServeError(
        f"the tokenizer of {directory} decodes by {sorted(steps) or 'nothing'}; served are those "
        f"of Llama models: ByteFallback or Metaspace (SentencePiece), or ByteLevel"
    )


def _from_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _from_letters(token: str, added: set[str], letters: dict[str, int]) -> bytes:
    if token in added or any(letter not in letters for letter in token):
        return token.encode()
    return bytes(letters[letter] for letter in token)


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in BPE over bytes (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(0x100 + place) for place, byte in enumerate(hidden)
    }


def _table(data: list[bytes]) -> _Table:
    return _Table(data, [_whole(each) for each in data])


def _whole(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
