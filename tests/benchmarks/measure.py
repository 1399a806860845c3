"""What all benchmarks share: a row of the table, and peers timed side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, the figure, and what it has to reach.

    ``cells``, by column, stand in place of the figure where several things were measured of one.
    """

    what: str
    figure: str
    goal: str
    reached: bool
    cells: dict[str, str] = field(default_factory=dict)


def at_most(what: str, value: float, bound: float, text: str = "{:.2g}") -> Row:
    """A row whose figure must not exceed a bound."""
    return Row(what, text.format(value), "at most " + text.format(bound), value <= bound)


def at_least(what: str, value: float, bound: float, text: str = "{:.2f}") -> Row:
    """A row whose figure must reach a bound."""
    return Row(what, text.format(value), "at least " + text.format(bound), value >= bound)


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """The median time of each call, taken in turns so that a busy moment hits all of them."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}
