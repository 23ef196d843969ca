"""Shows a vocabulary report: tables for the terminal, bars for a page.

Knows the report's numbers, nothing of vocabularies. The picture costs the import of matplotlib.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.vocabulary.report import Coverage, Report

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_EXAMPLE_CHARACTERS = 60
_OWN_LANGUAGE_SHARE = 0.01
"""A text of which the first vocabulary spells less than this in bytes is in a language it knows."""


def report_tables(report: Report) -> "Iterator[RenderableType]":
    """The vocabularies, their coverage of every text, and lines that changed."""
    yield _pieces_table(report)
    yield _coverage_table(report)
    yield from _examples(report)


def _pieces_table(report: Report) -> "Table":
    from rich.table import Table

    table = Table(title="Vocabularies", title_justify="left")
    table.add_column("vocabulary", overflow="fold")
    for column in ("family", "encoded by"):
        table.add_column(column, no_wrap=True)
    for column in ("pieces", "in the first", "not whole characters", "unreachable"):
        table.add_column(column, justify="right")
    for name, entry in report.pieces.items():
        table.add_row(
            _escaped(name),
            entry.family,
            entry.form,
            f"{entry.size:,}",
            f"{entry.in_first:,}",
            f"{entry.byte_pieces:,}",
            f"[red]{entry.unreachable:,}[/]" if entry.unreachable else "0",
        )
    return table


def _coverage_table(report: Report) -> "Table":
    from rich.table import Table

    table = Table(title="Texts", title_justify="left")
    for column in ("text", "vocabulary"):
        table.add_column(column, overflow="fold")
    for column in (
        "tokens per character",
        "tokens per byte",
        "byte fallback",
        "single characters",
        "lines as the first",
        "forms differ on",
    ):
        table.add_column(column, justify="right")
    table.columns[-2].no_wrap = True
    for text, rows in report.coverage.items():
        own = _is_own_language(rows)
        for number, (name, row) in enumerate(rows.items()):
            table.add_row(
                _escaped(text) if number == 0 else "",
                _escaped(name),
                f"{row.tokens_per_character:.3f}",
                f"{row.tokens_per_byte:.3f}",
                f"{row.byte_fallback_share:.2%}",
                f"{row.single_character_share:.1%}",
                _as_first(row, own_language=own),
                _differing(row),
                end_section=number == len(rows) - 1,
            )
    return table


def _is_own_language(rows: Mapping[str, Coverage]) -> bool:
    """Whether a change of the text's tokens harms what the first vocabulary's model has learnt."""
    first = next(iter(rows.values()))
    return first.byte_fallback_share < _OWN_LANGUAGE_SHARE


def _as_first(row: Coverage, *, own_language: bool) -> str:
    whole = row.lines_as_first == row.lines
    counts = f"{row.lines_as_first:,} of {row.lines:,}"
    return f"[green]{counts}[/]" if whole else f"[red]{counts}[/]" if own_language else counts


def _differing(row: Coverage) -> str:
    if row.lines_forms_differ is None:
        return "-"
    colour = "red" if row.lines_forms_differ else "green"
    return f"[{colour}]{row.lines_forms_differ:,}[/]"


def _examples(report: Report) -> Iterator[str]:
    for text, rows in report.coverage.items():
        for name, row in rows.items():
            if row.changed_example is not None and _is_own_language(rows):
                line = _short(row.changed_example.strip(), _EXAMPLE_CHARACTERS)
                yield f"changed by {_escaped(name)} in {_escaped(text)}: {_escaped(line)}"
    for name, entry in report.pieces.items():
        longest = " ".join(_short(text.strip(), 16) for text in entry.longest_new)
        yield f"longest in {_escaped(name)}: {_escaped(longest)}"
        if entry.unreachable:
            pieces = _escaped(" ".join(entry.unreachable_examples))
            yield f"unreachable in {_escaped(name)}: {pieces}"


def _short(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def plot_report(report: Report, output_png: Path) -> None:
    """Draw tokens per character, a group of bars per text, a bar per vocabulary.

    Args:
        report: what was measured.
        output_png: picture to write, beside and renamed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts, names = list(report.coverage), list(report.pieces)
    figure = Figure(figsize=(max(5.0, 1.6 + 0.5 * len(texts) * (len(names) + 1)), 4.2))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        offset = (number - (len(names) - 1) / 2) * width
        bars = axes.bar(
            [position + offset for position in range(len(texts))],
            [report.coverage[text][name].tokens_per_character for text in texts],
            width=0.92 * width,
            label=_drawable(name, f"vocabulary {number + 1}"),
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    labels = [_drawable(text, f"text {number}") for number, text in enumerate(texts, start=1)]
    axes.set_xticks(range(len(texts)), labels)
    axes.set_ylabel("tokens per character (less is better)")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    partial = output_png.with_name(output_png.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(output_png)


def _drawable(name: str, otherwise: str) -> str:
    """A name that the picture's font can write: it has no Chinese characters."""
    return name if name.isascii() else otherwise
