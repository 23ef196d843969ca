"""How large a run's model and vocabulary are, before either is made.

Reads at most the base model's config.json and the sizes of ready-made `.model` files. What cannot
be known becomes a note.
"""

from dataclasses import dataclass
from pathlib import Path

from altiplano.config.loader import Project
from altiplano.errors import ConfigError
from altiplano.model.counts import LlamaShape, require_shape


@dataclass(frozen=True)
class Sizes:
    """Shape and vocabulary of a run; None where it is not known."""

    shape: LlamaShape | None
    vocab_old: int | None
    vocab_new: int | None
    """At most so many pieces, where `exact` is false."""
    exact: bool


def find_sizes(project: Project, notes: list[str]) -> Sizes:
    """What the config and the files it names tell.

    Args:
        project: the run.
        notes: what is not known, or not exact, is added.

    Raises:
        ConfigError: the vocabulary would be smaller than the base's.
        ModelError: the base on disk is not of `base_model.shape`.
    """
    base = _base(project, notes)
    section = project.config.tokenizer
    old = base[1] if base else None
    shape = base[0] if base else None
    if section.pieces is not None:
        if old is not None and section.pieces < old:
            raise ConfigError(
                f"`tokenizer.pieces` is {section.pieces}, the base alone has {old}: pieces are "
                f"only added; correct it"
            )
        return Sizes(shape, old, section.pieces, exact=True)
    if section.unchanged:
        return Sizes(shape, old, old, exact=True)
    added = _pieces_offered(project, notes)
    if old is None or added is None:
        return Sizes(shape, old, None, exact=False)
    notes.append(
        f"the new vocabulary holds at most {old + added:,} pieces ({old:,} + {added:,}); "
        f"pieces the base already has are dropped when it is made"
    )
    return Sizes(shape, old, old + added, exact=False)


def _base(project: Project, notes: list[str]) -> tuple[LlamaShape, int] | None:
    """Shape and vocabulary size of the base model."""
    section = project.config.base_model
    if section.scratch is not None:
        scratch = section.scratch
        return LlamaShape.from_config(scratch.shape.model_dump()), scratch.tokenizer.vocab_size
    assert section.path is not None, "the config's validator wants one of the two"
    published = section.shape.model_dump() if section.shape else None
    directory = Path(project.resolve(section.path))
    if (directory / "config.json").is_file():
        from altiplano.model.load import read_config

        found = read_config(directory)
        require_shape(published, found, str(directory))
    elif published is not None:
        found = published
        notes.append(f"base {section.path} is not on disk: counted by `base_model.shape`")
    else:
        notes.append(
            f"base {section.path} is not on disk: counts are not available; "
            f"`base_model.shape` would give them"
        )
        return None
    return LlamaShape.from_config(found), int(found["vocab_size"])


def _pieces_offered(project: Project, notes: list[str]) -> int | None:
    """Most pieces that the tokenizer section can add; None where a `.model` is not there."""
    section = project.config.tokenizer
    added = (section.vocab_size or 0) + (1 if section.pad_piece else 0)
    if section.words is not None:
        notes.append(
            f"{section.words}: domain words, and pieces they need on the way, are not counted"
        )
    for path in section.add:
        file = Path(project.resolve(path))
        if not file.is_file():
            notes.append(
                f"{path} is not on disk: the new vocabulary's size is not known; "
                f"`tokenizer.pieces` would give it"
            )
            return None
        from altiplano.vocabulary.load import Vocabulary

        added += Vocabulary(file).size
    return added
