"""A Python function as a source of batches, called anew each time they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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
    begun: list[Any] = field(default_factory=list)  # what was made to look at, for the first reading

    samples = None  # only reading it all could tell
    drawn = False  # nobody can draw from a function

    def batches(self, most: int | None = None) -> Iterator[Any]:
        """The batches as they come, cut to the samples that are wanted: nobody can draw from a function."""
        made = self.begun.pop() if self.begun else self._made()
        try:
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

    def begin(self) -> Any:
        """What the function returns, kept for the first reading."""
        self.begun.append(self._made())
        return self.begun[0]

    def check(self) -> None:
        """Refuse options that nobody but the function itself could obey. Raises BntoolsError."""
        reading = self.reading
        if reading.size or reading.mean or reading.preprocess or reading.column is not None:
            raise BntoolsError(
                f"data {self.source!r}: size, mean, std, preprocess and column are for images and arrays; a factory "
                f"does its own"
            )

    def _made(self) -> Any:
        try:
            return self.factory() if callable(self.factory) else self.factory
        except Exception as error:
            raise BntoolsError(f"data {self.source!r}: calling it failed: {said(error)}") from error

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
    """Import the factory. Raises BntoolsError where there is none."""
    return Factory(source, reading, imports.named(source, "data"))
