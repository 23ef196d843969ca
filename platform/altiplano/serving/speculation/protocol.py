"""What an engine and a draft replica say to each other, as msgpack over ZeroMQ (DEALER, ROUTER).

One connection: `Hello`, answered by `Welcome` or `Refused`; then an `Ask` per engine step, answered
by an `Answer` and, with `overlap`, by an `Ahead`. Token ids only, no probabilities: greedy guesses
verified by the target are exact for any draft. Sequences are named by what they hold, so nothing
has to be told when a request joins, moves or ends. Knows neither sockets nor models. Encoding 64
rows takes tens of microseconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

VERSION = 1
"""Both sides must have the same."""


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """The engine, on every new connection."""

    version: int
    vocab_digest: str
    """`vocab_digest` of the target."""
    vocab_size: int
    """Rows of the target's head."""


class Welcome(msgspec.Struct, array_like=True, tag="welcome"):
    """The draft fits."""

    version: int
    vocab_digest: str
    vocab_size: int
    max_tokens: int
    """Longest sequence the draft takes."""


class Refused(msgspec.Struct, array_like=True, tag="refused"):
    """The draft does not fit; asking again will not help."""

    reason: str
    """Both values, for a person."""


class Row(msgspec.Struct, array_like=True):
    """One sequence to continue."""

    prev: int
    """`digest` of the sequence as it was at the last ask; 0 where `base_len` is 0."""
    base_len: int
    """Its length then, in tokens; 0: `tokens` is the whole sequence."""
    tokens: list[int]
    """What came since."""
    k: int
    """Tokens wanted."""


class Ask(msgspec.Struct, array_like=True, tag="ask"):
    """Every row of one engine step."""

    step: int
    """Counts up; the answer carries it, and answers of earlier steps are dropped."""
    rows: list[Row]
    overlap: bool
    """Whether an `Ahead` is wanted too."""


class Guess(msgspec.Struct, array_like=True):
    """The draft's continuation of one row."""

    tokens: list[int]
    """At most `k`; fewer where its context ends."""
    missing: bool = False
    """The draft does not hold `prev`: send the whole sequence."""


class Answer(msgspec.Struct, array_like=True, tag="answer"):
    """One guess per row of the ask, in its order."""

    step: int
    rows: list[Guess]


class AheadGuess(msgspec.Struct, array_like=True):
    """What follows if the target accepts all proposed tokens and then makes `guess` itself."""

    guess: int
    """-1 where the draft has none."""
    tokens: list[int]
    """The next proposals then."""


class Ahead(msgspec.Struct, array_like=True, tag="ahead"):
    """Sent after the answer of the same step, one per row in its order."""

    step: int
    rows: list[AheadGuess]


FromEngine = Hello | Ask
FromDraft = Welcome | Refused | Answer | Ahead
Message = TypeVar("Message", bound=msgspec.Struct)

_to_bytes = msgspec.msgpack.Encoder()
_from_engine = msgspec.msgpack.Decoder(FromEngine)
_from_draft = msgspec.msgpack.Decoder(FromDraft)


def encode(message: FromEngine | FromDraft) -> bytes:
    """Msgpack of a message; its tag says which."""
    return _to_bytes.encode(message)


def decode_from_engine(data: bytes) -> FromEngine:
    """The message of an engine.

    Raises:
        msgspec.DecodeError: `data` is no such message (`ValidationError` is one).
    """
    return _from_engine.decode(data)


def decode_from_draft(data: bytes) -> FromDraft:
    """The message of a draft replica.

    Raises:
        msgspec.DecodeError: `data` is no such message (`ValidationError` is one).
    """
    return _from_draft.decode(data)


def digest(tokens: Sequence[int] | npt.NDArray[np.int32]) -> int:
    """Name of a sequence: xxh3_64 of its ids as little-endian int32. About 1 us per 2000 ids.

    An int32 array is read where it lies; a list is copied into one first.
    """
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype="<i4").data)


def vocab_digest(model_dir: Path | str) -> str:
    """Fingerprint of a model directory's tokenizer; equal exactly where ids mean the same pieces.

    Reads the tokenizer's files: once per process.

    Raises:
        ArtifactError: there is no tokenizer.
    """
    from altiplano.vocabulary.load import tokenizer_fingerprint

    return tokenizer_fingerprint(Path(model_dir))
