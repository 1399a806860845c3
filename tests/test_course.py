"""Courses: how the mean over samples settles, in few points however many parts come together."""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools.course import Course, convergence

MEANS = np.random.default_rng(0).standard_normal((3000, 4)) + 5


def course_of(parts) -> Course:
    """The courses of parts, each taken by itself, come together."""
    whole = Course()
    for part in parts:
        one = Course()
        one.add(part)
        whole.include(one)
    return whole


@pytest.mark.parametrize("size", [1, 7, 100, 3000])
def test_points_are_few_and_each_is_what_the_first_samples_say(size):
    """Parts of any size leave some points, far apart, each the moments of the first samples, to 1e-12."""
    course = course_of(np.split(MEANS, range(size, len(MEANS), size)))
    assert 5 < len(course.points) < 25
    assert all(b.count >= 1.5 * a.count for a, b in pairwise(course.points))
    for point in (*course.points, course.total):
        first = MEANS[: int(point.count)]
        np.testing.assert_allclose(point.mean, first.mean(0), rtol=1e-12)
        np.testing.assert_allclose(point.var, first.var(0), rtol=1e-12)


def test_the_curve_falls_as_for_independent_samples():
    """From 2 samples to all of them, with the square root of their number."""
    curve = convergence({"bn": course_of(np.split(MEANS, 30))}, {"bn": np.ones(4)}, len(MEANS))
    assert (curve[0][0], curve[-1][0]) == (2, 3000)
    assert all(0.4 < error * count**0.5 < 2 for count, error in curve[3:])


@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-9}, {"method": "precise"}], ids=str)
def test_a_stream_is_not_kept(options):
    """Of batches that come as they are asked for no more than some are alive at a time, nor of their moments."""
    alive, most = [0], [0]

    def gone():
        alive[0] -= 1

    def stream():
        for seed in range(120):
            batch = np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(batch, gone)
            yield batch

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    result = bntools.recalibrate(model, stream(), memory=2000, check=False, **options)
    assert result.samples == 960
    assert most[0] < 40
    assert len(result.convergence) < 25
    assert torch.isfinite(model[2].running_var).all()


def test_enough_keeps_its_promise():
    """A tolerance takes a small share of the samples, and the means are those of all of them to the promised error.

    Over five draws the worst of all channels is within 4.5 tolerances, as the worst of so many normal numbers is, and
    the distance in standard errors is 1 at most on average: stopping once the error is small enough does not bias it.
    """
    generator = torch.Generator().manual_seed(0)
    light = torch.randn(6000, 4, 1, generator=generator)  # what the pixels of one image have in common
    images = light * torch.rand(4, 1, generator=generator) + torch.randn(6000, 4, 12, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.BatchNorm1d(8))
    everything = copy.deepcopy(model)
    bntools.recalibrate(everything, images.split(500), check=False)
    squares = []
    for seed in range(5):
        one = copy.deepcopy(model)
        drawn = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
        result = bntools.recalibrate(one, drawn.split(20), tolerance=0.04, check=False)
        assert result.samples < 0.25 * len(images)
        assert result.standard_error <= 0.04
        assert result.convergence[-1] == (result.samples, result.standard_error)
        for found, expected in zip(bntools.inspect(one), bntools.inspect(everything), strict=True):
            off = np.abs(found.mean - expected.mean) / expected.std
            assert off.max() < 4.5 * 0.04
            squares.append((off / result.standard_error) ** 2)
    assert np.concatenate(squares).mean() < 1
