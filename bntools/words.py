"""How figures and names are said to people: on a terminal and in reports alike. Needs neither NumPy nor a framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Severity = Literal["noise", "small", "clear", "large", "severe"]

# Upper bounds of a drift in standard deviations. Below 0.1 a trained network's accuracy hardly moves; at 2 most values
# of a channel are where training hardly ever saw one.
BOUNDS: tuple[tuple[float, Severity], ...] = ((0.1, "small"), (0.5, "clear"), (2.0, "large"))
WORSE = 0.05  # of the outputs' error: what a layer adds to it beyond that is said
PER_ERROR = 3.0  # a drift below this many standard errors of the measured mean may be chance: it is the worst of many


def severity(drift: float, standard_error: float = 0.0) -> Severity:
    """How bad a drift is, in five steps; NaN and infinite ones are the worst."""
    if not math.isfinite(drift):
        return "severe"
    if 0 < drift <= PER_ERROR * standard_error:
        return "noise"
    return next((level for bound, level in BOUNDS if drift < bound), "severe")


def shortened(name: str, most: int) -> str:
    """The name in at most so many characters, its middle left out: the end tells layers apart."""
    if len(name) <= most:
        return name
    tail = max((most - 1) * 2 // 3, 0)
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def told_apart(names: Sequence[str], most: int) -> list[str]:
    """Names in at most so many characters each; longer where different names would become the same.

    Where one is too long, the beginning that all share goes first.
    """
    if all(len(name) <= most for name in names):
        return list(names)
    first, last = min(names), max(names)
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    prefix = first[:alike]
    prefix = prefix[: max(prefix.rfind("."), prefix.rfind("/")) + 1]
    rests = [f"…{name.removeprefix(prefix)}" if len(prefix) > 1 else name for name in names]
    while True:
        short = [shortened(name, most) for name in rests]
        if len(set(short)) == len(set(names)):
            return short
        most += 4


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``1,200 layers``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    """A number with three significant digits, thousands as such; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def mended(gap: float | None) -> str:
    """How much of the outputs' error one layer's new statistics mend alone; a dash where that was not measured."""
    if gap is None:
        return "-"
    return "worse" if gap < -WORSE else f"{max(gap, 0.0):.0%}"


def sentence(said: str) -> str:
    """The same words with a capital letter at the start, whatever capitals are in them."""
    return said[:1].upper() + said[1:]


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"
