"""How far the two forms of one tokenizer directory differ: `tokenizer.model`, `tokenizer.json`.

Training may use the one and serving the other, so this is the number that says whether that is the
same thing. Knows both file formats, nothing of stages. Cost: one encoding of the texts by each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from altiplano.errors import ArtifactError
from altiplano.vocabulary.fastform import FAST_FILE
from altiplano.vocabulary.proto import MODEL_FILE, open_processor, read_model


@dataclass(frozen=True)
class FormsReport:
    """Ids of the same lines by both forms, without BOS and EOS."""

    lines: int
    """Lines with text that were compared."""
    differing: int
    """Lines whose ids differ."""
    sentencepiece_tokens: int
    """Tokens of all lines in SentencePiece's form."""
    fast_tokens: int
    """Tokens of all lines in the fast form."""


def compare_forms(directory: Path, texts: Iterable[str]) -> FormsReport:
    """Encode every line of `texts` by SentencePiece and by the fast form; count differences.

    Control pieces written in a text are text for both, as in training.

    Raises:
        ArtifactError: the directory lacks one of the forms, or a file is not usable.
    """
    from tokenizers import Tokenizer

    for name in (MODEL_FILE, FAST_FILE):
        if not (directory / name).is_file():
            raise ArtifactError(
                f"cannot compare the forms of the tokenizer {directory}: it has no {name}. Both "
                f"{MODEL_FILE} and {FAST_FILE} are needed; the tokenizer stage writes them."
            )
    slow = open_processor(read_model(directory))
    fast = Tokenizer.from_file(str(directory / FAST_FILE))
    fast.encode_special_tokens = True
    lines = [line for text in texts for line in text.splitlines() if line]
    left = slow.encode(lines)
    right = [encoding.ids for encoding in fast.encode_batch_fast(lines, add_special_tokens=False)]
    return FormsReport(
        lines=len(lines),
        differing=sum(ids != others for ids, others in zip(left, right, strict=True)),
        sentencepiece_tokens=sum(map(len, left)),
        fast_tokens=sum(map(len, right)),
    )
