"""The tokenizer stage's work: new pieces for a base vocabulary of either family, and the proof.

Calls the vocabulary room in order (train, merge, prune) and counts. Knows settings and texts, not
artifacts. Costs what training costs, one encoding of the texts per pruning round, and one of
`_SAMPLE_CHARACTERS` of every side.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from altiplano.config.schema import TokenizerSection
from altiplano.console import console
from altiplano.errors import ConfigError

Texts = Callable[[], Iterator[str]]
"""Starts reading the training texts of the new language anew."""

_SAMPLE_CHARACTERS = 1_000_000
"""Text on which the old and the new vocabulary are compared."""


def grow_sentencepiece(
    base: Path,
    output: Path,
    section: TokenizerSection,
    texts: Texts,
    resolve: Callable[[str], str],
    seed: int,
) -> dict[str, Any]:
    """Train an addition, merge it with those that are given, prune; write a tokenizer directory.

    Args:
        base: directory of the base's tokenizer.
        output: existing directory.
        section: what to train, keep and leave out.
        texts: training texts of the new language.
        resolve: from config paths to absolute ones.
        seed: of the sample.

    Returns:
        counts of pieces.
    """
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.load import Vocabulary
    from altiplano.vocabulary.merge import merge_sentencepiece
    from altiplano.vocabulary.prune import prune_sentencepiece
    from altiplano.vocabulary.train import train_sentencepiece

    words = _words(section, resolve)
    additions = [Path(resolve(path)) for path in section.add]
    if section.vocab_size is not None:
        added = output / "added.model"
        train_sentencepiece(
            texts(),
            vocab_size=section.vocab_size,
            output=added,
            model_type=section.model_type,
            character_coverage=section.character_coverage,
            normalization=section.normalization,
            split_digits=section.split_digits,
            max_piece_length=section.max_piece_length,
            words=words,
            max_lines=section.max_lines,
            seed=seed,
        )
        additions.insert(0, added)
    merged = merge_sentencepiece(
        base / "tokenizer.model",
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
        pruned = prune_sentencepiece(
            model,
            texts(),
            old_size=merged.old_size,
            min_count=section.min_count,
            protected=words,
            max_lines=section.max_lines,
            seed=seed,
        )
        model = pruned.proto
        counts |= pruned.counts()
    template = Vocabulary(base).chat_template
    save_tokenizer(model, output, pad_piece=section.pad_piece, chat_template=template)
    return {**counts, "scores": section.scores}


def grow_bytelevel(
    base: Path,
    output: Path,
    section: TokenizerSection,
    texts: Texts,
    resolve: Callable[[str], str],
    seed: int,
) -> dict[str, Any]:
    """Learn merges on top of a byte-level BPE's own; arguments as of `grow_sentencepiece`.

    Raises:
        ConfigError: a setting that only SentencePiece has.
    """
    from altiplano.vocabulary.bytelevel.extend import extend_bytelevel

    _refuse_sentencepiece_settings(section)
    result = extend_bytelevel(
        base,
        output,
        texts=texts() if section.vocab_size is not None or section.min_count else None,
        new_pieces=section.vocab_size,
        additions=[Path(resolve(path)) for path in section.add],
        keep=section.kept_pieces,
        drop=section.drop,
        min_count=section.min_count,
        words=_words(section, resolve),
        character_coverage=section.character_coverage,
        max_piece_length=section.max_piece_length,
        max_lines=section.max_lines,
        seed=seed,
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
