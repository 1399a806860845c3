"""Batches as they come: counted, cut to a number of samples, and taken back when they were too many."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bntools.errors import BntoolsError


@dataclass(frozen=True)
class Batch:
    """One micro-batch: what the model gets, its place in the data in words, and how many samples it holds."""

    index: int | str
    content: Any
    samples: int

    def head(self, samples: int) -> Batch:
        """Its first samples, as a batch."""
        taken = min(samples, self.samples)
        return Batch(self.index, _cut(self.content, self.samples, taken), taken)


class Source:
    """Hands out batches one by one, at most ``max_samples`` samples in all, and takes them back."""

    def __init__(self, batches: Any, max_samples: int | None = None):
        self._left = math.inf if max_samples is None else max_samples
        self._batches = batches
        self._iterator: Iterator[Any] | None = None
        self._returned: deque[Batch] = deque()
        self._index = self._read = 0

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.next()) is not None:
            yield batch

    def next(self) -> Batch | None:
        """The next batch, None when there are no more. Empty batches are passed over."""
        if self._returned:
            return self._returned.popleft()
        while self._left > 0:
            try:
                if self._iterator is None:
                    self._iterator = iter(as_iterable(self._batches))
                content = next(self._iterator)
            except StopIteration:
                return None
            except BntoolsError:
                raise
            except Exception as error:
                read = getattr(self._batches, "read", self._index)
                raise BntoolsError(f"the data raised after {read} batches: {said(error)}") from error
            self._index += 1
            if samples := count(content):
                taken = int(min(samples, self._left))
                self._left -= taken
                self._read += taken
                place = getattr(self._batches, "place", self._index - 1)
                return Batch(place, _cut(content, samples, taken), taken)
        return None

    def more(self) -> bool:
        """Whether there is another batch, which is read for that."""
        batch = self.next()
        if batch is not None:
            self.give_back([batch])
        return batch is not None

    def skip(self, samples: int, last: int, *, read: bool) -> Batch | None:
        """Pass over the first ``samples`` samples, the last ``last`` of which are a batch: that batch.

        With ``read`` all batches are read; else data that can begin in the middle (``batches_after``) does. None where
        no batch ends there.
        """
        after = None if read else getattr(self._batches, "batches_after", None)
        found = after(samples - last) if after and samples > last else None
        passed = 0
        if found is not None:
            self._iterator, self._index = found
            passed = samples - last
            self._left -= passed
            self._read += passed
        batch = None
        while passed < samples and (batch := self.next()) is not None:
            passed += batch.samples
        return batch if passed == samples else None

    @property
    def handed(self) -> int:
        """How many samples were handed out and not given back."""
        return self._read - sum(batch.samples for batch in self._returned)

    def give_back(self, batches: Iterable[Batch]) -> None:
        """Take batches back, to be handed out again, in their order, before all others."""
        self._returned.extendleft(reversed(list(batches)))


def as_iterable(batches: Any) -> Iterable[Any]:
    """What was given as batches, as an iterable: a bare array or dict is one batch.

    Raises BntoolsError for what cannot be iterated.
    """
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        return [batches]
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise BntoolsError(f"found a {type(batches).__name__} where batches were expected: an iterable of arrays")
    return batches


def is_repeatable(batches: Any) -> bool:
    """Whether the data can be read a second time: a generator cannot."""
    batches = as_iterable(batches)
    return bool(getattr(batches, "repeatable", not hasattr(batches, "__next__")))


def count(content: Any) -> int:
    """How many samples a batch holds: the first axis of its first array; in a dict, of the first that has axes.

    Raises BntoolsError for what is not a batch: an array, a tuple or list whose first element is the
    input (an array, or a list of samples of different shapes), or a dict of arrays.
    """
    first = content
    if isinstance(content, Mapping):
        values = list(content.values())
        first = next((value for value in values if getattr(value, "shape", ())), values[0] if values else None)
    elif isinstance(content, (tuple, list)):
        first = content[0] if content else None
    if isinstance(first, (tuple, list)):
        return len(first)
    shape = getattr(first, "shape", None)
    if shape is None:
        raise BntoolsError(
            f"found a batch of type {type(content).__name__} without an array at its first place; expected an array, "
            f"a tuple or list whose first element is the input, or a dict of keyword inputs"
        )
    return int(shape[0]) if len(shape) else 1


def shapes_of(batch: Any) -> str:
    """The shapes of a batch, for messages."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {shapes_of(value)}" for key, value in batch.items())
    value = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    shape = getattr(value, "shape", None)
    return str(tuple(shape)) if shape is not None else type(value).__name__


def said(error: BaseException) -> str:
    """An error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _cut(content: Any, samples: int, taken: int) -> Any:
    """The first samples of a batch, in whatever structure it comes."""
    if taken == samples:
        return content
    if isinstance(content, Mapping):
        return {key: _first(value, samples, taken) for key, value in content.items()}
    if isinstance(content, (tuple, list)):
        parts = [_first(value, samples, taken) for value in content]
        return type(content)(*parts) if hasattr(content, "_fields") else type(content)(parts)
    return _first(content, samples, taken)


def _first(value: Any, samples: int, taken: int) -> Any:
    """The first of what has one entry a sample: an array, or a list; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return value[:taken] if len(value) == samples else value
    shape: tuple[int, ...] = getattr(value, "shape", ())
    return value[:taken] if shape and shape[0] == samples else value
