"""What benchmarks give stands in the tables part by part: one that runs anew replaces its own figures only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def record(monkeypatch, tmp_path):
    """The writer, on files of its own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import record

    for name in ("RESULTS", "TABLES", "README"):
        monkeypatch.setattr(record, name, tmp_path / name)
    record.README.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    return record


def test_a_part_replaces_its_own_rows_only(record):
    """The others keep rows, date and versions, in every table; the README keeps what is around its table."""
    from measure import Row, at_most

    record.keep(
        "startup", [at_most("bntools --help, beyond", 0.2, 0.1), Row("bntools inspect, beyond", "3 s", "", True)], "A"
    )
    record.keep("fold_peers", [Row("a net", "", "", True, {"one": "1 of 2", "other": "0"})], "B")
    before = json.loads(record.RESULTS.read_text()) | {"startup": None}
    record.keep("startup", [Row("bntools inspect, beyond", "4 s", "", True)], "A")
    now = json.loads(record.RESULTS.read_text())
    assert list(now) == ["startup", "fold_peers"]
    assert now | {"startup": None} == before
    tables, readme = record.TABLES.read_text(), record.README.read_text()
    assert "| bntools inspect, beyond | 4 s |" in tables
    assert "| 0.2 |" not in tables
    assert "| what | one | other |  |" in tables
    assert "| a net | 1 of 2 | 0 |  |" in tables
    assert readme.startswith(f"before\n{record.BEGIN}\n")
    assert readme.endswith(f"{record.END}\nafter\n")
    assert "| 4 s |" in readme
    assert "old" not in readme


def test_a_missed_goal_is_said(record):
    """In the row itself."""
    from measure import at_most

    record.keep("startup", [at_most("bntools --help, beyond", 0.2, 0.1)], "A")
    assert "| bntools --help, beyond | 0.2 | at most 0.1 | missed |" in record.TABLES.read_text()


def test_the_tables_are_those_of_the_results(monkeypatch, tmp_path):
    """README and RESULTS.md say what results.json says: ``python tests/benchmarks/record.py`` writes them again."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import record

    tables, readme = record.TABLES.read_text(), record.README.read_text()
    for name, path in {"TABLES": tmp_path / "tables", "README": tmp_path / "readme"}.items():
        monkeypatch.setattr(record, name, path)
    record.README.write_text(readme)
    record.write()
    assert (record.TABLES.read_text(), record.README.read_text()) == (tables, readme)
