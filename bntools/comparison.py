"""How far one output of a model is from the same output of another, batch by batch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

import numpy as np

# Edges of the histogram of differences, relative to the scale of the output: decades.
EXPONENTS = range(-16, 1)
EDGES = tuple(10.0**exponent for exponent in EXPONENTS)
FINE = 100  # bins a decade while the scale is not known yet: an edge is met to 2.3 %


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference, over all samples.

    ``error`` is scale-relative: ``max|a - b| / max|a|`` with the reference ``a``; where the reference
    is all zero it is ``max|a - b|`` itself. ``max_error`` and ``mean_error`` are of ``|a - b|``.
    ``agreement`` is the share of equal argmax over the class axis of outputs (N, C) and (N, C, H, W), or
    (N, H, W, C) of a Keras model, with C > 1, None for others. Integer and boolean outputs (``exact``) must
    be equal. ``problem`` says in words why the output cannot pass, whatever the tolerance; None if nothing stands
    against it. ``shape`` is that of the last batch.

    ``histogram`` counts the values by ``|a - b| / max|a|``: first those that are equal, then those below
    the first of EDGES (1e-16, 1e-15, ... 1), those between each two of them, and those from 1 on. It is empty
    where the outputs cannot be compared.
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
    histogram: tuple[int, ...] = ()

    def __str__(self) -> str:
        text = f"output {self.name!r}: error {self.error:.1e}, max {self.max_error:.1e}, mean {self.mean_error:.1e}"
        total = sum(self.histogram)
        labels = ["equal", *(f"<{edge:.0e}" for edge in EDGES), ">=1"]
        shares = [f"{label} {count / total:.1%}" for label, count in zip(labels, self.histogram, strict=False) if count]
        return f"{text}; of its scale: {', '.join(shares)}" if shares else text


class Comparison:
    """Compares one output over a stream of batches; memory does not grow with their number."""

    def __init__(self, name: str, class_axis: int = 1):
        self.name, self._axis = name, class_axis
        self.problem: str | None = None
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.exact = False
        self._scale = self._largest = self._total = 0.0
        self._values = self._classified = self._agreeing = self._unequal = self._infinite = 0
        self._decades: Counter[int] = Counter()

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
        self._count(gap)
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
            histogram=() if incomparable else self._histogram(),
        )

    @property
    def note(self) -> str | None:
        """What should be said although it stands against nothing."""
        if not self._infinite:
            return None
        return f"output {self.name!r}: {self._infinite:,} values are infinite in both models and were left out"

    def _count(self, gap: np.ndarray) -> None:
        """Sort the differences into fine bins of their logarithm: the scale may still grow."""
        bins = np.floor(np.log10(gap[gap > 0]) * FINE).astype(np.int64)
        lowest = int(bins.min(initial=0))
        counts = np.bincount(bins - lowest)
        self._decades.update({lowest + int(i): int(counts[i]) for i in np.flatnonzero(counts)})

    def _histogram(self) -> tuple[int, ...]:
        differing = self._decades.total()
        counts = [self._values - differing] + [0] * (len(EDGES) + 1)
        scale = math.log10(self._scale or 1.0)
        for place, count in self._decades.items():
            relative = (place + 0.5) / FINE - scale
            counts[1 + bisect_right(EXPONENTS, relative)] += count
        return tuple(counts)

    def _classify(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        if _is_float(reference) and reference.ndim in (2, 4) and reference.shape[self._axis] > 1 and reference.size:
            equal = reference.argmax(axis=self._axis) == candidate.argmax(axis=self._axis)
            self._classified += equal.size
            self._agreeing += int(equal.sum())


def ratio(gap: float, scale: float) -> float:
    """The scale-relative error; the absolute one where the reference is all zero."""
    return gap / scale if scale else gap


def error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The scale-relative error of one array against another, infinite where they cannot be compared."""
    if _incomparable(reference, candidate):
        return np.inf
    gap, scale, _ = _gap(reference, candidate)
    return ratio(float(gap.max(initial=0.0)), scale)


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
