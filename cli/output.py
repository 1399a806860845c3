"""What the commands print: a table on a terminal, plain text in a pipe, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import click

from bntools.words import counted, number, percent, told_apart

__all__ = ["as_json", "counted", "jsonable", "number", "percent", "say", "table"]

BETWEEN = 2  # columns of a terminal between those of a table
SHORTEST = 16  # characters of a name that stay on a terminal, however narrow


def say(text: str = "", quiet: bool = False) -> None:
    """Print a line on stdout, unless the command was asked for JSON."""
    if not quiet:
        click.echo(text)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    most: int | None = None,
    styles: Sequence[str] = (),
) -> None:
    """Print rows under headers, the first column to the left and the others to the right.

    On a terminal long names in the first column lose their middle where the rows would not fit beside one another.
    With ``most`` it shows as many rows and says how many it left out; a pipe gets all of them. ``styles`` are
    rich's, one a row, for its first two cells on a terminal.
    """
    if not rows:
        return
    if not sys.stdout.isatty():
        click.echo("\n".join(_plain([headers, *rows])))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for index, header in enumerate(headers):
        shown.add_column(header, justify="right" if index else "left", overflow="fold")
    console = Console()
    widths = [max(map(len, column)) for column in zip(headers, *rows[:most], strict=True)]
    left = max(console.width - sum(width + BETWEEN for width in widths[1:]) - 2, SHORTEST)
    names = told_apart([row[0] for row in rows[:most]], left)
    for index, row in enumerate(rows[:most]):
        style = styles[index] if styles else ""
        cells = (names[index], *row[1:])
        shown.add_row(*(Text(cell, style if place < 2 else "") for place, cell in enumerate(cells)))
    console.print(shown)
    if most is not None and len(rows) > most:
        click.echo(f"... and {len(rows) - most} more")


def as_json(value: Any) -> None:
    """Print a value as JSON, numbers that JSON does not know (NaN, Inf) as null."""
    click.echo(json.dumps(jsonable(value), indent=2, allow_nan=False))


def jsonable(value: Any) -> Any:
    """The same value in terms of JSON: arrays as lists, NaN and Inf as null, keys as strings."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _plain(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
