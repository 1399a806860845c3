"""An example in other sizes: what a model does at one size need not be what it does at another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from bntools.batches import count
from bntools.errors import BntoolsError
from bntools.resizing import mapped, resized


def other_sizes(example: Any, run: Callable[[Any], object]) -> None:
    """Run the example one sample and one pixel (or step) larger, and a single sample one smaller.

    A model that pads odd sizes, or counts an axis of length 1 into another one, does something else
    there. ``run`` raises BntoolsError for a size that the model does not take; then the number of steps
    alone is tried, then that of samples alone.
    """
    for samples, by in ((count(example) + 1, 1), (1, -1)):
        other = resized(example, samples)
        _first_that_runs([stretched(other, by, range(2, 5)), stretched(other, by, [1]), other], run)


def stretched(batch: Any, by: int, axes: Sequence[int]) -> Any:
    """The batch with its floating arrays longer, or for a negative number shorter, by ``by`` along these axes.

    What is added repeats the start of the axis; axes that an array has not, or that would vanish, stay.
    """

    def one(value: Any) -> Any:
        if "float" not in str(getattr(value, "dtype", "")):
            return value
        for axis in axes:
            if axis < len(value.shape) and value.shape[axis] > max(0, -by):
                picked = [i % value.shape[axis] for i in range(value.shape[axis] + by)]
                value = value[(slice(None),) * axis + (picked,)]
        return value

    return mapped(one, batch)


def _first_that_runs(candidates: Iterable[Any], run: Callable[[Any], object]) -> None:
    for candidate in candidates:
        with suppress(BntoolsError):
            run(candidate)
            return
