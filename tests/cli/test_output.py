"""Tables and JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from bntools.cli import output


def test_json_knows_no_nan(capsys):
    """NaN and Inf become null, arrays lists, so that any JSON reader can read what is printed."""
    output.as_json({"a": np.array([1.0, np.nan]), "b": (np.float32(np.inf), np.int64(3)), 4: None, "p": True})
    assert json.loads(capsys.readouterr().out) == {"a": [1.0, None], "b": [None, 3], "4": None, "p": True}


def test_plain_table(capsys):
    """In a pipe a table is aligned text with all its rows, without escape sequences."""
    output.table(["layer", "drift"], [["a", "1"], ["bn.longer", "0.25"]], most=1)
    assert capsys.readouterr().out == "layer      drift\na              1\nbn.longer   0.25\n"


def test_terminal_table(capsys, monkeypatch):
    """On a terminal of 80 columns no line is longer, names stay whole, and cut rows are counted."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    name = "layer4.2.downsample.1"
    rows = [[f"{name}[{i}]", "0.25", "1.2e+03", "-1.2e+03", "3.1e-05", "123"] for i in range(30)]
    output.table(["layer", "drift", "mean before", "after", "std before", "after"], rows, most=20)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(name in line for line in lines) == 20
    assert f"{name}[0]" in "".join(lines)
    assert lines[-1] == "... and 10 more"


def test_long_names_lose_their_middle_on_a_terminal(capsys, monkeypatch):
    """Where names are too long for 80 columns each row keeps its one line, and the name its end."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    rows = [[f"backbone.stages.{i}.blocks.attention.norm{i}", "0.25", "1.2e+03", "-1.2e+03", "123"] for i in range(3)]
    output.table(["layer", "drift", "mean before", "std before", "channels that lead"], rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [f"norm{i} " in line and "…" in line for i, line in enumerate(lines[3:6])] == [True] * 3


@pytest.mark.parametrize(("count", "text"), [(0, "0 layers"), (1, "1 layer"), (1200, "1,200 layers")])
def test_counted(count, text):
    """Counts agree with their noun."""
    assert output.counted(count, "layer") == text


def test_numbers_that_are_missing():
    """What was not measured is a dash."""
    assert (output.number(None), output.percent(None)) == ("-", "-")
    assert (output.number(1e-5), output.percent(0.9874)) == ("1e-05", "98.7%")
