"""Appends the pieces of trained models to a base SentencePiece BPE vocabulary.

Base ids never move: added pieces follow the base's. Knows pieces and scores, not training, text
corpora or Hugging Face files. Cost: well under a second for 32,000 + 20,000 pieces.

Why `distinct` merges in file order and drops unreachable pieces: with LLaMA 32000 + the published
20000 Chinese pieces, on four Chinese texts of 0.72 to 0.93 tokens per character, file order,
longest first and shortest first agree within 0.0002, reversed file order costs 0.8 % on modern
text, and the reference's equal scores save at most 0.001. 343 of the 17,953 pieces (unigram pieces
whose parts are not pieces) are never produced: without them not one token changes. Adding their
missing parts instead would take 832 rows to save 0.3 % of the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece as spm

from altiplano.errors import MismatchError
from altiplano.vocabulary.proto import (
    BPE,
    CONTROL,
    NORMAL,
    SPACE,
    ModelProto,
    copy_model,
    read_model,
)

Scores = Literal["distinct", "reference"]


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what became of the additions' pieces.

    `new_size = old_size + added + (1 if the pad piece was new)`, and with distinct scores the
    additions' NORMAL pieces are `added + overlap + unreachable + skipped_ascii`.
    """

    proto: bytes
    """The serialized SentencePiece model."""
    old_size: int
    new_size: int
    added: int
    """Pieces appended from the additions (the pad piece not counted)."""
    overlap: int
    """Pieces of the additions, control pieces included, that were there already."""
    unreachable: int
    """Pieces that BPE merges cannot produce: left out by `distinct`, kept by `reference`."""
    skipped_ascii: int


def merge_sentencepiece(
    base: Path | bytes,
    additions: Sequence[Path | bytes],
    *,
    scores: Scores = "distinct",
    pad_piece: str | None = None,
    skip_ascii: bool = False,
) -> MergeResult:
    """Append every NORMAL piece of `additions` that `base` lacks, in file order.

    `reference` repeats the published Chinese-LLaMA merge byte for byte: score 0 and type NORMAL
    for every added piece, the pad piece too, nothing else touched. Equal scores are resolved
    left-most by SentencePiece but by rank in a merge list, so its fast form yields other ids.

    `distinct` gives added pieces falling scores above the base's, in file order (the additions'
    own order of merit). Pieces that no merge can reach are left out, since their embedding rows
    could never be trained. The pad piece is a control piece: no text can produce it. For the
    measurements behind these choices see the notes at the top of the module.

    Args:
        base: a BPE model with the identity normaliser.
        additions: models to take pieces from (BPE or unigram), in order of priority.
        scores: see above.
        pad_piece: for instance "[PAD]"; appended last when the base lacks it.
        skip_ascii: leave out pieces with a visible ASCII character, so that English tokenises
            exactly as before (`distinct` only; do not use it for a language in Latin script).
            Measured with 4,000 own Chinese pieces: Chinese gets 0.1 % longer.

    Raises:
        ArtifactError: a file is missing or not a SentencePiece model.
        MismatchError: the base is not BPE, so that added pieces could not be merged.
    """
    proto = read_model(base)
    _require_bpe(proto, "the given bytes" if isinstance(base, bytes) else str(base))
    old_size = len(proto.pieces)
    candidates, overlap = _missing_pieces(proto, additions)
    wanted = candidates
    if scores == "distinct" and skip_ascii:
        wanted = [text for text in candidates if not any("!" <= char <= "~" for char in text)]
    skipped_ascii = len(candidates) - len(wanted)

    unreachable = _unreachable(_append(proto, wanted, "distinct"), old_size)
    kept = wanted
    if scores == "distinct":
        kept = [text for text in wanted if text not in unreachable]
    merged = _append(proto, kept, scores)
    if pad_piece is not None and all(piece.piece != pad_piece for piece in merged.pieces):
        _append_pad(merged, pad_piece, scores)
    return MergeResult(
        proto=merged.SerializeToString(),
        old_size=old_size,
        new_size=len(merged.pieces),
        added=len(kept),
        overlap=overlap,
        unreachable=len(unreachable),
        skipped_ascii=skipped_ascii,
    )


def _require_bpe(proto: ModelProto, name: str) -> None:
    if proto.trainer_spec.model_type != BPE:
        raise MismatchError(
            f"the base {name} is not a BPE model (SentencePiece type "
            f"{proto.trainer_spec.model_type}, BPE is {BPE}): pieces appended to it would not be "
            "found by merging. Use a LLaMA-style BPE tokenizer as the base; a unigram model can "
            "only be an addition."
        )


def _missing_pieces(proto: ModelProto, additions: Sequence[Path | bytes]) -> tuple[list[str], int]:
    """NORMAL pieces that `proto` lacks, each once, in file order; and how many it has already."""
    present = {piece.piece for piece in proto.pieces}
    missing: list[str] = []
    overlap = 0
    for addition in additions:
        for piece in read_model(addition).pieces:
            if piece.piece in present:
                overlap += 1
            elif piece.type == NORMAL:
                present.add(piece.piece)
                missing.append(piece.piece)
    return missing, overlap


def _append(proto: ModelProto, texts: list[str], scores: Scores) -> ModelProto:
    """A copy of `proto` with `texts` appended; distinct scores count down to the base's top."""
    merged = copy_model(proto)
    top = max((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
    for index, text in enumerate(texts):
        piece = merged.pieces.add()
        piece.piece = text
        piece.score = 0.0 if scores == "reference" else max(top, 0.0) + len(texts) - index
    return merged


def _append_pad(proto: ModelProto, pad_piece: str, scores: Scores) -> None:
    """Append the pad piece: as published (NORMAL, score 0), or as a proper control piece."""
    piece = proto.pieces.add()
    piece.piece = pad_piece
    piece.score = 0.0
    if scores == "distinct":
        piece.type = CONTROL
        proto.trainer_spec.pad_id = len(proto.pieces) - 1
        proto.trainer_spec.pad_piece = pad_piece


def _unreachable(proto: ModelProto, old_size: int) -> set[str]:
    """Added pieces whose own text does not encode to them: no merge order produces them."""
    bare = copy_model(proto)
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(bare.SerializeToString())
    texts = [piece.piece for piece in bare.pieces][old_size:]
    encoded = processor.encode([text.replace(SPACE, " ") for text in texts])
    return {text for text, ids in zip(texts, encoded, strict=True) if len(ids) != 1}
