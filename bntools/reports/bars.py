"""Bar charts in rows of HTML: they keep their text readable on a phone, where an SVG would shrink it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bntools import words
from bntools.reports.markup import Html, joined, tag
from bntools.reports.page import name

LABEL = 34  # characters of a layer's name before its middle is left out


@dataclass(frozen=True)
class Bar:
    """One row: ``said`` is the value as text, ``level`` a severity or "plain".

    ``error`` draws the value's standard error, ``limit`` a mark to compare with, ``remark`` a few words beside the
    label.
    """

    label: str
    value: float
    said: str
    level: str = "plain"
    error: float = 0.0
    limit: float | None = None
    remark: str = ""


def bars(caption: str, rows: Sequence[Bar], least: float = 0.0) -> Html:
    """Rows on one linear scale, from 0 to at least ``least``; what is not finite fills its row."""
    reach = [each for row in rows for each in (row.value + row.error, row.limit or 0.0) if math.isfinite(each)]
    most = max([*reach, least]) or 1.0
    labels = words.told_apart([row.label for row in rows], LABEL)
    items = (_row(row, shown, most) for row, shown in zip(rows, labels, strict=True))
    return tag("ul", {"class": "bars", "aria-label": caption}, *items)


def _row(row: Bar, shown: str, most: float) -> Html:
    remark = tag("span", {"class": "remark"}, row.remark) if row.remark else None
    label = tag("span", {"class": "label"}, name(row.label, shown), remark)
    width = row.value / most if math.isfinite(row.value) else 1.0
    parts = [tag("i", {"class": f"bar {row.level}", "style": f"width:{_percent(width)}"})]
    if row.error and math.isfinite(row.value):
        low, high = max(row.value - row.error, 0.0) / most, (row.value + row.error) / most
        parts.append(tag("i", {"class": "whisker", "style": f"left:{_percent(low)};width:{_percent(high - low)}"}))
    if row.limit is not None and math.isfinite(row.limit):
        parts.append(tag("i", {"class": "limit", "style": f"left:{_percent(row.limit / most)}"}))
    track = tag("span", {"class": "track", "aria-hidden": "true"}, *parts)
    return tag("li", None, label, track, tag("span", {"class": "value"}, row.said))


def skyline(caption: str, rows: Sequence[Bar]) -> Html:
    """All rows as thin columns side by side, for networks of many layers; the text is in the table."""
    most = max((row.value for row in rows if math.isfinite(row.value)), default=0.0) or 1.0
    columns = (
        tag(
            "i",
            {
                "class": f"bar {row.level}",
                "style": f"height:{_percent(row.value / most if math.isfinite(row.value) else 1.0)}",
                "title": f"{words.shortened(row.label, 2 * LABEL)}: {row.said}",
            },
        )
        for row in rows
    )
    scale = tag("span", {"class": "top"}, f"{words.number(most)} std")
    ends = tag("p", {"class": "ends"}, tag("span", None, "first layer"), tag("span", None, "last layer"))
    return tag("figure", {"class": "sky"}, scale, tag("div", {"role": "img", "aria-label": caption}, *columns), ends)


def legend(levels: Sequence[tuple[str, str]]) -> Html:
    """What the colours mean, in words."""
    entries = (tag("li", None, tag("i", {"class": f"bar {level}"}), joined([" ", said])) for level, said in levels)
    return tag("ul", {"class": "legend", "aria-label": "Colours"}, *entries)


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"
