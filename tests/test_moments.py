"""Moments are an algebra: how values are split and in which order they are merged does not matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bntools.moments import Moments, merged

VALUES = hnp.arrays(np.float64, st.tuples(st.integers(2, 40), st.integers(1, 4)), elements=st.floats(-1e3, 1e3))


def assert_same(a: Moments, b: Moments, scale: float) -> None:
    """Equal to float64 rounding of values of this scale."""
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-13 * scale, rtol=0)
    np.testing.assert_allclose(a.m2, b.m2, atol=1e-12 * scale**2 * max(1, a.count), rtol=1e-12)


@given(VALUES, st.data())
def test_any_split_in_any_order_gives_the_moments_of_the_whole(values, data):
    """Moments of parts, merged in any order, are the moments of the whole."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values) - 1), max_size=5)))
    parts = [Moments.of(part) for part in np.split(values, cuts)]
    shuffled = data.draw(st.permutations(parts))
    assert_same(merged(shuffled), Moments.of(values), scale=1 + np.abs(values).max())


@given(VALUES, st.floats(-1e8, 1e8))
def test_a_large_offset_moves_the_mean_only(values, offset):
    """The variance of x + c is that of x, to what float64 can hold of x + c."""
    shifted = values + offset
    exact = Moments.of(shifted - offset)
    rounding = np.spacing(np.abs(shifted).max()) * np.sqrt(len(values))
    assert np.allclose(np.sqrt(Moments.of(shifted).var), np.sqrt(exact.var), atol=4 * rounding)


@given(VALUES)
def test_duplicated_data_changes_the_count_alone(values):
    """Every value twice: same mean, same variance (the divisor is the count), double count."""
    once, twice = Moments.of(values), Moments.of(np.concatenate([values, values]))
    assert twice.count == 2 * once.count
    np.testing.assert_allclose(twice.var, once.var, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_moments_are_those_of_numpy(axis):
    """Mean and variance agree with numpy's over all axes but the channels'."""
    values = np.random.default_rng(0).normal(3, 2, (4, 5, 6))
    others = tuple(i for i in range(3) if i != axis % 3)
    moments = Moments.of(values, axis=axis)
    np.testing.assert_allclose(moments.mean, values.mean(others))
    np.testing.assert_allclose(moments.var, values.var(others))
    assert moments.count == values.size / values.shape[axis]


def test_batches_of_90_and_10_samples_weigh_as_they_count():
    """The mean of batch means was 5.0 and the variance 0 elsewhere; they are 1.0 and 9.0."""
    parts = [np.zeros((90, 1)), np.full((10, 1), 10.0)]
    pooled = merged(Moments.of(part) for part in parts)
    assert pooled.mean[0] == pytest.approx(1.0)
    assert pooled.var[0] == pytest.approx(np.concatenate(parts).var())
    assert pooled.var[0] == pytest.approx(9.0)


def test_float32_data_with_a_large_mean_keeps_a_positive_variance():
    """E[x^2] - E[x]^2 in float32 gave -0.031 for mean 300 and standard deviation 0.01."""
    x = (300 + 0.01 * np.random.default_rng(0).normal(size=(10_000, 1))).astype(np.float32)
    naive = np.float32((x**2).mean() - x.mean() ** 2)
    assert abs(naive - 1e-4) > 5e-5
    assert Moments.of(x).var[0] == pytest.approx(1e-4, rel=0.05)


def test_a_prior_weighs_mean_and_second_moment():
    """(N * stored + n * measured) / (N + n), on the mean and on the second moment."""
    stored = Moments.from_variance(1, np.array([1.0]), np.array([4.0]))
    measured = Moments.from_variance(9999, np.array([3.0]), np.array([1.0]))
    blended = measured.blend(stored, samples=10, prior_samples=30)
    mean = (30 * 1 + 10 * 3) / 40
    second = (30 * (4 + 1) + 10 * (1 + 9)) / 40
    assert blended.mean[0] == pytest.approx(mean)
    assert blended.var[0] == pytest.approx(second - mean**2)
    assert measured.blend(stored, 10, 0) is measured


def test_the_standard_error_is_that_of_independent_values():
    """sigma / sqrt(n), with the unbiased sigma."""
    x = np.random.default_rng(0).normal(size=(50, 3))
    np.testing.assert_allclose(Moments.of(x).standard_error(), x.std(axis=0, ddof=1) / np.sqrt(50))
    assert np.isinf(Moments.of(x[:1]).standard_error()).all()
