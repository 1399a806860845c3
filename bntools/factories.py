"""A Python function as a source of batches, called anew each time they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bntools import imports
from bntools.batches import Source, said
from bntools.errors import BntoolsError
from bntools.reading import Reading


@dataclass(frozen=True)
class Factory:
    """What ``package.module:name`` stands for: a function that returns batches, or a re-readable iterable of them."""

    source: str
    reading: Reading
    factory: Any

    samples = None  # only reading it all could tell

    def batches(self, most: int | None = None) -> Iterator[Any]:
        """The batches as they come, cut to the samples that are wanted: nobody can draw from a function."""
        try:
            made = self.factory() if callable(self.factory) else self.factory
            again = iter(made)
        except Exception as error:
            raise BntoolsError(f"data {self.source!r}: calling it failed: {said(error)}") from error
        if again is made and not callable(self.factory):
            raise BntoolsError(f"data {self.source!r}: can be read only once; name the function that makes it")
        limits = [limit for limit in (most, self.reading.max_samples) if limit is not None]
        given = again if limits else self._to_the_end(again, _length(made))
        batches = (batch.content for batch in Source(given, min(limits, default=None)))
        rank, count, _ = self.reading.shard or (0, 1, 1)
        return batches if most else islice(batches, rank, None, count)

    def _to_the_end(self, batches: Iterator[Any], announced: int | None) -> Iterator[Any]:
        read = 0
        for batch in batches:
            read += 1
            yield batch
        if announced is not None and read < announced:
            raise BntoolsError(
                f"data {self.source!r}: ended after {read} batches, although it has {announced} by its own account"
            )

    def details(self) -> dict[str, Any]:
        """What was read and how, for the record."""
        return {}

    def description(self) -> str:
        """What was read, in a line."""
        limit = self.reading.max_samples
        return f"batches from {self.source}" + (f", the first {limit:,} samples" if limit else "")


def _length(made: Any) -> int | None:
    """How many batches an iterable says it has; None where it does not tell."""
    try:
        return len(made)
    except (TypeError, NotImplementedError):  # PyTorch's and Keras's classes may have a length that only raises
        return None


def find(source: str, reading: Reading) -> Factory:
    """Import the factory. Raises BntoolsError where there is none, or for options that it cannot obey."""
    if reading.size or reading.mean or reading.preprocess:
        raise BntoolsError(
            f"data {source!r}: size, mean, std and preprocess are for images and arrays; a factory does its own"
        )
    return Factory(source, reading, imports.named(source, "data"))
