"""What `altiplano tokenizer` does once its arguments are parsed: train, merge, report.

The options are the keys of the config's `tokenizer` section and are checked by it; the work is the
tokenizer stage's. Knows files and messages, nothing of pieces.
"""

import itertools
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from altiplano.config.data import TextSource
from altiplano.config.schema import TokenizerSection
from altiplano.console import console
from altiplano.errors import AltiplanoError, ConfigError

_NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
"""`name=path`; a URL has a colon before any equals sign."""


def train(
    inputs: list[str], output: Path, base: Path | None, text_key: str, options: Mapping[str, Any]
) -> None:
    """Train a SentencePiece model, or learn merges on top of a byte-level base.

    Args:
        inputs: files, globs, URLs or dataset folders.
        output: directory to write.
        base: directory of a byte-level tokenizer that is to be extended at once.
        text_key: where the text of a record is.
        options: keys of the `tokenizer` section, and `seed`.
    """
    from altiplano.vocabulary.train import read_words, train_sentencepiece

    section, seed = _section(options), options["seed"]
    if base is not None:
        _require_bytelevel(base)
        _extend_bytelevel(base, output, section, inputs, text_key, seed)
        return
    _refuse_filters(section)
    with _written_beside(output) as folder:
        train_sentencepiece(
            _texts(inputs, text_key),
            vocab_size=options["vocab_size"],
            output=folder / "trained.model",
            model_type=section.model_type,
            character_coverage=section.character_coverage,
            normalization=section.normalization,
            split_digits=section.split_digits,
            max_piece_length=section.max_piece_length,
            words=read_words(Path(section.words)) if section.words else [],
            max_lines=section.max_lines,
            seed=seed,
        )
    console.print(f"wrote {output / 'trained.model'}")
    console.print(
        f"next: altiplano tokenizer merge --base BASE --add {output / 'trained.model'} --output DIR"
    )


def merge(
    base: Path, output: Path, texts: list[str], text_key: str, options: Mapping[str, Any]
) -> None:
    """Merge trained pieces into a base vocabulary and write a tokenizer directory.

    Args:
        base: tokenizer directory, or a SentencePiece `.model`.
        output: directory to write.
        texts: of the new language, to count pieces in and to measure the result on.
        text_key: where the text of a record is.
        options: keys of the `tokenizer` section.
    """
    from altiplano.stages.grow import Growth, grow_sentencepiece
    from altiplano.storage import sha256_of
    from altiplano.vocabulary.bytelevel.extend import is_bytelevel

    section = _section(options)
    if section.min_count and not texts:
        raise ConfigError(f"--min-count {section.min_count} counts pieces in texts: give --text")
    if base.is_dir() and is_bytelevel(base):
        _extend_bytelevel(base, output, section, texts, text_key, seed=0)
        return
    with _base_directory(base) as directory, _written_beside(output) as folder:
        counts = grow_sentencepiece(
            Growth(
                directory, folder, section, lambda: _texts(texts, text_key), lambda path: path, 0
            )
        )
        _say_counts(folder, counts)
        if texts:
            _say_gain(directory, folder, _texts(texts, text_key))
        elif section.scores == "reference":
            console.print(
                "[yellow]reference scores:[/] SentencePiece and the fast form differ; --text FILE "
                "counts on how many lines, --scores distinct makes them equal"
            )
    console.print(f"sha256 {sha256_of(output / 'tokenizer.model')}  {output / 'tokenizer.model'}")
    console.print(f"next: altiplano tokenizer report {base} {output} --text FILE")


def report(
    tokenizers: list[str],
    texts: list[str],
    text_key: str,
    max_bytes: int,
    json_file: Path | None,
    png_file: Path | None,
) -> None:
    """Compare vocabularies on the first `max_bytes` of texts; both by `[name=]path`."""
    import json

    from altiplano.vocabulary.load import Vocabulary
    from altiplano.vocabulary.proto import write_atomically
    from altiplano.vocabulary.report import report as measure
    from altiplano.vocabulary.report_view import plot_report, report_tables

    vocabularies = {name: Vocabulary(path) for name, path in _named(tokenizers).items()}
    samples = {
        name: _sample(path, text_key, max_bytes)
        for name, path in _named(texts, option="--text").items()
    }
    measured = measure(vocabularies, samples)
    for part in report_tables(measured):
        console.print(part)
    if json_file is not None:
        shown = json.dumps(measured.to_json(), indent=2, ensure_ascii=False)
        write_atomically(json_file, shown.encode())
        console.print(f"wrote {json_file}")
    if png_file is not None:
        plot_report(measured, png_file)
        console.print(f"wrote {png_file}")


