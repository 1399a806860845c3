"""Comparing one output with its reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntools.comparison import EDGES, EXPONENTS, Comparison, error


def compare(reference, candidate, parts=1):
    """The figures of an output that comes in as many batches as ``parts``."""
    comparison = Comparison("y")
    for a, b in zip(np.array_split(reference, parts), np.array_split(candidate, parts), strict=True):
        comparison.add(a, b)
    return comparison.result()


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_split_invariance(samples, parts, seed):
    """The figures of a stream of batches are those of all samples together."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(samples, 5))
    candidate = reference + rng.normal(scale=1e-3, size=(samples, 5))
    whole, split = compare(reference, candidate), compare(reference, candidate, min(parts, samples))
    gap = np.abs(reference - candidate)
    assert whole.error == gap.max() / np.abs(reference).max()
    assert whole.mean_error == pytest.approx(gap.mean())
    assert (split.error, split.max_error, split.agreement) == (whole.error, whole.max_error, whole.agreement)
    assert split.mean_error == pytest.approx(whole.mean_error)
    assert whole.agreement == np.mean(reference.argmax(1) == candidate.argmax(1))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale(scale):
    """One per cent off is one per cent off, whatever the scale of the output."""
    reference = np.linspace(-1, 1, 12).reshape(3, 4) * scale
    assert error(reference, reference * 1.01) == pytest.approx(0.01)


def test_million_elements():
    """Rounding of each of a million elements does not add up to an error."""
    reference = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)
    assert error(reference, reference * np.float32(1 + 1e-6)) < 2e-6


def test_zero_reference():
    """Where the reference is all zero the error is the absolute one."""
    assert error(np.zeros((2, 3)), np.full((2, 3), 1e-7)) == 1e-7
    assert error(np.zeros((2, 3)), np.zeros((2, 3))) == 0


@pytest.mark.parametrize("axes", [(4, 6), (4, 6, 3, 2)])
def test_agreement(axes):
    """Agreement is the share of equal argmax over the class axis, for classes and for segmentation maps."""
    reference = np.random.default_rng(0).normal(size=axes)
    candidate = reference.copy()
    candidate[0, 2] = 100
    assert compare(reference, candidate).agreement == np.mean(reference.argmax(1) == candidate.argmax(1))


@pytest.mark.parametrize("axes", [(4,), (4, 1), (4, 6, 3)])
def test_no_agreement(axes):
    """Outputs without a class axis have no agreement."""
    values = np.ones(axes)
    assert compare(values, values).agreement is None


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_exact(dtype):
    """One differing value of an integer or boolean output is a problem, however large the others are."""
    reference = np.ones(1000, dtype)
    candidate = reference.copy()
    candidate[17] = 0
    assert compare(reference, reference).problem is None
    result = compare(reference, candidate)
    assert result.exact
    assert result.problem is not None
    assert "1 of 1,000 values" in result.problem


def test_integer_widths():
    """An int32 output that holds the values of an int64 one is equal to it."""
    assert compare(np.arange(5), np.arange(5, dtype=np.int32)).problem is None


def test_text():
    """Outputs of text are compared exactly."""
    a, b = np.array(["cat", "dog"], object), np.array(["cat", "cow"], object)
    assert compare(a, a).problem is None
    assert "1 of 2" in str(compare(a, b).problem)


def test_complex():
    """A complex output is off by the modulus of the difference."""
    reference = np.array([3 + 4j, 0])
    assert error(reference, reference + 0.05j) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("reference", "candidate", "words"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), "shape (3, 2) where the reference has (2, 3)"),
        (np.ones(2), np.ones(2, int), "dtype int64 where the reference has float64"),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), "the reference itself gives NaN in 1 of 2 values"),
        (np.array([1.0, 2.0]), np.array([1.0, np.nan]), "the candidate itself gives NaN in 1 of 2 values"),
        (np.array([1.0, np.inf]), np.array([1.0, 2.0]), "1 of 2 values are infinite in one model only"),
        (np.array([1.0, np.inf]), np.array([1.0, -np.inf]), "1 of 2 values are infinite in one model only"),
    ],
)
def test_incomparable(reference, candidate, words):
    """What cannot be compared has an infinite error and a problem in words, also if later batches are fine."""
    comparison = Comparison("y")
    assert comparison.add(reference, candidate) == np.inf
    comparison.add(np.ones(2), np.ones(2))
    result = comparison.result()
    assert result.error == np.inf
    assert words in str(result.problem)


def test_equal_infinities():
    """Values infinite in both models are left out, and that is said."""
    reference = np.array([[-np.inf, 2.0, 1.0]])
    comparison = Comparison("mask")
    assert comparison.add(reference, reference + 0.02) == pytest.approx(0.01)
    assert "1 values are infinite in both models" in str(comparison.note)
    assert Comparison("y").note is None


def test_histogram():
    """Differences are counted by decade of the output's scale: equal ones, each decade, and those above."""
    relative = np.array([0.0, 0.0, 3e-17, 5e-7, 2e-7, 4e-3, 0.5, 7.0])
    # Zeros, but for one value that sets the scale.
    result = compare(np.append(np.zeros(8), 100.0), np.append(relative * 100, 100.0))
    counts = dict(zip(["equal", "tiny", *EXPONENTS], result.histogram, strict=True))
    assert {key: count for key, count in counts.items() if count} == {
        "equal": 3,
        "tiny": 1,
        -7: 2,
        -3: 1,
        -1: 1,
        0: 1,
    }
    assert str(result).endswith(
        "of its scale: equal 33.3%, <1e-16 11.1%, <1e-06 22.2%, <1e-02 11.1%, <1e+00 11.1%, >=1 11.1%"
    )


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_histogram_of_a_stream(parts, seed):
    """The histogram of a stream is that of all samples together, though the scale is known only at its end."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(30, 5)) * np.arange(1, 31)[:, None]
    candidate = reference + rng.normal(size=(30, 5)) * 10.0 ** rng.integers(-12, 1, size=(30, 5))
    whole, split = compare(reference, candidate).histogram, compare(reference, candidate, parts).histogram
    assert whole == split
    assert sum(whole) == reference.size
    edges = [0, *EDGES, np.inf]
    exact, _ = np.histogram(np.abs(reference - candidate) / np.abs(reference).max(), edges)
    assert np.abs(np.cumsum(whole[1:]) - np.cumsum(exact)).max() <= 3  # an edge is met to 2.3 %


def test_no_histogram():
    """Outputs that cannot be compared have none, and say so in one line all the same."""
    result = compare(np.ones(3), np.array([1.0, np.nan, 1.0]))
    assert result.histogram == ()
    assert str(result) == "output 'y': error inf, max inf, mean inf"


def test_histogram_of_exact_outputs():
    """Integers are counted like floats."""
    assert compare(np.array([1, 2, 10]), np.array([1, 2, 11])).histogram[:2] == (2, 0)
