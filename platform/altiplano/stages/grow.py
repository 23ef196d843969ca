"""The tokenizer stage's work: new pieces for a base vocabulary of either family, and the proof.

Calls the vocabulary room in order (train, merge, prune) and counts. Knows settings and texts, not
artifacts. Costs what training costs, one encoding of the texts per pruning round, and one of
`_SAMPLE_CHARACTERS` of every side.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano.config.schema import TokenizerSection
from altiplano.console import console
from altiplano.errors import ConfigError

Texts = Callable[[], Iterator[str]]
"""Starts reading the training texts of the new language anew."""

_SAMPLE_CHARACTERS = 1_000_000
"""Text on which the old and the new vocabulary are compared."""


@dataclass(frozen=True)
class Growth:
    """What a new vocabulary is made from."""

    base: Path
    """Directory of the base's tokenizer."""
    output: Path
    """Existing directory that gets the new one."""
    section: TokenizerSection
    """What to train, keep and leave out."""
    texts: Texts
    """Training texts of the new language."""
    resolve: Callable[[str], str]
    """From config paths to absolute ones."""
    seed: int
    """Of the sample."""

    def words(self) -> list[str]:
        """Words that must become pieces."""
        return _words(self.section, self.resolve)


def grow_sentencepiece(growth: Growth) -> dict[str, Any]:
    """Train an addition, merge it with those that are given, prune; write a tokenizer directory.

    Returns:
        counts of pieces.
    """
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.load import Vocabulary
    from altiplano.vocabulary.merge import merge_sentencepiece

    section, words = growth.section, growth.words()
    additions = [Path(growth.resolve(path)) for path in section.add]
    if section.vocab_size is not None:
        additions.insert(0, _trained_addition(growth, words))
    merged = merge_sentencepiece(
        growth.base / "tokenizer.model",
        additions,
        scores=section.scores,
        pad_piece=section.pad_piece,
        keep=section.kept_pieces,
        drop=section.drop,
        words=words,
    )
    if merged.split_words:
        shown = ", ".join(sorted(merged.split_words)[:8])
        console.log(f"[yellow]{len(merged.split_words)} words stay split in some texts:[/] {shown}")
    model, counts = merged.proto, merged.counts()
    if section.min_count:
        model, pruned = _pruned(growth, model, merged.old_size, words)
        counts |= pruned
    template = Vocabulary(growth.base).chat_template
    save_tokenizer(model, growth.output, pad_piece=section.pad_piece, chat_template=template)
    return {**counts, "scores": section.scores}


def _trained_addition(growth: Growth, words: list[str]) -> Path:
    from altiplano.vocabulary.train import train_sentencepiece

    section, added = growth.section, growth.output / "added.model"
    assert section.vocab_size is not None
    train_sentencepiece(
        growth.texts(),
        vocab_size=section.vocab_size,
        output=added,
        model_type=section.model_type,
        character_coverage=section.character_coverage,
        normalization=section.normalization,
        split_digits=section.split_digits,
        max_piece_length=section.max_piece_length,
        words=words,
        max_lines=section.max_lines,
        seed=growth.seed,
    )
    return added


def _pruned(
    growth: Growth, model: Any, old_size: int, words: list[str]
) -> tuple[Any, dict[str, int]]:
    from altiplano.vocabulary.prune import prune_sentencepiece

    pruned = prune_sentencepiece(
        model,
        growth.texts(),
        old_size=old_size,
        min_count=growth.section.min_count,
        protected=words,
        max_lines=growth.section.max_lines,
        seed=growth.seed,
    )
    return pruned.proto, pruned.counts()


def grow_bytelevel(growth: Growth) -> dict[str, Any]:
    """Learn merges on top of a byte-level BPE's own.

    Raises:
        ConfigError: a setting that only SentencePiece has.
    """
    from altiplano.vocabulary.bytelevel.extend import extend_bytelevel

    section = growth.section
    _refuse_sentencepiece_settings(section)
    result = extend_bytelevel(
        growth.base,
        growth.output,
        texts=growth.texts() if section.vocab_size is not None or section.min_count else None,
        new_pieces=section.vocab_size,
        additions=[Path(growth.resolve(path)) for path in section.add],
        keep=section.kept_pieces,
        drop=section.drop,
        min_count=section.min_count,
        words=growth.words(),
        character_coverage=section.character_coverage,
        max_piece_length=section.max_piece_length,
        max_lines=section.max_lines,
        seed=growth.seed,
        pad_piece=section.pad_piece,
    )
    return result.counts()


