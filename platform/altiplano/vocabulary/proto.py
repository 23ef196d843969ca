"""SentencePiece `.model` files: reading, writing and the facts the other modules ask of them.

Knows the file format (a protocol buffer), not algorithms. Cost: 32,000 pieces parse in 10 ms.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from altiplano.errors import ArtifactError

MODEL_FILE = "tokenizer.model"
"""Name of the SentencePiece model inside a tokenizer directory."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Piece types, numbered as in SentencePiece's `ModelProto.SentencePiece.Type`."""
BPE = 2
"""`TrainerSpec.ModelType` of a BPE model (unigram is 1)."""
SPACE = "\u2581"
"""The mark `▁` that SentencePiece writes for a space."""

ModelProto = Any
"""`sentencepiece_model_pb2.ModelProto`; the generated module carries no types."""


def read_model(source: Path | bytes) -> ModelProto:
    """Parse a `.model` file, the `tokenizer.model` of a directory, or a model's bytes.

    Raises:
        ArtifactError: the file is missing or is not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not isinstance(source, bytes) and source.is_dir():
        source = source / MODEL_FILE
    name = "the given bytes" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read the SentencePiece model {name}: {error.strerror or error}. "
            "Give the path of a .model file."
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ArtifactError(
            f"{name} is not a SentencePiece model, or it was cut short ({len(data)} bytes). "
            "Download it again (a Git LFS pointer is a common cause) or train it again."
        ) from error
    if not proto.pieces:
        raise ArtifactError(f"{name} holds no pieces: it is not a SentencePiece model.")
    return proto


def copy_model(proto: ModelProto) -> ModelProto:
    """An independent copy that may be changed."""
    duplicate = type(proto)()
    duplicate.CopyFrom(proto)
    return duplicate


def open_processor(proto: ModelProto) -> Any:
    """A `SentencePieceProcessor` of the model."""
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def piece_scores(proto: ModelProto) -> dict[str, float]:
    """Scores of the pieces that BPE may merge to."""
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}


def tied_pieces(proto: ModelProto) -> int:
    """Number of multi-character NORMAL pieces that share their score with another one.

    Zero means that a merge list can give SentencePiece's ids. Pieces made only of spaces are left
    out: LLaMA gives all of them the score -1e9, and there both orders yield the same pieces.
    """
    scores = Counter(
        piece.score
        for piece in proto.pieces
        if piece.type == NORMAL and len(piece.piece) > 1 and piece.piece.strip(SPACE)
    )
    return sum(count for count in scores.values() if count > 1)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path` and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
