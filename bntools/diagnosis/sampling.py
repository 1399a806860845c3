"""A sample of the data as one batch, from which batches of any size are cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bntools.batches import Batch
from bntools.diagnosis.pieces import sliced
from bntools.errors import BntoolsError
from bntools.resizing import to_numpy


@dataclass(frozen=True)
class Sample:
    """Some samples as one batch, in the structure in which the data came.

    ``bound`` is the only batch size that the model takes, None where it takes any.
    """

    content: Any
    samples: int
    bound: int | None = None

    def head(self, samples: int) -> Any:
        """The first samples, as a batch."""
        return sliced(self.content, 0, min(samples, self.samples))

    def taken(self, most: int) -> list[Any]:
        """The first samples, at most so many, as the model takes them: as one batch, or as batches of the one size."""
        if self.bound is None:
            return [self.head(most)]
        return self.parts(self.bound, max(1, most // self.bound))

    def all_of_it(self, size: int) -> list[Any]:
        """All samples, in batches of this size and a smaller last one."""
        return [sliced(self.content, start, start + size) for start in range(0, self.samples, size)]

    def parts(self, size: int, most: int) -> list[Any]:
        """At most so many batches of exactly this size; what fills none is left out."""
        starts = range(0, self.samples - size + 1, size)[:most]
        return [sliced(self.content, start, start + size) for start in starts]


def sampled(batches: Iterable[Batch], most: int) -> Sample:
    """The first samples of the batches, at most so many, as one batch.

    Raises BntoolsError for batches that differ in their structure or in the shapes of their samples.
    """
    taken: list[Batch] = []
    left = most
    for batch in batches:
        if left > 0:
            taken.append(batch.head(left))
            left -= taken[-1].samples
    samples = [batch.samples for batch in taken]
    return Sample(_joined([batch.content for batch in taken], samples), sum(samples))


def _joined(values: Sequence[Any], samples: Sequence[int]) -> Any:
    """Values of the same place in several batches as one; what has no entry for each sample is the first's."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Mapping):
        _check(all(isinstance(value, Mapping) and value.keys() == first.keys() for value in values))
        return {key: _joined([value[key] for value in values], samples) for key in first}
    if isinstance(first, (tuple, list)):
        if all(isinstance(v, list) and len(v) == n for v, n in zip(values, samples, strict=True)):
            return [one for value in values for one in value]
        _check(all(isinstance(value, (tuple, list)) and len(value) == len(first) for value in values))
        parts = [_joined(each, samples) for each in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if not getattr(first, "shape", ()) or first.shape[0] != samples[0]:
        return first
    _check(all(tuple(getattr(value, "shape", ()))[1:] == tuple(first.shape[1:]) for value in values))
    return _stacked(values, sum(samples))


def _stacked(values: Sequence[Any], samples: int) -> Any:
    if not hasattr(values[0], "new_empty"):  # which tensors of PyTorch have, on their own device
        return np.concatenate([to_numpy(value) for value in values])
    whole, start = values[0].new_empty((samples, *values[0].shape[1:])), 0
    for value in values:
        whole[start : start + len(value)] = value
        start += len(value)
    return whole


def _check(alike: bool) -> None:
    if not alike:
        raise BntoolsError("its batches differ in the shapes of their samples, so that they cannot be joined")
