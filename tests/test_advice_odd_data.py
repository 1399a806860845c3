"""Advice on data that is not what anybody planned: each with what an expert would say."""

from __future__ import annotations

import coloured_digits as cd
import numpy as np
import pytest

import bntools
from bntools.diagnosis import scalings, wild


@pytest.fixture(scope="module")
def images():
    """Digits as in training, unseen."""
    return cd.held_out()[0][:200]


def first(images):
    """The first advice on images for the network that reads digits."""
    return bntools.inspect(cd.trained(), cd.batches(images)).advice[0]


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


def test_far_beyond_the_stored_deviation(images):
    """Data thousands of deviations off is not taken for chance because its own spread is large in stored deviations."""
    found = bntools.inspect(cd.trained(), cd.batches(images * 3e4 + 1e4), alternatives=False).advice[0]
    assert found.action == "reset"
    assert "more than 10 standard deviations" in found.reason


def test_all_the_same(images):
    """One image many times: nothing can be measured, and the reason says what is wrong with the data."""
    for same in (np.full_like(images, 0.5), np.repeat(images[:1], 64, 0)):
        found = first(same)
        assert found.action == "freeze"
        assert "all the same" in found.reason


@pytest.mark.parametrize("place", [5, 150])
def test_a_few_wild_images(images, place):
    """One image that was not divided by 255 is left out by the line given; the others are not divided for its sake."""
    broken = images.copy()
    broken[place] *= 255
    found = first(broken)
    assert found.action == "preprocess"
    assert "1 of 200 images" in found.reason
    mended = {"np": np, "images": broken}
    exec(found.how, mended)
    np.testing.assert_array_equal(mended["images"], np.delete(images, place, 0))


def test_half_of_the_images_in_another_range(images):
    """Two ranges in one data set: not all of it is divided."""
    broken = images.copy()
    broken[::2] *= 255
    found = first(broken)
    assert (found.action, "100 of 200 images" in found.reason) == ("preprocess", True)


def test_black_images(images):
    """Nearly black images among others make these no wild ones: a wrong range of all is still recognized."""
    dark = images * 255
    dark[::3] *= np.float32(1e-4)
    assert wild.limit([dark]) is not None
    assert first(dark).how == "images = images / 255"
