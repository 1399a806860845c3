"""The tables in which long runs are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import results

TEXT = """# A

<!-- one -->
| a | b | day |
|---|---|---|
| x | 1 | then |

Behind.

<!-- two -->
| c | day |
|---|---|
"""


def test_a_row_takes_the_place_of_its_own(tmp_path):
    """Others, other tables and the text between them stay; a new one comes last."""
    path = tmp_path / "RESULTS.md"
    path.write_text(TEXT)
    results.keep("one", "y", 2, path=path)
    results.keep("one", "x", 3, path=path)
    results.keep("two", "x", path=path)
    rows = [line.rpartition(" | ")[0] for line in path.read_text().splitlines() if line.startswith(("| x", "| y"))]
    assert rows == ["| x | 3", "| y | 2", "| x"]
    assert path.read_text().replace("\n| y |", "\n\n| y |").count("\n\n") == TEXT.count("\n\n") + 1
    assert "then" not in path.read_text()


def test_a_table_that_is_not_there(tmp_path):
    """Is said, and nothing is written."""
    path = tmp_path / "RESULTS.md"
    path.write_text(TEXT)
    with pytest.raises(ValueError, match="no table is marked three"):
        results.keep("three", "x", path=path)
    assert path.read_text() == TEXT


def test_the_tables_of_the_long_runs():
    """Are there for each of them."""
    text = results.TABLES.read_text()
    assert all(f"<!-- {table} -->\n| " in text for table in ("fuzz", "faults", "torchrun", "matrix"))
