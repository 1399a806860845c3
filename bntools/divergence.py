"""Where two models part: the first value inside them that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bntools.comparison import error
from bntools.runner import Runner, Trace

SWEEP = 256  # values read in one run: enough to read most networks whole, exact also where branches part


def first_divergence(reference: Runner, candidate: Runner, batch: Any, tolerance: float) -> str | None:
    """The first module or graph value, in execution order, whose scale-relative error is above tolerance.

    Two modules are compared module by module, two graphs value by value, a module and a graph by
    the module names that the exporter left in the file. None where nothing inside can be told apart: the
    models share no names, or agree at every value they share.
    """
    left, right = reference.trace(batch), candidate.trace(batch)
    if reference.framework == candidate.framework:
        pairs = {point: (point, point) for point in right.points if point in set(left.points)}
    else:
        pairs = {}
    if not pairs:
        pairs = {name: (left.modules[name], point) for name, point in right.modules.items() if name in left.modules}
    names = list(pairs)
    windows = _windows(left, [pairs[name][0] for name in names])

    def differs(chosen: Sequence[str]) -> list[bool]:
        wanted = [point for name in chosen for point in windows[pairs[name][0]]]
        expected, found = left.read(wanted), right.read([pairs[name][1] for name in chosen])
        return [
            not _agrees(
                [expected[p] for p in windows[pairs[name][0]] if p in expected], found.get(pairs[name][1]), tolerance
            )
            for name in chosen
        ]

    # An optimizer fuses less where a value is read: then one value at a time.
    index = first_true(names, differs, 1 if candidate.optimization == "default" else SWEEP)
    return None if index is None else names[index]


def first_true(names: Sequence[str], differs: Callable[[Sequence[str]], list[bool]], width: int) -> int | None:
    """The index of the first name that differs, asking for at most ``width`` of them at a time.

    More names than that are searched by bisection (``width + 1`` parts), which supposes that what
    follows the first difference differs too. None if no name differs.
    """
    low, high = 0, len(names)
    found = None
    while low < high:
        picks = _picks(low, high, width)
        flags = differs([names[pick] for pick in picks])
        first = flags.index(True) if True in flags else len(picks)
        if first < len(picks):
            found = high = picks[first]
        low = picks[first - 1] + 1 if first else low
    return found


def _picks(low: int, high: int, width: int) -> list[int]:
    """At most ``width`` positions in [low, high), evenly spread; all of them if they are that few."""
    if high - low <= width:
        return list(range(low, high))
    return [low + (high - low) * (i + 1) // (width + 1) for i in range(width)]


def _windows(trace: Trace, shared: list[str]) -> dict[str, list[str]]:
    """What may stand in the reference for a shared point: it, and what follows up to the next one.

    A file in which a convolution has absorbed its BN has no value for the BN's output under the BN's
    name: it is the value of the convolution.
    """
    kept = set(shared)
    windows: dict[str, list[str]] = {}
    current: list[str] = []
    for point in trace.points:
        if point in kept:
            current = windows[point] = []
        current.append(point)
    return windows


def _agrees(expected: list[np.ndarray], found: np.ndarray | None, tolerance: float) -> bool:
    """Whether the value is one of those expected; what has no counterpart of its shape says nothing."""
    if found is None:
        return True
    comparable = [values for values in expected if values.shape == found.shape]
    return not comparable or any(error(values, found) <= tolerance for values in comparable)
