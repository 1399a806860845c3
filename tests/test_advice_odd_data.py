"""Advice on data that is not what anybody planned: each with what an expert would say."""

from __future__ import annotations

from copy import deepcopy

import coloured_digits as cd
import numpy as np
import pytest
import torch

import bntools
from bntools.diagnosis import scalings


@pytest.fixture(scope="module")
def images():
    """Digits as in training, unseen."""
    return cd.held_out()[0][:200]


def first(images, model=None):
    """The first advice on images, for the network that reads digits."""
    return bntools.inspect(model or cd.trained(), cd.batches(images)).advice[0]


def test_sixteen_bits(images):
    """Pixels of 16-bit images, undivided: a range, not a domain, and the line given mends it."""
    found = first(images * 65535)
    assert found.action == "preprocess"
    mended = {"np": np, "images": images * 65535}
    exec(found.how, mended)
    np.testing.assert_allclose(mended["images"], images, atol=1e-6)


def test_normalized_twice():
    """ImageNet's mean and std where they were applied already: undone once."""
    unit = np.random.default_rng(0).uniform(0, 1, (64, 8, 8, 3))
    once = (unit - scalings.MEAN) / scalings.STD
    twice = (once - scalings.MEAN) / scalings.STD
    (source,) = scalings.possible(twice)
    target = next(one for one in scalings.others(source, twice) if one.name == "ImageNet's mean and std")
    np.testing.assert_allclose(target.of_unit(source.to_unit(twice)), once, atol=1e-9)
    assert source not in list(scalings.possible(once))
    line = scalings.line(source, target, False, False)
    mended = {"np": np, "images": twice}
    exec(line, mended)
    np.testing.assert_allclose(mended["images"], once, atol=1e-9)
