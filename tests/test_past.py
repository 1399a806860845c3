import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntools.moments import Moments, merged
from bntools.past import Past

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def batches(counts):
    """Moments of that many samples each, far apart from one another."""
    rng = np.random.default_rng(0)
    return [Moments.of(rng.normal(size=(count, 2)) * rng.uniform(1, 3) + rng.normal(0, 5)) for count in counts]


@given(sizes, st.integers(1, 40))
def test_a_window_is_the_merge_of_the_last_batches_that_fit(counts, window):
    """Whatever the sizes: the newest batch, and as many before it as the window holds."""
    past = Past(window=window)
    given_batches = batches(counts)
    for index, batch in enumerate(given_batches):
        past = past.after(batch)
        last, held = [batch], batch.count
        for earlier in reversed(given_batches[:index]):
            if held + earlier.count > window:
                break
            last.append(earlier)
            held += earlier.count
        expected = merged(last)
        assert past.samples == held
        np.testing.assert_allclose(past.total.mean, expected.mean, rtol=1e-10)
        np.testing.assert_allclose(past.total.m2, expected.m2, rtol=1e-10)


@given(sizes, st.floats(0.5, 50))
def test_a_half_life_weighs_each_batch_by_its_age(counts, half_life):
    """The closed form: a weight of 2 ** -(samples since / half-life), for mean and second moment alike."""
    past, given_batches = Past(half_life=half_life), batches(counts)
    for batch in given_batches:
        past = past.after(batch)
    after = np.cumsum(counts[::-1])[::-1] - counts
    weights = np.array(counts) * 0.5 ** (after / half_life)
    mean = sum(w * b.mean for w, b in zip(weights, given_batches, strict=True)) / weights.sum()
    square = sum(w * (b.var + b.mean**2) for w, b in zip(weights, given_batches, strict=True)) / weights.sum()
    assert past.samples == pytest.approx(weights.sum())
    np.testing.assert_allclose(past.total.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(past.total.var + past.total.mean**2, square, rtol=1e-9)


def test_a_past_has_one_bound():
    """A window and a half-life together mean nothing."""
    with pytest.raises(ValueError, match="a window or a half-life"):
        Past(window=1, half_life=1)
