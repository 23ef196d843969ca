"""What people see: one rich console, one style of bars and tables.

Knows nothing of what is shown. Costs the import of rich.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console()


def progress_bar() -> Progress:
    """A bar with counts, elapsed and remaining time; `detail` is free text at its end."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
    )


def simple_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table whose first column is text and whose other columns are right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        # Chinese has no spaces to break at: fold anywhere rather than cut.
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[format_cell(cell) for cell in row])
    return table


def format_cell(value: object) -> str:
    """A cell as people read it: floats with four significant digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