def _section(options: Mapping[str, Any]) -> TokenizerSection:
    """The options as the config's section, which knows what is allowed."""
    from pydantic import ValidationError

    keys = {key: value for key, value in options.items() if key in TokenizerSection.model_fields}
    try:
        return TokenizerSection.model_validate(keys)
    except ValidationError as error:
        problems = [
            " ".join(
                [
                    *(f"--{str(key).replace('_', '-')}:" for key in item["loc"][:1]),
                    item["msg"].removeprefix("Value error, "),
                    *([f"(it is {item['input']!r})"] if item["loc"] else []),
                ]
            )
            for item in error.errors()
        ]
        raise ConfigError("\n".join(problems)) from None


def _refuse_filters(section: TokenizerSection) -> None:
    given = {
        "--keep": section.keep,
        "--drop": section.drop,
        "--min-count": section.min_count,
        "--pad-piece": section.pad_piece,
    }
    if found := [option for option, value in given.items() if value]:
        raise ConfigError(
            f"{found[0]} is for the merge of trained pieces into a base: give it to `tokenizer "
            f"merge`, or give --base with the directory of a byte-level tokenizer"
        )


def _require_bytelevel(base: Path) -> None:
    from altiplano.vocabulary.bytelevel.extend import is_bytelevel

    if not is_bytelevel(base):
        raise ConfigError(
            f"--base {base} is no directory of a byte-level BPE (Llama-3, Qwen), whose merges are "
            f"learned on top of the base's. For a SentencePiece base train without --base, then "
            f"use `altiplano tokenizer merge`"
        )


def _extend_bytelevel(
    base: Path,
    output: Path,
    section: TokenizerSection,
    texts: list[str],
    text_key: str,
    seed: int,
) -> None:
    from altiplano.stages.grow import Growth, grow_bytelevel

    with _written_beside(output) as folder:
        counts = grow_bytelevel(
            Growth(base, folder, section, lambda: _texts(texts, text_key), lambda path: path, seed)
        )
        _say_counts(folder, counts)
        _say_gain(base, folder, _texts(texts, text_key))
    console.print(f"wrote {output}")
    console.print(f"next: altiplano tokenizer report {base} {output} --text FILE")


def _say_counts(directory: Path, counts: Mapping[str, Any]) -> None:
    """The sizes as a sum, then every other count that is not zero."""
    from altiplano.vocabulary.load import Vocabulary

    old, new = counts["old_size"], Vocabulary(directory).size
    console.print(f"{old} + {new - old} new pieces = {new}")
    others = {
        key: value
        for key, value in counts.items()
        if isinstance(value, int) and value and key not in ("old_size", "new_size")
    }
    if others:
        shown = (f"{key.replace('_', ' ')} {value}" for key, value in others.items())
        console.print(", ".join(shown))


def _say_gain(base: Path, output: Path, texts: Iterable[str]) -> None:
    from altiplano.stages.grow import say_gain

    metrics = say_gain(base, output, texts)
    if "tokens_per_character_new" in metrics:
        console.print(
            f"tokens per character {metrics['tokens_per_character_old']:.3f} -> "
            f"{metrics['tokens_per_character_new']:.3f}"
        )


@contextmanager
def _base_directory(base: Path) -> Iterator[Path]:
    """The base as a directory: a lone `.model` is put into one for a moment."""
    if base.is_dir() or not base.exists():
        yield base
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(base, Path(folder) / "tokenizer.model")
        yield Path(folder)


def _named(words: Sequence[str], option: str = "TOKENIZERS") -> dict[str, str]:
    """`[name=]path` each, by name; the name of an unnamed path is its last part."""
    named: dict[str, str] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        name, path = match.groups() if match else (Path(word).name, word)
        if name in named:
            raise ConfigError(
                f"{option}: two are called {name} ({named[name]} and {path}); "
                f"give each a name, as in other={path}"
            )
        named[name] = path
    return named


def _texts(paths: Sequence[str], text_key: str) -> Iterator[str]:
    from altiplano.data.reading.sources import training_texts

    return training_texts([_source(path, text_key) for path in paths], lambda path: path)


def _source(path: str, text_key: str) -> TextSource:
    form = "dataset" if Path(path).is_dir() else "auto"
    return TextSource(path=path, language="any", text_key=text_key, format=form)


def _sample(path: str, text_key: str, max_bytes: int) -> str:
    """The beginning of a text of any form, at most `max_bytes` long in UTF-8."""
    from altiplano.data.reading.files import Problems
    from altiplano.data.reading.sources import plan_text, read_documents

    source = _source(path, text_key)
    chunks = plan_text(source, lambda path: path)
    documents = itertools.chain.from_iterable(
        read_documents(source, chunk, Problems("fail")) for chunk in chunks
    )
    taken: list[bytes] = []
    left = max_bytes
    for document in documents:
        taken.append(document.text.encode()[:left])
        left -= len(taken[-1])
        if left <= 0:
            break
    return b"\n".join(taken).decode("utf-8", "ignore")


@contextmanager
def _written_beside(final: Path) -> Iterator[Path]:
    """A directory that is renamed to its final place only if the block ends well."""
    if final.exists():
        raise AltiplanoError(f"{final} exists: give another --output, or delete it")
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
