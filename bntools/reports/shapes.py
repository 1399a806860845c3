"""What arrives at chosen layers, against the bell curve that a layer with fitting statistics would see."""

from __future__ import annotations

import numpy as np

from bntools import words
from bntools.diagnosis.records import Diagnosis, LayerDrift
from bntools.reports import charts
from bntools.reports.markup import Html, joined, tag
from bntools.reports.page import Section, name

PEAK = 1 / np.sqrt(2 * np.pi)


def histograms(found: Diagnosis) -> Section | None:
    """One plot for each layer whose histogram was asked for."""
    drawn = [one for one in found.layers if one.histogram is not None and one.histogram[1].sum() > 0]
    if not drawn:
        return None
    explanation = (
        "Values that eval mode brings to a layer, normalized by its stored statistics. With statistics that fit they "
        "spread around 0 like the curve, the unit Gaussian, or at least with its centre and width; columns beside it, "
        "narrower or wider than it show how the data differs."
    )
    plots = tag("div", {"class": "pair"}, *(_plot(one) for one in drawn))
    return Section("histograms", "What the layers receive", explanation, plots)


def _plot(one: LayerDrift) -> Html:
    assert one.histogram is not None
    edges, counts = (np.asarray(each, np.float64) for each in one.histogram)
    density = counts / (counts.sum() * np.diff(edges))
    centre = (edges[1:] + edges[:-1]) / 2
    mean = float((centre * counts).sum() / counts.sum())
    spread = float(np.sqrt(((centre - mean) ** 2 * counts).sum() / counts.sum()))
    x = charts.across(float(edges[0]), float(edges[-1]), "normalized input, std")
    y = charts.upward(0.0, float(max(density.max(), PEAK)), "share per std")
    at = np.linspace(x.low, x.high, 121)
    curve = charts.line(x, y, list(at), list(PEAK * np.exp(-(at**2) / 2)), "curve")
    said = f"mean {words.number(mean)}, std {words.number(spread)}"
    plot = charts.chart(
        f"Histogram of what {one.name} receives: {said}", x, y, charts.columns(x, y, edges, density, "columns"), curve
    )
    head = joined([tag("strong", None, name(one.name, words.shortened(one.name, 34))), f": {said}"])
    return tag("div", None, tag("p", None, head), plot)
