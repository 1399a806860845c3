"""Where two models part: the first value inside them that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bntools.comparison import error
from bntools.runner import Runner, Trace

BUDGET = 256 * 2**20  # bytes of values inside each model that are held at once, about
SWEEP = 256  # values read in one run at most
FIRST = 16  # values read in the first run, which tells how large they are
WINDOW = 8  # values of one model that may stand for one of the other


@dataclass(frozen=True)
class Divergence:
    """The first value inside two models that differs.

    ``name`` is that of a module of the source model or of a value in the graph, ``op`` the operator (of a module:
    its class) that computes it in the candidate and ``node`` that operator's node, empty where it has no name.
    ``error`` is its scale-relative error, infinite where it is NaN, or infinite on one side only; on one sample of
    the batch if that shows the difference.
    """

    name: str
    op: str
    node: str
    error: float

    def __str__(self) -> str:
        node = f" {self.node!r}" if self.node and self.node != self.name else ""
        return f"{self.name!r} ({f'{self.op}{node}, ' if self.op else ''}error {self.error:.1e})"


def first_divergence(reference: Runner, candidate: Runner, batch: Any, tolerance: float) -> Divergence | None:
    """The first module or graph value, in execution order, whose scale-relative error is above tolerance.

    Two modules are compared module by module, two graphs value by value, a module and a graph by
    the module names that the exporter left in the file. None where nothing inside can be told apart: the
    models share no names, or agree at every value they share.

    Models whose values fit the memory budget are read whole. In others the value is found by bisection: it
    differs although everything it is computed from agrees.
    """
    left, right = reference.trace(batch), candidate.trace(batch)
    probe = _Probe(left, right, _pairs(reference, candidate, left, right), tolerance)
    # An optimizer fuses less where a value is read: then one value at a time.
    most = 1 if candidate.optimization == "default" else SWEEP
    name = first_differing(list(probe.pairs), probe.before(), probe.differ, lambda: probe.width(most))
    if name is None:
        return None
    op, node = right.ops.get(probe.pairs[name][1], ("", ""))
    return Divergence(name, op, node, probe.errors[name])


def _pairs(reference: Runner, candidate: Runner, left: Trace, right: Trace) -> dict[str, tuple[str, str]]:
    """What is compared with what, by the name to call it by, in the candidate's order."""
    # Of modules that end at the same value the innermost, which comes last, is where to look.
    inner = {point: name for name, point in right.modules.items() if name in left.modules}
    modules = {name: (left.modules[name], point) for point, name in inner.items()}
    if reference.framework != candidate.framework:
        return modules
    known = set(left.points)
    points = {point: (point, point) for point in right.points if point in known}
    return points if len(points) >= len(modules) else modules


