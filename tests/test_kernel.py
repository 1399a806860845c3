"""Moments at the speed of memory: as accurate as float64 wherever the mean lies; and memory that is handed out once."""

from __future__ import annotations

import os
import signal
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bntools import kernel
from bntools.backends.onnx.buffers import AGE, Buffers
from bntools.kernel import moments_of
from bntools.moments import Moments

AXES = pytest.mark.parametrize("axis", [1, -1])


def laid(x: np.ndarray, axis: int) -> np.ndarray:
    """An array of shape (N, C, ...) with its channels on ``axis``."""
    return np.ascontiguousarray(np.moveaxis(x, 1, axis))


@settings(max_examples=80, deadline=None)
@given(
    axis=st.sampled_from([1, 2, -1]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4]),
    spread=st.sampled_from([1e-2, 1.0, 50.0]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_against_float64(axis, shape, offset, spread, dtype):
    """Mean and variance of every channel, on whatever axis, also at a mean of a million standard deviations."""
    if dtype is np.float16:
        offset = min(offset, 100.0)
    x = (np.random.default_rng(0).standard_normal(shape) * spread + offset).astype(dtype)
    expected, (found, samples) = Moments.of(x), moments_of(laid(x, axis), per_sample=True, axis=axis)
    std = np.sqrt(expected.var) + 1e-6 * (abs(offset) + spread)
    assert found.count == expected.count
    assert (np.abs(found.mean - expected.mean) / std).max() < 1e-5
    assert (np.abs(found.var - expected.var) <= 1e-5 * expected.var + 1e-9 * (offset**2 + spread**2)).all()
    means = Moments.of(x.astype(np.float64).reshape(*shape[:2], -1).mean(-1))
    np.testing.assert_allclose(samples.mean(0), means.mean, atol=1e-5 * float(std.max()))


@AXES
@pytest.mark.parametrize("offset", [0, 1000])
def test_long_rows_and_several_threads(offset, axis):
    """Rows longer than a run, over several threads: float32 alone would be off by 1e-4 and more."""
    x = (np.random.default_rng(0).standard_normal((3, 4, 700, 300)) + offset).astype(np.float32)
    found, _ = moments_of(laid(x, axis), axis=axis)
    np.testing.assert_allclose(found.var, Moments.of(x).var, rtol=3e-6)
    naive = np.square(x).mean(axis=(0, 2, 3)) - np.square(x.mean(axis=(0, 2, 3)))
    assert offset == 0 or np.abs(naive / Moments.of(x).var - 1).max() > 1e-3


@AXES
def test_a_mean_far_off_is_measured_again(axis, monkeypatch):
    """Without the second look, squares cancel: the mutant is told from the kernel."""
    x = (np.random.default_rng(0).standard_normal((4, 3, 32, 32)) + 3000).astype(np.float32)
    expected = Moments.of(x).var
    np.testing.assert_allclose(moments_of(laid(x, axis), axis=axis)[0].var, expected, rtol=1e-5)
    monkeypatch.setattr(kernel, "OFFSET", np.nan)
    assert np.abs(moments_of(laid(x, axis), axis=axis)[0].var / expected - 1).max() > 1e-2


@AXES
def test_not_finite_stays_not_finite(axis):
    """NaN and Inf come through, so that they can be refused; one channel does not spoil another."""
    x = np.ones((2, 3, 4, 4), np.float32)
    x[0, 0, 0, 0], x[1, 1, 0, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        found, _ = moments_of(laid(x, axis), axis=axis)
    assert not np.isfinite(found.mean[:2] + found.m2[:2]).any()
    assert (found.mean[2], found.m2[2]) == (1, 0)


@AXES
def test_large_finite_values(axis):
    """Where squares overflow float32, the values are still finite, and so is what is measured of them."""
    x = (np.random.default_rng(0).standard_normal((2, 3, 8, 8)) * 1e25).astype(np.float32)
    found, samples = moments_of(laid(x, axis), per_sample=True, axis=axis)
    np.testing.assert_allclose(found.var, Moments.of(x).var, rtol=1e-6)
    assert np.isfinite(samples).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork():
    """A forked process, which has none of its parent's threads, measures with its own."""
    x = np.ones((4, 4, 512, 512), np.float32)
    assert moments_of(x)[0].mean[0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads at a fork, which is the point here
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # rather than wait for ever
        os._exit(int(moments_of(x)[0].mean[0] != 1))
    assert os.waitpid(child, 0)[1] == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
def test_memory_is_handed_out_once(steps):
    """No two arrays in use overlap, whatever is taken and given back, and all are aligned."""
    buffers, live = Buffers(), []
    for number, (take, size) in enumerate(steps):
        if take or not live:
            array = buffers.take((size,), np.dtype(np.float32))
            array[...] = number
            assert array.ctypes.data % 64 == 0
            live.append((array, number))
        else:
            array, mark = live.pop(size % len(live))
            assert (array == mark).all()
            buffers.give_back(array)
        if number % 5 == 0:
            buffers.next_stage()
    for array, mark in live:
        assert (array == mark).all()


def test_gaps_join_and_old_slabs_go():
    """What was one large value serves several small ones, then a large one again; unused memory is let go."""
    buffers, byte = Buffers(), np.dtype(np.uint8)
    large = buffers.take((4096,), byte)
    address = large.ctypes.data
    buffers.give_back(large)
    parts = [buffers.take((1024,), byte) for _ in range(4)]
    assert {part.ctypes.data - address for part in parts} == {0, 1024, 2048, 3072}
    for part in (parts[1], parts[3], parts[0], parts[2]):
        buffers.give_back(part)
    assert buffers.take((4096,), byte).ctypes.data == address
    buffers.give_back(np.zeros(4096, np.uint8))
    other = buffers.take((9000,), byte)
    buffers.give_back(other)
    for _ in range(AGE + 2):
        buffers.next_stage()
    assert len(buffers._slabs) == 1
