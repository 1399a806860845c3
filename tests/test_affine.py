"""Eval-mode BN as scale and shift, and what weights make of it, against a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bntools import BatchNorm, BntoolsError
from bntools.affine import Affine, absorb_input, absorb_output, scale_shift

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def layer(**changes) -> BatchNorm:
    """A layer of three channels, with these fields changed."""
    values = {
        "mean": np.array([1.0, -2.0, 0.5]),
        "var": np.array([4.0, 0.25, 1.0]),
        "scale": np.array([1.0, -3.0, 0.0]),
        "shift": np.array([0.0, 1.0, 2.0]),
        "eps": 1e-3,
    } | changes
    rest = {"momentum": 0.1, "updates": 1, "stats_frozen": False, "affine_frozen": False}
    return BatchNorm(name="bn", kind="BatchNorm2d", features=3, axis=1, **values, **rest)


@pytest.mark.parametrize("without", [(), ("scale",), ("shift",), ("scale", "shift")])
def test_scale_and_shift_are_those_of_the_definition(without):
    """``scale * x + shift`` is ``(x - mean) / sqrt(var + eps) * gamma + beta``, with and without gamma and beta."""
    bn = layer(**dict.fromkeys(without))
    x = np.linspace(-3, 3, 21).reshape(7, 3)
    gamma = 1 if bn.scale is None else bn.scale
    beta = 0 if bn.shift is None else bn.shift
    affine = scale_shift(bn)
    expected = (x - bn.mean) / np.sqrt(bn.var + bn.eps) * gamma + beta
    np.testing.assert_allclose(affine.scale * x + affine.shift, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": None, "var": None}, "each batch's own"),
        ({"mean": np.array([0, np.nan, 0])}, "mean is NaN or Inf in channel 1"),
        ({"var": np.array([1, 1, np.inf])}, "variance is NaN or Inf in channel 2"),
        ({"var": np.array([1, -0.5, 1])}, r"negative in channel 1 \(-0.5\)"),
        ({"var": np.array([0.0, 1, 1]), "eps": 0.0}, "zero in channel 0, and eps is 0"),
        ({"scale": np.array([1, 1, np.nan])}, "scale is NaN or Inf in channel 2"),
    ],
)
def test_statistics_that_allow_no_scale_and_shift_are_refused(changes, words):
    """NaN, negative or missing statistics are an error that names the channel, never a NaN weight."""
    with pytest.raises(BntoolsError, match=words):
        scale_shift(layer(**changes))


def affines(channels: int, rng: np.random.Generator, parts: str) -> Affine:
    """A random affine with these parts; the others do nothing."""
    scale = rng.normal(size=channels) if "scale" in parts else np.ones(channels)
    return Affine(scale, rng.normal(size=channels) if "shift" in parts else np.zeros(channels))


def per_channel(array: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """One value per channel, against a value of this many axes."""
    return torch.from_numpy(array).view(1, -1, *[1] * (x.ndim - 2))


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    into=st.integers(1, 3),
    out=st.integers(1, 3),
    bias=st.booleans(),
    transposed=st.booleans(),
    parts=st.sampled_from(["", "scale", "shift", "scale shift"]),
    seed=st.integers(0, 2**16),
)
def test_a_convolution_takes_up_an_affine_on_either_side(dims, groups, into, out, bias, transposed, parts, seed):
    """For all kinds, groups, unequal channels and biases, the absorbed weight does what affine and convolution did."""
    rng = np.random.default_rng(seed)
    c_in, c_out = groups * into, groups * out
    kernel = (1,) * dims if transposed and "shift" in parts else (2, 3, 2)[:dims]
    shape = (c_in, out, *kernel) if transposed else (c_out, into, *kernel)
    weight, b = rng.normal(size=shape), rng.normal(size=c_out) if bias else None
    x = torch.from_numpy(rng.normal(size=(2, c_in, *(4, 5, 3)[:dims])))
    axes = (1, 0) if transposed else (0, 1)

    def run(x, weight, b):
        function = (TRANSPOSED if transposed else CONVOLUTIONS)[dims]
        return function(x, torch.from_numpy(weight), None if b is None else torch.from_numpy(b), groups=groups)

    before, after = affines(c_in, rng, parts), affines(c_out, rng, parts)
    expected = run(x * per_channel(before.scale, x) + per_channel(before.shift, x), weight, b)
    found = run(x, *absorb_input(weight, b, before, *axes, groups))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    y = run(x, weight, b)
    expected = y * per_channel(after.scale, y) + per_channel(after.shift, y)
    found = run(x, *absorb_output(weight, b, after, *axes, groups))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_a_dense_weight_takes_up_an_affine_in_either_layout(into, out, bias, swapped, seed):
    """A matrix may be stored as (out, in) or as (in, out): the axes say which, also where both are equal."""
    rng = np.random.default_rng(seed)
    matrix, b = rng.normal(size=(out, into)), rng.normal(size=out) if bias else None
    before, after = affines(into, rng, "scale shift"), affines(out, rng, "scale shift")
    x = rng.normal(size=(7, into))
    stored, axes = (matrix.T, (1, 0)) if swapped else (matrix, (0, 1))

    def run(x, stored, b):
        return x @ (stored if swapped else stored.T) + (0 if b is None else b)

    expected = run(x * before.scale + before.shift, stored, b)
    np.testing.assert_allclose(run(x, *absorb_input(stored, b, before, *axes, 1)), expected, atol=1e-12)
    expected = run(x, stored, b) * after.scale + after.shift
    np.testing.assert_allclose(run(x, *absorb_output(stored, b, after, *axes, 1)), expected, atol=1e-12)


def test_the_wrong_axis_of_a_transposed_convolution_would_not_pass():
    """A deliberate mutant: folding a transposed convolution on axis 0 is far off, so the tests above can fail."""
    rng = np.random.default_rng(0)
    weight, affine = rng.normal(size=(4, 4, 1)), affines(4, rng, "scale")
    right, _ = absorb_output(weight, None, affine, 1, 0, 1)
    wrong, _ = absorb_output(weight, None, affine, 0, 1, 1)
    assert np.abs(right - wrong).max() > 0.1


def test_two_affines_compose():
    """``after`` is the second affine applied to the result of the first."""
    rng = np.random.default_rng(0)
    first, second = affines(3, rng, "scale shift"), affines(3, rng, "scale shift")
    both, x = second.after(first), rng.normal(size=(5, 3))
    expected = second.scale * (first.scale * x + first.shift) + second.shift
    np.testing.assert_allclose(both.scale * x + both.shift, expected, atol=1e-14)
