"""How the mean over the samples settles as they come: the moments of the first 2, 4, 8, ... of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from bntools.moments import Moments

GOALS = (0.05, 0.01)  # standard errors, in standard deviations, for which the samples needed are said
FIRST = 2  # samples: one alone has no standard error
APART = 1.5  # a point has so many times the samples of the one before: a million virtual batches leave few


@dataclass
class Course:
    """Moments over the samples' own means, as more and more samples come.

    Values within one sample are not independent, samples are: the standard error of a mean is that of these means.
    ``points`` are the moments of the first 2, 4, 8, ... samples, and where courses came together of other numbers, each
    at least half again as many as the one before; ``total`` those of all.
    """

    total: Moments = field(default_factory=lambda: Moments(0, np.zeros(0), np.zeros(0)))
    points: list[Moments] = field(default_factory=list)

    def add(self, means: np.ndarray) -> None:
        """Take in the next samples' means, of shape (samples, features), in the order in which the samples came."""
        start = 0
        while start < len(means):
            count = int(self.total.count) + 1
            border = max(FIRST, 1 << (count - 1).bit_length())
            stop = min(len(means), start + border - count + 1)
            self.total = self.total.merge(Moments.of(means[start:stop]))
            start = stop
            if self.total.count == border:
                self.points.append(self.total)

    def include(self, other: Course) -> None:
        """Take in samples that came after these."""
        for point in (*other.points, other.total):
            least = APART * self.points[-1].count if self.points else FIRST
            if self.total.count + point.count >= least:
                self.points.append(self.total.merge(point))
        self.total = self.total.merge(other.total)

    def settling(self) -> Iterator[Moments]:
        """The points, and the total at the end."""
        yield from (point for point in self.points if point.count < self.total.count)
        yield self.total


def convergence(courses: Mapping[str, Course], stds: Mapping[str, np.ndarray], samples: int) -> list[tuple[int, float]]:
    """How the standard error of the worst channel's mean fell: pairs of a number of samples and the error.

    The error is in the standard deviations ``stds`` of each layer, of shape (features,). A layer that
    is called several times for a sample, or not for each, is left out: it has seen other numbers of means.
    """
    curves = [(stds[name], course) for name, course in courses.items() if course.total.count == samples]
    worst: dict[int, float] = {}
    for std, course in curves:
        for point in course.settling():
            if point.count >= FIRST:
                worst[int(point.count)] = max(worst.get(int(point.count), 0.0), standard_error(point, std))
    return sorted(worst.items())


def standard_error(moments: Moments, std: np.ndarray) -> float:
    """The standard error of the mean over samples, of the channel where it is largest, in ``std``."""
    errors = moments.standard_error()
    with np.errstate(divide="ignore", invalid="ignore"):
        return largest(np.where(errors == 0, 0.0, errors / std))  # 0 / 0 in a dead channel with eps=0


def needed(samples: int, error: float, target: float) -> int:
    """How many samples bring a standard error, which so many had, down to a target: to two digits, rounded up."""
    wanted = max(2.0, samples * (error / target) ** 2)
    unit = 10 ** max(0, math.floor(math.log10(wanted)) - 1)
    return math.ceil(wanted / unit) * unit


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; infinite where one is not a number."""
    found = float(np.max(np.asarray(values), initial=0.0))
    return float("inf") if np.isnan(found) else found
