"""What the callbacks of all libraries share: how long to wait, and recalibrating a model that trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import numpy as np

from bntools import backends
from bntools.batches import is_repeatable
from bntools.digests import digest
from bntools.errors import BntoolsError
from bntools.inspection import inspect
from bntools.layer import Selection
from bntools.recalibrated import Recalibration
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

        In a distributed training all processes measure together, and come to the same statistics: each may be given
        its own share of the data, or all the same. Raises BntoolsError, on every process, where one of them has failed.
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
            group=_world(model),
        )
        self.results.append(result)
        self._done = _state(model)


def _state(model: Any) -> str:
    """A digest of weights and statistics."""
    tracked = [layer.stats for layer in inspect(model) if layer.tracked]
    numbers = [np.ascontiguousarray(values).data for both in tracked for values in both]
    return digest(backends.of(model).digest(model).encode(), *numbers)


def _world(model: Any) -> Any:
    """The process group of a distributed training, if there is one."""
    backend = backends.of(model)
    return backend.world() if hasattr(backend, "world") else None
