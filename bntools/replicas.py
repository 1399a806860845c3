"""Every replica waits at every BN layer: all micro-batches run as one big batch.

The statistics of a layer depend on those of all layers before it. So each micro-batch runs up to a layer
and stops there; when all that can still reach the layer stand at it, their moments are merged, the
layer's statistics become the merged ones, and all go on. One forward pass of compute gives what one
batch of the whole data would give, whatever the size of the micro-batches.

A replica is whatever a back end's ``measuring`` starts: ``advance()`` runs it on to its next layer and
returns the Arrival (None at its end), ``close()`` ends it early, ``held()`` is the memory it
holds while it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from bntools.batches import Batch, Source, said
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.measured import Measured
from bntools.moments import Arrival, Moments, merged
from bntools.runner import Outputs

Progress = Callable[[str, int], None]  # what is done, and for how many samples so far


class Replica(Protocol):
    """One micro-batch on its way through the model."""

    def advance(self) -> Arrival | None:
        """Run on to the next layer; None when the forward pass has come to its end."""

    def close(self) -> None:
        """End it where it stands."""

    def held(self) -> int:
        """Bytes held while it waits."""

    def outputs(self) -> Outputs:
        """What the model gave, by name, once it has come to its end; where outputs were asked for."""


class Walker:
    """A replica, the layers that it has passed and the one at which it stands."""

    def __init__(self, replica: Replica, batch: Batch):
        self.replica = replica
        self.batch = batch
        self.path: list[str] = []
        self.arrival: Arrival | None = None

    @property
    def met(self) -> Arrival:
        """The arrival of a walker that is known to wait."""
        assert self.arrival is not None
        return self.arrival

    def advance(self) -> None:
        """Run on to the next layer; a model that raises is named with the batch it failed on."""
        try:
            self.arrival = self.replica.advance()
        except BntoolsError:
            raise
        except Exception as error:
            raise BntoolsError(f"the model failed on batch {self.batch.index}: {said(error)}") from error
        if self.arrival is not None:
            self.path.append(self.arrival.layer)

    def stands_at(self, layer: str) -> bool:
        """Whether it waits at this layer."""
        return self.arrival is not None and self.arrival.layer == layer


class Order:
    """Which layer comes before which, as far as the replicas have shown; definition order otherwise.

    Only needed where replicas part ways: one stands before an optional block, another behind it.
    """

    def __init__(self, layers: list[str]):
        self.layers = layers
        self._index = {name: i for i, name in enumerate(layers)}
        self._before: set[tuple[str, str]] = set()

    def learn(self, before: str, after: str) -> bool:
        """Remember that one layer leads to another; False if that was known."""
        new = (before, after) not in self._before
        self._before.add((before, after))
        return new

    def first(self, walkers: list[Walker]) -> str:
        """The layer to release: one that none of the waiting walkers can still be on its way to."""
        places = {walker.arrival.layer for walker in walkers if walker.arrival is not None}
        free = [x for x in places if not any(self._leads(w, x, walkers) for w in places - {x})]
        return min(free or places, key=self._index.__getitem__)

    def _leads(self, before: str, after: str, walkers: list[Walker]) -> bool:
        return self._known(before, after, walkers) and not self._known(after, before, walkers)

    def _known(self, before: str, after: str, walkers: list[Walker]) -> bool:
        if (before, after) in self._before:
            return True
        return any(before in w.path and after in w.path[w.path.index(before) + 1 :] for w in walkers)


class _TooManyError(Exception):
    """The replicas hold more than memory allows; ``fits`` of them would do."""

    def __init__(self, fits: int):
        self.fits = fits


class _LateError(Exception):
    """A replica came to a layer after its release; the order of layers has been learned."""


def virtual_batch(
    start: Callable[[object], Replica],
    source: Source,
    order: Order,
    release: Callable[[str, Moments, int], None],
    *,
    memory: float,
    wanted: float,
    progress: Progress,
) -> Measured | None:
    """Run one virtual batch: about ``wanted`` samples, or as many as fit in ``memory`` bytes.

    ``release(layer, moments, samples)`` writes a layer's statistics when all replicas stand there. Where
    the replicas turn out to hold too much, or a layer was released too early, the same batches run
    again: all writes repeat. Returns None when the source is empty.
    """
    fits: float = float("inf")
    while True:
        walkers: list[Walker] = []
        try:
            _admit(walkers, start, source, memory, wanted, fits, progress)
            return _walk(walkers, order, release, memory, progress) if walkers else None
        except _TooManyError as too_many:
            fits = too_many.fits
            source.give_back(walker.batch for walker in walkers)
        except _LateError:
            fits = len(walkers)
            source.give_back(walker.batch for walker in walkers)
        finally:
            with uninterrupted():
                for walker in walkers:
                    walker.replica.close()


def one_by_one(start: Callable[[object], Replica], batches: Iterable[Batch], what: str, progress: Progress) -> Measured:
    """Run the batches one after the other, without waiting, and pool what they meet."""
    measured = Measured()
    for batch in batches:
        walker = Walker(start(batch.content), batch)
        try:
            walker.advance()
            while walker.arrival is not None:
                _check_finite([walker], walker.arrival.layer)
                measured.add(walker.arrival)
                walker.advance()
        finally:
            with uninterrupted():
                walker.replica.close()
        measured.samples += batch.samples
        _count_calls(measured, [walker])
        progress(what, measured.samples)
    return measured


def _admit(
    walkers: list[Walker],
    start: Callable[[object], Replica],
    source: Source,
    memory: float,
    wanted: float,
    fits: float,
    progress: Progress,
) -> None:
    """Start replicas, each up to its first layer, while they fit."""
    samples = held = 0
    while samples < wanted and len(walkers) < fits:
        if walkers and held * (1 + 1 / len(walkers)) > memory:
            return
        batch = source.next()
        if batch is None:
            return
        walkers.append(Walker(start(batch.content), batch))
        walkers[-1].advance()
        samples += batch.samples
        held += walkers[-1].replica.held()
        progress("reading", samples)


def _walk(
    walkers: list[Walker],
    order: Order,
    release: Callable[[str, Moments, int], None],
    memory: float,
    progress: Progress,
) -> Measured:
    """Release layer after layer until every replica has come to its end."""
    samples = sum(walker.batch.samples for walker in walkers)
    measured = Measured(samples, batches=[walker.batch for walker in walkers])
    elsewhere: dict[tuple[str, int], dict[Walker, str]] = {}
    while live := [walker for walker in walkers if walker.arrival is not None]:
        layer = order.first(live)
        here = [walker for walker in live if walker.stands_at(layer)]
        _check_late(here, layer, order, elsewhere, measured)
        for walker in here:
            elsewhere[layer, walker.path.count(layer)] = {w: w.met.layer for w in live if not w.stands_at(layer)}
        _check_finite(here, layer)
        for walker in here:
            measured.add(walker.met)
        release(layer, measured.moments[layer], samples)
        for walker in here:
            walker.advance()
            if walker is here[0]:
                _check_memory(walker, live, memory)
        progress("recalibrating", samples * len(measured.moments) // len(order.layers))
    _count_calls(measured, walkers)
    return measured


def _check_late(
    here: list[Walker],
    layer: str,
    order: Order,
    elsewhere: dict[tuple[str, int], dict[Walker, str]],
    measured: Measured,
) -> None:
    for walker in here:
        released = elsewhere.get((layer, walker.path.count(layer)))
        if released is None:
            continue
        if order.learn(released.get(walker, layer), layer):
            raise _LateError
        measured.late.add(layer)


def _check_finite(here: list[Walker], layer: str) -> None:
    """Refuse NaN and Inf, naming layer and batch; one look at the merged moments is enough if all is well."""
    if _finite(merged(walker.met.moments for walker in here)):
        return
    bad = next((w for w in here if not _finite(w.met.moments)), here[0])
    raise BntoolsError(
        f"batch {bad.batch.index} brings NaN or Inf to the input of layer {layer!r}: look at that batch, or at the "
        f"weights and the number range before the layer. Nothing was changed"
    )


def _finite(moments: Moments) -> bool:
    moments = moments.numpy()
    return bool(np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all())


def _check_memory(first: Walker, live: list[Walker], memory: float) -> None:
    """Raise _TooManyError, before the others follow, where all would hold too much at the first one's next stop."""
    if first.arrival is None or len(live) < 2:
        return
    held = first.replica.held() / first.batch.samples * sum(walker.batch.samples for walker in live)
    if held > memory:
        raise _TooManyError(max(1, int(len(live) * memory / held)))


def _count_calls(measured: Measured, walkers: list[Walker]) -> None:
    for walker in walkers:
        for layer in set(walker.path):
            measured.calls[layer] = max(measured.calls.get(layer, 0), walker.path.count(layer))
