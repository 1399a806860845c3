"""Replicas that walk from layer to layer, and in which order layers come.

A replica is whatever a back end's ``measuring`` starts: ``advance()`` runs it on to its next layer and
returns the Arrival (None at its end), ``close()`` ends it early, ``held()`` is the memory it
holds while it waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bntools.batches import Batch, said
from bntools.errors import BntoolsError
from bntools.moments import Arrival
from bntools.runner import Outputs


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

    def __init__(self, layers: list[str], before: set[tuple[str, str]] | None = None):
        self.layers = layers
        self._index = {name: i for i, name in enumerate(layers)}
        self.before = set() if before is None else before  # pairs of layers of which one leads to the other

    def learn(self, before: str, after: str) -> bool:
        """Remember that one layer leads to another; False if that was known."""
        new = (before, after) not in self.before
        self.before.add((before, after))
        return new

    def first(self, places: set[str], paths: Iterable[tuple[str, ...]]) -> str:
        """The layer to release, of those at which walkers wait: one that none of them can still be on its way to.

        ``paths`` are the layers that they have passed.
        """
        if len(places) == 1:
            return next(iter(places))
        paths = set(paths)
        free = [x for x in places if not any(self._leads(w, x, paths) for w in places - {x})]
        return min(free or places, key=self._index.__getitem__)

    def _leads(self, before: str, after: str, paths: set[tuple[str, ...]]) -> bool:
        return self._known(before, after, paths) and not self._known(after, before, paths)

    def _known(self, before: str, after: str, paths: set[tuple[str, ...]]) -> bool:
        if (before, after) in self.before:
            return True
        return any(before in path and after in path[path.index(before) + 1 :] for path in paths)
