"""How far one output of a model is from the same output of another, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference, over all samples.

    ``error`` is scale-relative: ``max|a - b| / max|a|`` with the reference ``a``; where the reference
    is all zero it is ``max|a - b|`` itself. ``max_error`` and ``mean_error`` are of ``|a - b|``.
    ``agreement`` is the share of equal argmax over the class axis 1 of outputs (N, C) and (N, C, H, W)
    with C > 1, None for others. Integer and boolean outputs (``exact``) must be equal. ``problem``
    says in words why the output cannot pass, whatever the tolerance; None if nothing stands against it.
    ``shape`` is that of the last batch.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    error: float
    max_error: float
    mean_error: float
    agreement: float | None = None
    exact: bool = False
    problem: str | None = None


class Comparison:
    """Compares one output over a stream of batches; memory does not grow with their number."""

    def __init__(self, name: str):
        self.name = name
        self.problem: str | None = None
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.exact = False
        self._scale = self._largest = self._total = 0.0
        self._values = self._classified = self._agreeing = self._unequal = self._infinite = 0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> float:
        """Take in one batch; returns its own error, infinite where the outputs cannot be compared."""
        self.shape, self.dtype = reference.shape, str(candidate.dtype)
        self.exact = not _is_float(reference)
        if problem := _incomparable(reference, candidate):
            self.problem = self.problem or problem
            return np.inf
        gap, scale, unequal = _gap(reference, candidate)
        self._values += gap.size
        self._unequal += unequal
        self._infinite += int(np.isinf(reference).sum()) if _is_float(reference) else 0
        self._largest = max(self._largest, largest := float(gap.max(initial=0.0)))
        self._total += float(gap.sum())
        self._scale = max(self._scale, scale)
        self._classify(reference, candidate)
        return ratio(largest, scale)

    def result(self) -> OutputError:
        """The figures so far."""
        problem = self.problem
        if not problem and self.exact and self._unequal:
            problem = f"{self._unequal:,} of {self._values:,} values of an exact output ({self.dtype}) differ"
        incomparable = self.problem is not None
        return OutputError(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            error=np.inf if incomparable else ratio(self._largest, self._scale),
            max_error=np.inf if incomparable else self._largest,
            mean_error=np.inf if incomparable else self._total / max(self._values, 1),
            agreement=self._agreeing / self._classified if self._classified and not incomparable else None,
            exact=self.exact,
            problem=problem,
        )

    @property
    def note(self) -> str | None:
        """What should be said although it stands against nothing."""
        if not self._infinite:
            return None
        return f"output {self.name!r}: {self._infinite:,} values are infinite in both models and were left out"

    def _classify(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        if _is_float(reference) and reference.ndim in (2, 4) and reference.shape[1] > 1 and reference.size:
            equal = reference.argmax(axis=1) == candidate.argmax(axis=1)
            self._classified += equal.size
            self._agreeing += int(equal.sum())


def ratio(gap: float, scale: float) -> float:
    """The scale-relative error; the absolute one where the reference is all zero."""
    return gap / scale if scale else gap


def error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The scale-relative error of one array against another, infinite where they cannot be compared."""
    return Comparison("").add(reference, candidate)


def _gap(reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, float, int]:
    """``|a - b|``, ``max|a|`` and the number of unequal values; infinite values count as zero in both."""
    if reference.dtype.kind in "OUS":
        unequal = (reference != candidate).astype(np.float64)
        return unequal, 1.0, int(unequal.sum())
    wide = np.complex128 if reference.dtype.kind == "c" else np.float64
    a, b = reference.astype(wide), candidate.astype(wide)
    finite = np.isfinite(a)
    gap = np.abs(np.subtract(a, b, out=np.zeros_like(a), where=finite))
    scale = float(np.abs(a).max(initial=0.0, where=finite))
    return gap, scale, int((reference != candidate).sum()) if not _is_float(reference) else 0


def _incomparable(reference: np.ndarray, candidate: np.ndarray) -> str | None:
    if reference.shape != candidate.shape:
        return f"shape {candidate.shape} where the reference has {reference.shape}"
    if _is_float(reference) != _is_float(candidate):
        return f"dtype {candidate.dtype} where the reference has {reference.dtype}"
    if not _is_float(reference):
        return None
    for what, count in (("reference", _nans(reference)), ("candidate", _nans(candidate))):
        if count:
            return f"the {what} itself gives NaN in {count:,} of {reference.size:,} values: nothing to compare there"
    unlike = np.where(np.isinf(reference) | np.isinf(candidate), reference != candidate, False)
    if unlike.any():
        return f"{int(unlike.sum()):,} of {reference.size:,} values are infinite in one model only"
    return None


def _nans(values: np.ndarray) -> int:
    return int(np.isnan(values).sum())


def _is_float(values: np.ndarray) -> bool:
    return values.dtype.kind in "fc"
