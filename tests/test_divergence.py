"""Where two models part."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntools.divergence import first_true


@given(st.data(), st.integers(1, 500), st.sampled_from([1, 3, 16, 256]))
def test_bisection(data, size, width):
    """The first of a run of differences is found in a logarithmic number of runs, whatever the width."""
    first = data.draw(st.integers(0, size))
    runs = []

    def differs(names):
        runs.append(len(names))
        return [name >= first for name in names]

    assert first_true(range(size), differs, width) == (first if first < size else None)
    assert max(runs) <= width
    assert len(runs) <= math.log(size + 1, width + 1) + 2


@pytest.mark.parametrize("flags", [(0, 1, 0, 0, 1), (1, 0, 0, 0, 0), (0, 0, 0, 0, 1)])
def test_branches(flags):
    """Values that fit in one run are all read: the first difference is found though others agree behind it."""
    found = first_true(range(5), lambda names: [bool(flags[name]) for name in names], 5)
    assert found == flags.index(1)


def test_nothing_to_search():
    """No names, no difference, and no run."""

    def differs(names):
        raise AssertionError("ran for nothing")

    assert first_true([], differs, 4) is None
