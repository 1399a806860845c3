"""SVG charts: axes, dots, lines and columns, in colours that the page's style sheet gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bntools.reports.markup import Content, Html, joined, tag, text

WIDTH, HEIGHT = 420, 330
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 46  # room for the axes' text around the plot


@dataclass(frozen=True)
class Axis:
    """A range of values along one side of a plot, in pixels from ``start`` to ``end``; ``low < high``."""

    low: float
    high: float
    start: float
    end: float
    label: str
    log: bool = False

    def at(self, value: float | np.ndarray) -> np.ndarray:
        """Where values lie, in pixels; what is outside lies on the border."""
        with np.errstate(divide="ignore"):
            scaled = np.log10(value) if self.log else np.asarray(value, np.float64)
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return self.start + np.clip((scaled - low) / (high - low), 0, 1) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values, three to six of them."""
        if not self.log:
            return _round_ticks(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        step = max(1, math.ceil((last - first) / 5))
        factors = (1, 2, 5) if self.high < 150 * self.low else (1,)
        ticks = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
        inside = [tick for tick in ticks if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]
        return inside if len(inside) > 1 else _round_ticks(self.low, self.high)


def _round_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [0.0 if count == 0 else count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]


def across(low: float, high: float, label: str, log: bool = False) -> Axis:
    """A horizontal axis."""
    return Axis(*_widened(low, high, log), LEFT, WIDTH - RIGHT, label, log)


def upward(low: float, high: float, label: str, log: bool = False) -> Axis:
    """A vertical axis."""
    return Axis(*_widened(low, high, log), HEIGHT - BOTTOM, TOP, label, log)


def _widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range that is not empty, with a little room at its ends unless it begins at 0."""
    if log:
        low, high = max(low, 1e-12), max(high, 1e-12)
        room = max((high / low) ** 0.04, 1.05)
        return low / room, high * room
    room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return (low - room if low else 0.0), high + room


def chart(caption: str, x: Axis, y: Axis, *marks: Content) -> Html:
    """A plot with its axes; ``caption`` is read out by screen readers."""
    svg = tag(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": caption},
        tag("title", None, caption),
        _axes(x, y),
        *marks,
    )
    return tag("figure", {"class": "chart"}, svg)


def _axes(x: Axis, y: Axis) -> Html:
    across = [(tick, float(x.at(tick))) for tick in x.ticks]
    upward = [(tick, float(y.at(tick))) for tick in y.ticks]
    grid = "".join(f"M{_px(at)} {TOP}V{HEIGHT - BOTTOM}" for _, at in across)
    grid += "".join(f"M{LEFT} {_px(at)}H{WIDTH - RIGHT}" for _, at in upward)
    below = [_text(at, HEIGHT - BOTTOM + 16, _tick(tick), "middle") for tick, at in across]
    beside = [_text(LEFT - 7, at + 4, _tick(tick), "end") for tick, at in upward]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = {"class": "axis", "text-anchor": "middle", "transform": f"translate(13 {_px(middle)}) rotate(-90)"}
    return joined(
        [
            tag("path", {"class": "grid", "d": grid}),
            *below,
            *beside,
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 9, x.label, "middle", "axis"),
            tag("text", turned, y.label),
        ]
    )


def line(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float], style: str) -> Html:
    """A line through points."""
    points = zip(x.at(np.asarray(xs, np.float64)), y.at(np.asarray(ys, np.float64)), strict=True)
    return tag("path", {"class": style, "d": "M" + "L".join(f"{_px(a)} {_px(b)}" for a, b in points)})


def dots(x: Axis, y: Axis, xs: np.ndarray, ys: np.ndarray, style: str) -> Html:
    """Dots, all in one path: a large layer has thousands."""
    points = zip(x.at(xs), y.at(ys), strict=True)
    return tag("path", {"class": f"dots {style}", "d": "".join(f"M{_px(a)} {_px(b)}h0" for a, b in points)})


def named(x: Axis, y: Axis, marks: Sequence[tuple[tuple[float, float], str, str]]) -> list[Html]:
    """Rings around dots, each with a word where there is room for one and a longer one for the pointer."""
    drawn: list[Html] = []
    words: list[tuple[float, float]] = []
    for (left, height), said, full in marks:
        across, upward = float(x.at(left)), float(y.at(height))
        ring = tag("circle", {"class": "ring", "cx": _px(across), "cy": _px(upward), "r": "5.5"})
        free = not any(abs(across - other) < 60 and abs(upward - above) < 14 for other, above in words)
        on_the_right = across < WIDTH - 110
        place = across + (8 if on_the_right else -8)
        word = _text(place, upward + 4, said, "start" if on_the_right else "end", "named") if free else None
        words += [(across, upward)] if free else []
        drawn.append(tag("g", None, tag("title", None, full), ring, word))
    return drawn


def columns(x: Axis, y: Axis, edges: np.ndarray, heights: np.ndarray, style: str) -> Html:
    """Columns between neighbouring edges, standing on the axis."""
    base = float(y.at(max(y.low, 0.0)))
    left, top = x.at(edges), y.at(heights)
    drawn = (
        f"M{_px(left[i])} {_px(base)}V{_px(top[i])}H{_px(left[i + 1])}V{_px(base)}Z"
        for i in range(len(heights))
        if heights[i] > 0 and left[i + 1] > left[i]
    )
    return tag("path", {"class": style, "d": "".join(drawn)})


def label(x: float, y: float, said: str, anchor: str = "start") -> Html:
    """Text inside a plot, at pixels."""
    return _text(x, y, said, anchor, "named")


def _text(x: float, y: float, said: str, anchor: str, style: str = "") -> Html:
    kind: dict[str, str | bool] = {"class": style or False, "text-anchor": False if anchor == "start" else anchor}
    return tag("text", {"x": _px(x), "y": _px(y), **kind}, text(said))


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
