"""What the callbacks of all libraries share: how long to wait, and recalibrating a model that trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from math import inf
from numbers import Integral
from typing import Any

import numpy as np

from bntools import backends
from bntools.batches import is_repeatable
from bntools.digests import digest
from bntools.errors import BntoolsError
from bntools.inspection import inspect
from bntools.layer import Selection, Stats, distance
from bntools.recalibrated import SUSPECT, Recalibration
from bntools.recalibration import recalibrate

UNITS = ("epochs", "steps")


def check_after(after: Any, unit: str) -> int:
    """``after`` as a number of ``unit``. Raises BntoolsError for anything else."""
    if unit not in UNITS:
        raise BntoolsError(f"found unit={unit!r}, expected one of {', '.join(UNITS)}")
    if not isinstance(after, Integral) or isinstance(after, bool) or after < 0:
        raise BntoolsError(f"after={after!r}: expected a number of {unit}, 0 or more")
    return int(after)


class Recalibrator:
    """Recalibrates a model again and again on the same data, but not twice for the same weights and statistics.

    ``kinds`` says in words what data the library's users would give. ``results`` holds a Recalibration for each time.
    Raises BntoolsError for data that can be read only once.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        method: str,
        prior: float,
        layers: Selection,
        forward: Callable[[Any, Any], Any] | None,
        memory: int | None,
        tolerance: float | None,
        max_samples: int | None,
        check: bool,
        kinds: str,
    ):
        if not is_repeatable(batches):
            raise BntoolsError(
                f"found a {type(batches).__name__}, which can be read only once, where data for several recalibrations "
                f"was expected: give {kinds}"
            )
        self.batches, self.method, self.prior, self.layers, self.forward = batches, method, prior, layers, forward
        self.memory, self.tolerance, self.max_samples, self.check = memory, tolerance, max_samples, check
        self.results: list[Recalibration] = []
        self._done = ""

    def __call__(self, model: Any) -> None:
        """Recalibrate the model, unless all of its statistics are frozen, which a warning says.

        In a distributed training every process measures, and all get the statistics of the first: what they have
        measured differs by rounding where their devices do. Raises BntoolsError, on every process, where it differs
        by more, or one of them has failed.
        """
        if self.layers is None and all(layer.stats_frozen for layer in inspect(model)):
            warnings.warn(
                "RecalibrateBatchNorm did nothing: all BN layers are frozen. Name those to recalibrate all the same in "
                "layers= ('*' for all of them)",
                stacklevel=2,
            )
            return
        if _state(model) == self._done:
            return
        if self.prior:
            # In training each process moves its own statistics; DDP takes the first's with the next batch.
            _store(model, _on_all_ranks(model, _statistics(model))[0])
        try:
            result = recalibrate(
                model,
                self.batches,
                method=self.method,
                prior=self.prior,
                layers=self.layers,
                forward=self.forward,
                memory=self.memory,
                tolerance=self.tolerance,
                max_samples=self.max_samples,
                check=self.check,
            )
        except Exception:
            _on_all_ranks(model, None)  # where the others wait
            raise
        try:
            _agree(model, result)
        except BntoolsError:
            result.undo()
            raise
        self.results.append(result)
        self._done = _state(model)


def _state(model: Any) -> str:
    """A digest of weights and statistics."""
    numbers = [np.ascontiguousarray(values).data for both in _statistics(model).values() for values in both]
    return digest(backends.of(model).digest(model).encode(), *numbers)


def _statistics(model: Any) -> dict[str, Stats]:
    return {layer.name: layer.stats for layer in inspect(model) if layer.tracked}


def _on_all_ranks(model: Any, value: Any) -> list[Any]:
    backend = backends.of(model)
    return backend.on_all_ranks(value) if hasattr(backend, "on_all_ranks") else [value]


def _store(model: Any, statistics: dict[str, Stats]) -> None:
    backends.of(model).write(model, {name: (*both, None) for name, both in statistics.items()})


def _agree(model: Any, result: Recalibration) -> None:
    """Store what the first rank has measured. Raises BntoolsError, on every rank, where the ranks do not agree."""
    every = _on_all_ranks(model, {layer.name: layer.after.stats for layer in result.layers})
    failed = [rank for rank, measured in enumerate(every) if measured is None]
    if failed:
        raise BntoolsError(f"recalibrating has failed on process {failed[0]} of {len(every)}: its own error says why")
    first, *others = every
    gaps = [
        distance(first[layer.name], other[layer.name], layer.after.eps) if layer.name in first.keys() & other else inf
        for other in others
        for layer in result.layers
    ]
    if not all(gap <= SUSPECT for gap in gaps):
        raise BntoolsError(
            f"the {len(every)} processes have measured different statistics, so each would validate and save another "
            f"model: give RecalibrateBatchNorm the same batches in the same order on every process, without a "
            f"DistributedSampler and without shuffling"
        )
    if any(gaps):
        _store(model, first)
