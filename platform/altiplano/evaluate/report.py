"""What a run measured, as JSON, Markdown and one table for the terminal.

Knows the numbers' names, not how they were measured. Costs nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.console import format_cell, simple_table
from altiplano.errors import ArtifactError

if TYPE_CHECKING:
    from rich.table import Table

Row = Sequence[object]

REPORT = "report.json"


@dataclass(frozen=True)
class Change:
    """One number before the run (base model or vocabulary) and after it."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class Sample:
    """One prompt, and what the base and the finished model reply."""

    prompt: str
    before: str
    after: str


@dataclass
class Results:
    """Everything `evaluate` found; languages are codes such as `zh`."""

    run: str
    """Name of the run."""
    tokens_per_character: dict[str, Change] = field(default_factory=dict)
    """Language -> base and new vocabulary, on the same held-out text."""
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage, in the order of the run (`base` first, `merge` last) -> language -> bits per byte."""
    accuracy: dict[str, Change] = field(default_factory=dict)
    """Language -> share of held-out questions answered rightly, 0..1."""
    questions: dict[str, int] = field(default_factory=dict)
    """Language -> how many questions were asked."""
    draft_acceptance: dict[str, float] | None = None
    """What `acceptance.draft_acceptance` returns; None without a draft."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> wall-clock seconds."""
    samples: list[Sample] = field(default_factory=list)
    """Some prompts with both replies."""


def report_table(results: Results) -> "Table":
    """The one table a run ends with."""
    rows = [*_quality_rows(results), *_draft_rows(results)]
    rows += [(f"seconds: {stage}", None, seconds) for stage, seconds in results.seconds.items()]
    return simple_table(f"{results.run}: results", ("measure", "before", "after"), rows)


def write_report(results: Results, output: Path) -> None:
    """Write `report.json` (all fields of `Results`) and `report.md` into a directory."""
    text = json.dumps(asdict(results), indent=2, ensure_ascii=False) + "\n"
    (output / REPORT).write_text(text, encoding="utf-8")
    (output / "report.md").write_text(render_markdown(results), encoding="utf-8")


def read_report(directory: Path) -> Results:
    """What `write_report` wrote.

    Raises:
        ArtifactError: there is no report, or it cannot be read.
    """
    file = directory / REPORT
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        for measure in ("tokens_per_character", "accuracy"):
            raw[measure] = {lang: Change(**change) for lang, change in raw[measure].items()}
        raw["samples"] = [Sample(**sample) for sample in raw["samples"]]
        return Results(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}): run `altiplano evaluate CONFIG`"
        ) from None


def render_markdown(results: Results) -> str:
    """The report as Markdown tables."""
    parts = [f"# Results of {results.run}"]
    quality = [*_quality_rows(results), *_draft_rows(results)]
    parts += ["## Before and after", _table(("measure", "before", "after"), quality)]
    if results.bits_per_byte:
        languages = _languages(results)
        stages = [
            (stage, *(found.get(language) for language in languages))
            for stage, found in results.bits_per_byte.items()
        ]
        parts += ["## Bits per byte of held-out text", _table(("stage", *languages), stages)]
    if results.seconds:
        timed = [*results.seconds.items(), ("all", sum(results.seconds.values()))]
        parts += ["## Time", _table(("stage", "seconds"), timed)]
    if results.samples:
        said = [(sample.prompt, sample.before, sample.after) for sample in results.samples]
        parts += ["## Replies", _table(("prompt", "base", "finished"), said, "---")]
    return "\n\n".join(parts) + "\n"


def _quality_rows(results: Results) -> list[Row]:
    rows: list[Row] = [
        (f"tokens per character, {language}", change.before, change.after)
        for language, change in results.tokens_per_character.items()
    ]
    if results.bits_per_byte:
        stages = list(results.bits_per_byte.values())
        rows += [
            (f"bits per byte, {language}", stages[0].get(language), stages[-1].get(language))
            for language in _languages(results)
        ]
    for language, change in results.accuracy.items():
        asked = results.questions.get(language)
        note = f" ({asked} questions)" if asked is not None else ""
        rows.append(
            (f"accuracy, {language}{note}", _percent(change.before), _percent(change.after))
        )
    return rows


def _draft_rows(results: Results) -> list[Row]:
    if results.draft_acceptance is None:
        return []
    found = results.draft_acceptance
    return [
        ("draft: proposals accepted", None, _percent(found["acceptance_rate"])),
        ("draft: accepted per step", None, found["accepted_per_step"]),
    ]


def _languages(results: Results) -> list[str]:
    """Every language of the stages, in order of appearance."""
    return list(dict.fromkeys(lang for found in results.bits_per_byte.values() for lang in found))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _table(header: Sequence[str], rows: Sequence[Row], align: str = "---:") -> str:
    lines = [_line(header), _line(["---", *[align] * (len(header) - 1)])]
    return "\n".join([*lines, *(_line([format_cell(cell) for cell in row]) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    inside = " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells)
    return f"| {inside} |"
