"""What was measured and lies on a device until it is read: for many layers at once.

Every reading waits for the device. A wait at each layer would leave a GPU with nothing to do for as long as Python
takes to queue the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from bntools.batches import Batch
from bntools.errors import BntoolsError
from bntools.measured import Measured
from bntools.moments import Arrival, Moments, Unread, joined, merged, to_numpy


def check_finite(layer: str, moments: Moments, parts: Iterable[tuple[Batch, Arrival]]) -> None:
    """Refuse NaN and Inf, naming layer and batch; one look at the merged moments is enough if all is well."""
    if not _finite(moments):
        parts = list(parts)
        raise _refusal(layer, next((batch for batch, arrival in parts if not _finite(arrival.moments)), parts[0][0]))


class Later:
    """Arrivals that are to be read later, by layer, and the batches that they come from."""

    def __init__(self) -> None:
        self._met: dict[str, list[tuple[Batch, Arrival]]] = {}
        self._batches: dict[int, Batch] = {}

    @property
    def batches(self) -> int:
        """From how many batches they come."""
        return len(self._batches)

    def add(self, batch: Batch, arrival: Arrival) -> None:
        """Keep an arrival."""
        self._met.setdefault(arrival.layer, []).append((batch, arrival))
        self._batches[id(batch)] = batch

    def read(self, into: Measured, *, pool: bool) -> None:
        """Read everything: the courses, and with ``pool`` the moments too, go into what was measured.

        Raises BntoolsError for NaN and Inf.
        """
        self.check()
        for layer, parts in self._met.items():
            if pool:
                into.pool(layer, merged(arrival.moments for _, arrival in parts))
            if parts[0][1].samples is not None:
                samples = to_numpy(joined([arrival.samples for _, arrival in parts]))
                into.follow(replace(parts[0][1], samples=samples.astype(np.float64)))
        self._met.clear()
        self._batches.clear()

    def check(self) -> None:
        """Raise BntoolsError for NaN and Inf; the first layer is named that has met them."""
        for layer, parts in self._met.items():
            found = [arrival.moments for _, arrival in parts]
            values = joined([value for each in found if isinstance(each, Unread) for value in (each.mean, each.var)])
            if not np.isfinite(to_numpy(values)).all():
                raise _refusal(layer, next(batch for batch, arrival in parts if not _finite(arrival.moments)))

    @contextmanager
    def checked_on_failure(self) -> Iterator[None]:
        """What a model raises may come from NaN and Inf that nobody has looked at yet: then these are named."""
        try:
            yield
        except Exception:
            self.check()
            raise


def _finite(moments: Moments | Unread) -> bool:
    moments = moments.numpy()
    return bool(np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all())


def _refusal(layer: str, batch: Batch) -> BntoolsError:
    return BntoolsError(
        f"batch {batch.index} brings NaN or Inf to the input of layer {layer!r}: look at that batch, or at the "
        f"weights and the number range before the layer. Nothing was changed"
    )
