"""Keeps what the long runs found in the tables of RESULTS.md: a row for each thing tried, with the day."""

from __future__ import annotations

import os
import time
from pathlib import Path

TABLES = Path(__file__).with_name("RESULTS.md")


def keep(table: str, name: str, *cells: object, path: Path = TABLES) -> None:
    """Write a row in place of the one of that name, or at the end of its table, which stands below its mark.

    Raises ValueError where there is no such mark.
    """
    row = f"| {' | '.join(map(str, (name, *cells, time.strftime('%Y-%m-%d'))))} |"
    before, mark, rest = path.read_text(encoding="utf-8").partition(f"<!-- {table} -->\n")
    if not mark:
        raise ValueError(f"{path}: no table is marked {table}")
    body, gap, after = rest.partition("\n\n")
    lines = body.rstrip("\n").splitlines()
    place = next((number for number, line in enumerate(lines) if line.startswith(f"| {name} |")), len(lines))
    lines[place : place + 1] = [row]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{before}{mark}{chr(10).join(lines)}{gap or chr(10)}{after}", encoding="utf-8")
    os.replace(temporary, path)
