"""Stored against measured statistics, channel by channel, of a layer that is chosen in the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from bntools import words
from bntools.reports import charts
from bntools.reports.markup import Html, joined, tag
from bntools.reports.page import Section, name

POINTS = 30_000  # channels drawn in a page: more would make it heavier than its reader's patience
FEWEST = 60  # channels drawn of a layer, whatever the number of layers
LAYERS = 250  # layers that can be chosen
RINGS = 3  # channels that are named in a plot


@dataclass(frozen=True, eq=False)
class Channels:
    """One layer's two sets of statistics, arrays of shape (features,); the stds hold eps, as the layer divides."""

    name: str
    stored_mean: np.ndarray
    stored_std: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @property
    def shift(self) -> np.ndarray:
        """How far the means are apart, in stored standard deviations."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.mean == self.stored_mean, 0.0, (self.mean - self.stored_mean) / self.stored_std)

    @property
    def ratio(self) -> np.ndarray:
        """The new standard deviation over the stored one."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.std == self.stored_std, 1.0, self.std / self.stored_std)

    @property
    def drift(self) -> np.ndarray:
        """The larger of the two distances."""
        return np.maximum(np.abs(self.shift), np.abs(self.ratio - 1))

    @property
    def finite(self) -> np.ndarray:
        """Where all four can be drawn."""
        stds = (self.std > 0) & (self.stored_std > 0)
        return np.isfinite(self.stored_mean + self.mean + self.stored_std + self.std) & stds


def section(layers: Sequence[Channels], after: str) -> Section | None:
    """Both plots of each layer, the first one shown; ``after`` is what the new statistics are called."""
    shown = [layer for layer in layers if layer.finite.any()][:LAYERS]
    if not shown:
        return None
    most = max(FEWEST, POINTS // len(shown))
    panels = [
        tag("div", {"data-panel": "channels", "hidden": index > 0}, *_panel(layer, after, most))
        for index, layer in enumerate(shown)
    ]
    parts = [_picker(shown)] if len(shown) > 1 else []
    if len(layers) > len(shown):
        left = len(layers) - len(shown)
        parts.append(tag("p", {"class": "aside"}, f"{words.counted(left, 'layer')} with less drift cannot be chosen."))
    explanation = (
        f"One dot for each channel: the stored value across, the {after} one upwards. On the dashed line nothing "
        "changed; dots in a row beside it are a shift of the whole input, single ones, with their number, are channels "
        "to look at. Colours are those of the drift."
    )
    return Section("channels", f"Stored against {after}, by channel", explanation, joined([*parts, *panels]))


def _picker(shown: Sequence[Channels]) -> Html:
    options = (tag("option", None, f"{layer.name} (drift {_worst(layer)} std)") for layer in shown)
    select = tag("select", {"id": "channels-of", "data-picks": "channels", "autocomplete": "off"}, *options)
    return tag("p", {"class": "picker", "hidden": True}, tag("label", {"for": "channels-of"}, "Layer"), select)


def _worst(layer: Channels) -> str:
    return words.number(float(np.max(layer.drift)))


def _panel(layer: Channels, after: str, most: int) -> list[Html]:
    finite = np.flatnonzero(layer.finite)
    drawn = _sample(layer, finite, most)
    said = tag("strong", None, name(layer.name))
    head = joined([said, f": {words.counted(len(layer.mean), 'channel')}, drift {_worst(layer)} std."])
    left_out = len(layer.mean) - len(finite)
    asides = []
    if len(drawn) < len(finite):
        asides.append(f"{len(drawn):,} are drawn: those that drift the most, and an even sample of the others.")
    if left_out:
        asides.append(f"{left_out:,} whose statistics are not finite, or whose std is 0, are not drawn.")
    line = tag("p", None, head, " " if asides else None, " ".join(asides))
    pair = tag("div", {"class": "pair"}, _plot(layer, drawn, after, "mean"), _plot(layer, drawn, after, "std"))
    return [line, pair]


def _sample(layer: Channels, finite: np.ndarray, most: int) -> np.ndarray:
    """Which channels are drawn: half the room is for those that drift the most, the rest is evenly spread."""
    if len(finite) <= most:
        return finite
    order = finite[np.argsort(-layer.drift[finite], kind="stable")]
    worst, others = order[: most // 2], np.sort(order[most // 2 :])
    spread = others[np.linspace(0, len(others) - 1, most - len(worst)).astype(int)]
    return np.concatenate([worst, spread])


def _plot(layer: Channels, drawn: np.ndarray, after: str, what: str) -> Html:
    log = what == "std"
    stored, new = (layer.stored_std, layer.std) if log else (layer.stored_mean, layer.mean)
    stored, new = stored[drawn], new[drawn]
    low, high = float(min(stored.min(), new.min())), float(max(stored.max(), new.max()))
    x, y = charts.across(low, high, f"stored {what}", log), charts.upward(low, high, f"{after} {what}", log)
    marks = [charts.line(x, y, [x.low, x.high], [x.low, x.high], "same")]
    levels = np.array([words.severity(float(drift)) for drift in layer.drift[drawn]])
    chosen = ((level, levels == level) for level in get_args(words.Severity))
    marks += [charts.dots(x, y, stored[of], new[of], level) for level, of in chosen if of.any()]
    marks += charts.named(x, y, _leaders(layer, drawn, stored, new, log))
    return charts.chart(f"{what} of each channel of {layer.name}: stored against {after}", x, y, *marks)


def _leaders(
    layer: Channels, drawn: np.ndarray, stored: np.ndarray, new: np.ndarray, log: bool
) -> list[tuple[tuple[float, float], str, str]]:
    """The few channels that are farthest off: where they are drawn, their number, and how far."""
    ratio, shift = layer.ratio[drawn], layer.shift[drawn]
    distance = np.abs(np.log(ratio)) if log else np.abs(shift)
    leaders = []
    for place in np.argsort(-distance, kind="stable")[:RINGS]:
        if layer.drift[drawn[place]] >= words.BOUNDS[0][0]:
            off = f"ratio {words.number(float(ratio[place]))}" if log else f"{words.number(float(shift[place]))} std"
            at = (float(stored[place]), float(new[place]))
            leaders.append((at, f"{drawn[place]}", f"channel {drawn[place]}: {off}"))
    return leaders
