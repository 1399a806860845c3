"""How the standard error fell with the number of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bntools import words
from bntools.course import GOALS, needed
from bntools.reports import charts
from bntools.reports.markup import joined, tag
from bntools.reports.page import Section


def section(curve: Sequence[tuple[int, float]]) -> Section | None:
    """The curve, with how it goes on if samples are independent."""
    points = [(n, error) for n, error in curve if n > 0 and error > 0 and math.isfinite(error)]
    if len(points) < 2:
        return None
    last, error = points[-1]
    enough = {goal: needed(last, error, goal) for goal in GOALS}
    right = max(last * 2, min(max(enough.values()), last * 100))
    lowest = min(*(e for _, e in points), error * math.sqrt(last / right))
    x = charts.across(points[0][0], right, "samples", log=True)
    y = charts.upward(lowest, max(e for _, e in points), "standard error, std", log=True)
    samples = [float(n) for n, _ in points]
    errors = [e for _, e in points]
    ahead = charts.line(x, y, [last, right], [error, error * math.sqrt(last / right)], "same")
    ends = charts.dots(x, y, np.array([last], np.float64), np.array([error]), "solid")
    caption = f"Standard error by number of samples: {words.number(error)} std at {last:,} samples"
    plot = charts.chart(caption, x, y, charts.line(x, y, samples, errors, "measured"), ahead, ends)
    goals = "; ".join(_goal(goal, count, error) for goal, count in enough.items())
    said = tag("p", None, f"{last:,} samples give {words.number(error)} std. {goals}.")
    explanation = (
        "Standard error of the measured mean in the worst channel, in measured standard deviations, after so many "
        "samples; the dashed line goes on with 1/√n, as for independent samples. Enough is where it is small against "
        "the drift."
    )
    return Section("convergence", "How many samples are enough", explanation, joined([said, plot]))


def _goal(goal: float, count: int, error: float) -> str:
    if error <= goal:
        return f"{goal:g} std is reached"
    return f"{goal:g} std would take about {count:,}"
