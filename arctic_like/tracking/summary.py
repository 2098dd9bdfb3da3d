"""What stands on the screen when a run is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table at a run's end. None: was not measured."""

    label: str
    before: float | None
    after: float | None


def show_summary(
    *, rows: Sequence[SummaryRow], run_directory: Path, next_commands: Sequence[str] = ()
) -> None:
    """Print the table of results, where the run lies, and what to type next."""
    from rich.table import Table

    from arctic_like.logs import console

    if rows:
        table = Table("", "before", "after", box=None, header_style="bold", padding=(0, 3, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(row.label, _value(row.before), _value(row.after))
        console().print()
        console().print(table)
    console().print()
    for text in [f"run directory  {run_directory}", *(f"next  {c}" for c in next_commands)]:
        console().print(text, markup=False, soft_wrap=True)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
