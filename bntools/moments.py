"""Moments: what was measured of a set of values, and how measurements are merged.

All moments are float64. The arithmetic below uses operators only, so that a back end may keep its
moments on the device (a torch tensor) until somebody reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

Array = Any  # a float64 numpy array or a device tensor of shape (features,)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, per channel.

    ``mean`` and ``m2`` have shape (features,) and dtype float64. The variance is the plain second
    moment, ``m2 / count``: batch normalization normalizes with it, so the divisor is ``count`` and
    not ``count - 1`` everywhere in bntools.
    """

    count: float
    mean: Array
    m2: Array

    @classmethod
    def of(cls, values: Any, axis: int = 1) -> Moments:
        """Measure an array of any shape whose channels lie on ``axis``.

        Two passes in float64: the sum of squares minus the square of the sum loses everything
        when the mean is large against the spread.
        """
        rows = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        if not len(rows):
            return cls(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
        mean = rows.mean(axis=0)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0))

    @classmethod
    def from_variance(cls, count: float, mean: Array, var: Array) -> Moments:
        """The moments of ``count`` values with this mean and variance."""
        return cls(count, mean, var * count)

    @property
    def var(self) -> Array:
        """The variance, shape (features,): ``m2 / count``."""
        return self.m2 / self.count

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        if not self.count:
            return other
        if not other.count:
            return self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta * delta * (self.count * other.count / count),
        )

    def blend(self, prior: Moments, samples: float, prior_samples: float) -> Moments:
        """Weigh these moments, worth ``samples``, against a prior worth ``prior_samples``.

        ``(N * stored + n * measured) / (N + n)`` on the mean and on the second moment is what
        merging sets of those sizes gives.
        """
        if not prior_samples:
            return self
        stored = Moments.from_variance(prior_samples, prior.mean, prior.var)
        return stored.merge(Moments.from_variance(samples, self.mean, self.var))

    def standard_error(self) -> Array:
        """Standard error of the mean when the values are independent, shape (features,)."""
        return (self.var / max(self.count - 1, 1)) ** 0.5 if self.count > 1 else self.var + math.inf

    def numpy(self) -> Moments:
        """The same moments as numpy arrays, wherever they were measured."""
        return Moments(self.count, _to_numpy(self.mean), _to_numpy(self.m2))


@dataclass(frozen=True)
class Arrival:
    """A replica stands at a layer and hands over the moments of the layer's input.

    ``samples`` are the samples' own means, of shape (samples, features), measured only where standard errors are
    wanted: values within one sample are not independent, samples are. ``values`` is the input itself, of
    shape (values, features), only of layers whose values were asked for.
    """

    layer: str
    moments: Moments
    samples: np.ndarray | None = None
    values: np.ndarray | None = None


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    return reduce(Moments.merge, parts)


def _to_numpy(values: Array) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
