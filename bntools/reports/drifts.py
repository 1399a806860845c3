"""Drift by layer: the chart that diagnoses and recalibrations have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bntools import words
from bntools.reports.bars import Bar, bars, legend, skyline
from bntools.reports.channels import Channels
from bntools.reports.markup import Html, joined, tag
from bntools.reports.page import Section

EACH = 40  # rows in model order up to here; of a deeper network the worst, under a chart of all
WORST = 20
LEAST = words.BOUNDS[0][0]  # std that a row is wide at least: what is small should look small

LEVELS = (
    ("noise", "within noise (3 standard errors)"),
    ("small", "small: below 0.1 std"),
    ("clear", "clear: 0.1 to 0.5"),
    ("large", "large: 0.5 to 2"),
    ("severe", "severe: 2 and more, or not finite"),
)


@dataclass(frozen=True, eq=False)
class Drift:
    """One layer's drift in stored standard deviations, with its standard error, and its channels."""

    channels: Channels
    value: float
    error: float = 0.0

    @property
    def level(self) -> words.Severity:
        """How bad it is, as a colour."""
        return words.severity(self.value, self.error)


def ranked(layers: Sequence[Drift]) -> list[Drift]:
    """The layers, those that drift the most first; what is no number leads."""
    return sorted(layers, key=lambda one: -one.value if math.isfinite(one.value) else -math.inf)


def section(layers: Sequence[Drift], explanation: str) -> Section:
    """A bar for each layer, the worst one marked."""
    order = ranked(layers)
    rows = {id(one): _bar(one, one is order[0] and len(order) > 1) for one in layers}
    parts: list[Html] = []
    if len(layers) > EACH:
        caption = f"Drift of all {len(layers)} layers, in model order"
        parts.append(skyline(caption, [rows[id(one)] for one in layers]))
        parts.append(tag("h3", None, f"The {WORST} that drift the most"))
        parts.append(bars("Drift, worst layers first", [rows[id(one)] for one in order[:WORST]], LEAST))
    else:
        parts.append(bars("Drift by layer, in model order", [rows[id(one)] for one in layers], LEAST))
    there = {one.level for one in layers}
    parts.append(legend([(level, said) for level, said in LEVELS if level in there]))
    return Section("drift", "Drift by layer", explanation, joined(parts))


def _bar(one: Drift, worst: bool) -> Bar:
    error = f" ± {words.number(one.error)}" if one.error and math.isfinite(one.error) else ""
    said = f"{words.number(one.value)}{error} std"
    shown = one.error if math.isfinite(one.error) else 0.0
    return Bar(one.channels.name, one.value, said, one.level, shown, remark="worst" if worst else "")


def leading(channels: Channels, most: int = 3) -> str:
    """Which channels drift the most, in words."""
    order = np.argsort(-np.nan_to_num(channels.drift, nan=np.inf), kind="stable")[:most]
    parts = (
        f"#{int(c)}: {words.number(float(channels.shift[c]))} std, x{words.number(float(channels.ratio[c]))}"
        for c in order
    )
    return "; ".join(parts)


def value(one: Drift) -> Html:
    """A drift as a cell of a table, with its colour."""
    mark = tag("i", {"class": f"bar level {one.level}", "title": one.level})
    return joined([mark, words.number(one.value)])
