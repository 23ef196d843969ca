"""The command line of `altiplano tokenizer`: every option of the config's `tokenizer` section.

Parses and calls; `commands_tokenizer` checks and works.
"""

from pathlib import Path
from typing import Annotated

import typer

tokenizer_app = typer.Typer(help="Train, merge and compare vocabularies.", no_args_is_help=True)

TextKey = Annotated[str, typer.Option(help="Dotted path to the text of a record, or a column.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="New pieces to keep: non_ascii (the default), cjk or all.", show_default=False
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(help="Leave out new pieces with digits or latin; repeatable.", show_default=False),
]
MinCount = Annotated[int, typer.Option(help="Leave out new pieces rarer than this in the texts.")]
Words = Annotated[
    Path | None,
    typer.Option(help="File of domain terms, one per line, each to be one piece."),
]
PadPiece = Annotated[str | None, typer.Option(help="Append a padding piece.", show_default=False)]


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[
        list[str], typer.Option("--input", help="File, glob, URL or dataset folder; repeatable.")
    ],
    vocab_size: Annotated[int, typer.Option(help="Pieces to train.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Byte-level tokenizer (Llama-3, Qwen) to extend at once."),
    ] = None,
    text_key: TextKey = "text",
    model_type: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
    character_coverage: Annotated[float, typer.Option(help="Characters covered.")] = 0.9995,
    normalization: Annotated[
        str, typer.Option(help="Of the training text: identity, nfkc or nmt_nfkc.")
    ] = "identity",
    split_digits: Annotated[bool, typer.Option(help="Each digit is a piece of its own.")] = True,
    max_piece_length: Annotated[int, typer.Option(help="Longest new piece in characters.")] = 16,
    words: Words = None,
    max_lines: Annotated[int, typer.Option(help="Of more lines a sample is taken.")] = 2_000_000,
    seed: Annotated[int, typer.Option(help="Of that sample.")] = 0,
    keep: Keep = None,
    drop: Drop = None,
    min_count: MinCount = 0,
    pad_piece: PadPiece = None,
) -> None:
    """Train a SentencePiece model on text; with --base, extend a byte-level tokenizer.

    --keep, --drop, --min-count and --pad-piece go with --base; else give them to `merge`.
    """
    from altiplano import commands_tokenizer

    options = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "normalization": normalization,
        "split_digits": split_digits,
        "max_piece_length": max_piece_length,
        "words": words and str(words),
        "max_lines": max_lines,
        "seed": seed,
        "keep": keep,
        "drop": drop or [],
        "min_count": min_count,
        "pad_piece": pad_piece,
    }
    commands_tokenizer.train(inputs, output, base, text_key, options)


@tokenizer_app.command("merge")
def tokenizer_merge(
    base: Annotated[Path, typer.Option(help="Tokenizer directory or .model file.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    add: Annotated[
        list[str] | None,
        typer.Option(help="Trained .model to add; repeatable.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to count pieces in and to measure on.", show_default=False),
    ] = None,
    text_key: TextKey = "text",
    scores: Annotated[str, typer.Option(help="distinct or reference.")] = "distinct",
    keep: Keep = None,
    drop: Drop = None,
    min_count: MinCount = 0,
    words: Words = None,
    pad_piece: PadPiece = None,
) -> None:
    """Merge trained pieces and domain terms into a base vocabulary."""
    from altiplano import commands_tokenizer

    options = {
        "add": add or [],
        "scores": scores,
        "keep": keep,
        "drop": drop or [],
        "min_count": min_count,
        "words": words and str(words),
        "pad_piece": pad_piece,
    }
    commands_tokenizer.merge(base, output, text or [], text_key, options)


@tokenizer_app.command("report")
def tokenizer_report(
    tokenizers: Annotated[
        list[str], typer.Argument(help="[name=]directory or .model; the first is compared with.")
    ],
    text: Annotated[
        list[str], typer.Option(help="[name=]file, glob or URL to measure on; repeatable.")
    ],
    text_key: TextKey = "text",
    max_bytes: Annotated[int, typer.Option("--bytes", min=1, help="Of every text.")] = 2_000_000,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG) here.")] = None,
) -> None:
    """Compare vocabularies on texts: length, coverage, and what changed of the first's."""
    from altiplano import commands_tokenizer

    commands_tokenizer.report(tokenizers, text, text_key, max_bytes, json_file, plot)