def say_gain(base: Path, output: Path, texts: Iterable[str]) -> dict[str, Any]:
    """Compare both vocabularies on a sample of the new language.

    Args:
        base, output: directories of the old and the new tokenizer.
        texts: of the new language.

    Returns:
        tokens per character before and after, and, where SentencePiece and the fast form of the new
        one disagree, on how many lines; nothing where there is no text.
    """
    from altiplano.vocabulary.agree import compare_forms
    from altiplano.vocabulary.load import Vocabulary

    lines = list(_sample(texts))
    if not lines:
        return {}
    old, new = Vocabulary(base), Vocabulary(output)
    characters = sum(map(len, lines))
    before, after = (int(v.encode_flat(lines)[1].sum()) / characters for v in (old, new))
    metrics: dict[str, Any] = {
        "tokens_per_character_old": round(before, 4),
        "tokens_per_character_new": round(after, 4),
    }
    if new.family == "sentencepiece" and new.form == "fast":
        forms = compare_forms(output, lines)
        metrics |= {"form_lines": forms.lines, "form_lines_differ": forms.differing}
        console.log(
            f"[yellow]reference scores:[/] SentencePiece and the fast form differ on "
            f"{forms.differing:,} of {forms.lines:,} lines; training and serving both use the "
            f"fast form. `tokenizer.scores: distinct` makes them equal"
        )
    return metrics


def say_unchanged(
    base: Path, output: Path, texts: Iterable[str], is_new: Callable[[str], bool]
) -> dict[str, Any]:
    """Count the lines of other languages that are not tokenised as before.

    Args:
        base, output: directories of the old and the new tokenizer.
        texts: of other languages.
        is_new: whether new pieces may hold a character; lines without one should not change.

    Returns:
        lines, how many of them changed, and how many of those hold no new character; nothing where
        there is no text.
    """
    from altiplano.vocabulary.load import Vocabulary

    lines = list(_sample(texts))
    if not lines:
        return {}
    old, new = Vocabulary(base).encode_batch(lines), Vocabulary(output).encode_batch(lines)
    changed = [line for line, before, after in zip(lines, old, new, strict=True) if before != after]
    unduly = sum(not any(map(is_new, set(line))) for line in changed)
    told = f"{len(lines) - len(changed):,} of {len(lines):,} lines tokenise exactly as before"
    if changed:
        told += f"; {len(changed) - unduly:,} hold characters of new pieces"
    if unduly:
        told += f"; [yellow]{unduly:,} changed although they hold none[/]"
    console.log(f"other languages: {told}")
    return {
        "other_lines": len(lines),
        "other_lines_changed": len(changed),
        "other_lines_changed_unduly": unduly,
    }


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """The first lines of texts, up to `_SAMPLE_CHARACTERS`."""
    held = 0
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                yield line
                held += len(line)
        if held >= _SAMPLE_CHARACTERS:
            return


def _words(section: TokenizerSection, resolve: Callable[[str], str]) -> list[str]:
    from altiplano.vocabulary.train import read_words

    return read_words(Path(resolve(section.words))) if section.words else []


def _refuse_sentencepiece_settings(section: TokenizerSection) -> None:
    given = {
        "model_type: unigram": section.model_type != "bpe",
        "scores: reference": section.scores != "distinct",
        f"normalization: {section.normalization}": section.normalization != "identity",
    }
    if found := [name for name, holds in given.items() if holds]:
        raise ConfigError(
            f"the base has a byte-level BPE vocabulary (Llama-3, Qwen): `tokenizer.{found[0]}` is "
            f"for SentencePiece bases; leave it out"
        )
