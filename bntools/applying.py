"""The verb apply: store statistics that were taken elsewhere in a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bntools import backends
from bntools.errors import BntoolsError
from bntools.fitting import check_fit
from bntools.interrupts import uninterrupted
from bntools.layer import BatchNorm
from bntools.statfiles import load_stats
from bntools.stats import Statistics

Source = Statistics | str | os.PathLike[str]
Written = Mapping[str, tuple[Any, Any, int | None]]


class Applied:
    """What ``apply`` returns: undoes it by ``undo()`` or at the end of a ``with`` block.

    ``layers`` names those that got other statistics, ``notes`` are sentences worth reading. Undoing twice does no more
    than undoing once.
    """

    def __init__(self, layers: list[str], notes: list[str], undo: Callable[[], None]):
        self.layers = layers
        self.notes = notes
        self._undo: Callable[[], None] | None = undo

    def undo(self) -> None:
        """Give the model back the statistics that it had before."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._undo is None else "applied"
        return f"<statistics of {len(self.layers)} BN layer{'s' * (len(self.layers) != 1)} {state}>"


@backends.one_at_a_time
def apply(model: Any, stats: Source, *, strict: bool = True) -> Applied:
    """Store statistics, or those of a file that ``save_stats`` wrote, in a model, in place.

    Statistics belong to the weights behind which they were measured: they are refused where names or features of
    the layers differ, and unless ``strict=False`` also where eps, axis or any weight outside of BN statistics does.
    Those of a PyTorch module apply to its ONNX file, whose layers have the same names: there scale and shift of
    all layers have to agree instead of the weights. Frozen layers get theirs as well.

    Raises BntoolsError, leaving the model as it was, where they do not fit or cannot be stored.

        handle = bntools.apply(model, "hall2.safetensors")     # handle.undo()
    """
    taken, backend = opened(stats), backends.of(model)
    model = backend.edit(model)
    with naming(stats):
        found, notes = check_fit(taken, backend, model, strict=strict)
    before: Written = {layer.name: (*layer.stats, layer.updates) for layer in found}
    counters = backends.counters(model)

    def undo() -> None:
        with uninterrupted():
            backend.write(model, before)
            backend.commit(model)
            counters()

    try:
        with uninterrupted():
            backend.write(model, wanted(taken, found))
            backend.commit(model)
    except BaseException:
        with uninterrupted():
            backend.write(model, before)
            counters()
        raise
    return Applied([layer.name for layer in found], notes, undo)


def opened(stats: Source) -> Statistics:
    """Statistics as they are, or those in a file. Raises BntoolsError for anything else."""
    if isinstance(stats, Statistics):
        return stats
    if isinstance(stats, (str, os.PathLike)):
        return load_stats(stats)
    raise BntoolsError(
        f"found a {type(stats).__name__} where statistics were expected: what bntools.statistics(model) or "
        f"bntools.load_stats(path) returns, or the path of such a file"
    )


@contextmanager
def naming(stats: Source) -> Iterator[None]:
    """Put the file that statistics came from before what is said of them."""
    try:
        yield
    except BntoolsError as error:
        if isinstance(stats, Statistics):
            raise
        raise BntoolsError(f"{os.fspath(stats)}: {error}") from error


def wanted(stats: Statistics, found: list[BatchNorm]) -> Written:
    """What a back end is to write: mean, variance and the number of updates, by layer name."""
    return {layer.name: (stats[layer.name].mean, stats[layer.name].var, _updates(stats, layer)) for layer in found}


def _updates(stats: Statistics, layer: BatchNorm) -> int | None:
    """Where nobody counted, so many that ``inspect`` does not take the initial value to be still inside."""
    counted = stats[layer.name].updates
    if counted is not None or layer.updates is None:
        return counted
    return max(layer.updates, layer.forgets_after)