class _Probe:
    """Reads pairs of values and remembers how far each is off, and how much memory one takes."""

    def __init__(self, left: Trace, right: Trace, pairs: dict[str, tuple[str, str]], tolerance: float):
        self.left, self.right, self.pairs, self.tolerance = left, right, pairs, tolerance
        self.errors: dict[str, float] = {}
        self._bytes = 0
        # A fold that has one model's convolution give what the other's BN gives keeps the name of either.
        self._windows = (
            windows(left, [one for one, _ in pairs.values()]),
            windows(right, [one for _, one in pairs.values()]),
        )

    def before(self) -> Callable[[str], Sequence[str]] | None:
        """Which of the names each is computed from directly, if a graph says so; else None: all before it."""
        if not self.right.inputs:
            return None
        names = {point: name for name, (_, point) in self.pairs.items()}
        return cache(lambda name: [names[one] for one in nearest(self.right.inputs, self.pairs[name][1], names)])

    def differ(self, chosen: Sequence[str]) -> list[bool]:
        """Whether each of these pairs is off by more than the tolerance, from one run of each model."""
        sides = [[window[self.pairs[name][i]] for name in chosen] for i, window in enumerate(self._windows)]
        expected = self.left.read([point for points in sides[0] for point in points])
        found = self.right.read([point for points in sides[1] for point in points])
        for name, a, b in zip(chosen, *sides, strict=True):
            self.errors[name] = _nearest_error(_known(expected, a), _known(found, b))
        self._bytes += sum(array.nbytes for array in (*expected.values(), *found.values())) // 2
        return [self.errors[name] > self.tolerance for name in chosen]

    def width(self, most: int) -> int:
        """How many pairs may be read in the next run."""
        if not self.errors:
            return min(FIRST, most)
        return max(1, min(most, int(BUDGET // max(self._bytes / len(self.errors), 1))))


def _known(values: Mapping[str, np.ndarray], points: Iterable[str]) -> list[np.ndarray]:
    return [values[point] for point in points if point in values]


def _nearest_error(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """How far the two values that are nearest to each other are apart; what has no counterpart of its shape says 0."""
    errors = [error(a, b) for b in found for a in expected if a.shape == b.shape and a.dtype.kind == b.dtype.kind]
    return min(errors, default=0.0)


def first_differing(
    names: Sequence[str],
    before: Callable[[str], Sequence[str]] | None,
    differ: Callable[[Sequence[str]], list[bool]],
    width: Callable[[], int],
) -> str | None:
    """The first of the names, in topological order, that differs; None if none does.

    ``before`` gives those from which a name is computed directly, None takes all that stand before it;
    ``differ`` tells of some names whether each differs; ``width()`` is how many it may be asked for at a time.
    If one more look can take in all, it does, and the answer is exact. Otherwise by bisection, which supposes
    that what comes before a value that agrees agrees too, and ends at a value that differs while those it
    is computed from agree. A value that differs without consequence, as between two layers that were folded,
    is passed over: everything computed from it agrees.
    """
    known: dict[str, bool] = {}

    def look(chosen: Sequence[str]) -> None:
        known.update(zip(chosen, differ(chosen), strict=True))

    harmless: list[str] = []
    after = _after(names, before)
    while (found := _search(names, before, known, look, width)) is not None:
        readers = after.get(found, [])
        while unread := [name for name in readers if name not in known]:
            look(unread[: width()])
        if not readers or any(known[name] for name in readers):
            return found
        harmless.append(found)
        known[found] = False
    return harmless[0] if harmless else None


def _search(
    names: Sequence[str],
    before: Callable[[str], Sequence[str]] | None,
    known: dict[str, bool],
    look: Callable[[Sequence[str]], None],
    width: Callable[[], int],
) -> str | None:
    """The first name that differs, starting from what is known."""
    while True:
        if known and len(known) < len(names) <= width():
            look([name for name in names if name not in known])
        found = next((name for name in names if known.get(name)), None)
        cleared = _ancestors([name for name in names if known.get(name) is False], names, before)
        within = set(names) if found is None else _ancestors([found], names, before)
        suspects = [name for name in names if name in within and name not in cleared and name not in known]
        if not suspects and found is not None and before is not None:
            suspects = [name for name in before(found) if name not in known]
        if not suspects:
            return found
        look(_picks(suspects, width()))


def _after(names: Sequence[str], before: Callable[[str], Sequence[str]] | None) -> dict[str, list[str]]:
    """Which names are computed from each directly, where that is known."""
    result: dict[str, list[str]] = {}
    if before is None:
        return result
    for name in names:
        for one in before(name):
            result.setdefault(one, []).append(name)
    return result


def _ancestors(of: Sequence[str], names: Sequence[str], before: Callable[[str], Sequence[str]] | None) -> set[str]:
    """Everything that comes before any of these, themselves left out unless one comes before another."""
    if before is None:
        last = max((names.index(name) for name in of), default=0)
        return set(names[:last])
    result: set[str] = set()
    open_ones = list(of)
    while open_ones:
        fresh = [name for name in before(open_ones.pop()) if name not in result]
        result.update(fresh)
        open_ones += fresh
    return result


def _picks(names: Sequence[str], width: int) -> list[str]:
    """At most ``width`` of the names, evenly spread; all of them if they are that few."""
    size = len(names)
    return list(names) if size <= width else [names[size * (i + 1) // (width + 1)] for i in range(width)]


def nearest(inputs: Mapping[str, Sequence[str]], point: str, shared: Mapping[str, str]) -> list[str]:
    """The shared points from which a point is computed, with no shared point in between."""
    result: dict[str, None] = {}
    seen: set[str] = set()
    open_ones = list(inputs.get(point, ()))
    while open_ones:
        one = open_ones.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in shared:
            result[one] = None
        else:
            open_ones += inputs.get(one, ())
    return list(result)


def windows(trace: Trace, shared: Iterable[str]) -> dict[str, list[str]]:
    """What may stand in a model for a shared point: it, and what follows from it up to the next one.

    A file in which a convolution has absorbed its BN has no value for the BN's output under the BN's
    name: it is the value of the convolution. Without dependencies, what follows is what comes next.
    """
    result: dict[str, list[str]] = {point: [] for point in shared}
    heads: dict[str, list[str]] = {}  # the shared points behind each point
    current: list[str] = []
    for point in trace.points:
        if point in result:
            current = [point]
        elif trace.inputs:
            current = list(dict.fromkeys(head for one in trace.inputs.get(point, ()) for head in heads.get(one, ())))
        heads[point] = current
        for head in current:
            if len(result[head]) < WINDOW:
                result[head].append(point)
    return result
