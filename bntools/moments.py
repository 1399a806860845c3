"""Moments: what was measured of a set of values, and how measurements are merged.

All moments are float64. The arithmetic below uses operators only, so that a back end may keep its
moments on the device (a torch tensor) until somebody reads them. Reading waits for the device, which
then has nothing to do: ``at_hand`` tells whether it would.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
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
    def at_hand(self) -> bool:
        """Whether they can be read without waiting for a device."""
        return isinstance(self.mean, np.ndarray)

    @property
    def var(self) -> Array:
        """The variance, shape (features,): ``m2 / count``."""
        return self.m2 / self.count

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together (Chan, Golub and LeVeque 1983, eq. 2.1).

        Of two that lie in different places both are read.
        """
        if not self.count:
            return other
        if not other.count:
            return self
        if self.at_hand != other.at_hand:
            return self.numpy().merge(other.numpy())
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
        return Moments(self.count, to_numpy(self.mean), to_numpy(self.m2))


@dataclass(frozen=True)
class Unread:
    """What a device has measured of ``count`` values: arrays there, in its own precision, which nobody has read yet.

    ``mean`` and ``var`` have shape (features,). ``merged`` makes Moments of them.
    """

    count: float
    mean: Array
    var: Array
    at_hand = False

    def numpy(self) -> Moments:
        """The moments as numpy arrays; waits for the device."""
        mean, var = (to_numpy(values).astype(np.float64) for values in (self.mean, self.var))
        return Moments.from_variance(self.count, mean, var)


@dataclass(frozen=True)
class Arrival:
    """A replica stands at a layer and hands over the moments of the layer's input.

    ``samples`` are the samples' own means, of shape (samples, features), measured only where standard errors are
    wanted: values within one sample are not independent, samples are. They lie where the moments lie. ``values`` is
    the input itself, of shape (values, features), only of layers whose values were asked for.
    """

    layer: str
    moments: Moments | Unread
    samples: Array | None = None
    values: np.ndarray | None = None


def merged(parts: Iterable[Moments | Unread]) -> Moments:
    """The moments of all parts together."""
    known: list[Moments] = []
    alike: dict[float, list[Unread]] = {}
    for part in parts:
        if isinstance(part, Moments):
            known.append(part)
        else:
            alike.setdefault(part.count, []).append(part)
    return reduce(Moments.merge, [*known, *(_of_alike(count, group) for count, group in alike.items())])


def joined(arrays: Sequence[Array]) -> Array:
    """Arrays one behind the other, where they are: on the host, or on one device."""
    return _functions(arrays[0]).concatenate(arrays)


def to_numpy(values: Array) -> np.ndarray:
    """An array of the host's; waits for the device on which it is, if any."""
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def _of_alike(count: float, parts: Sequence[Unread]) -> Moments:
    """Sets of ``count`` values each: the same few operations however many there are.

    Merged one by one they would be a dozen kernels each, thousands a pass, which take longer than to measure.
    """
    stack = _functions(parts[0].mean).stack
    means, variances = stack([part.mean for part in parts]).double(), stack([part.var for part in parts]).double()
    mean = means.mean(0)
    return Moments(count * len(parts), mean, (variances + (means - mean) ** 2).sum(0) * count)


def _functions(array: Array) -> Any:
    """The library whose array this is, which is imported already: numpy, torch."""
    return sys.modules[type(array).__module__]
