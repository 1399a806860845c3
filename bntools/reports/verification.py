"""The report of a comparison of two models: how far their outputs are apart, and where they part."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bntools import words
from bntools.comparison import EDGES, OutputError
from bntools.reports import charts
from bntools.reports.markup import Content, Html, joined, tag
from bntools.reports.page import Section, Verdict, listed, name, page, remarks, table, tiles
from bntools.trial import Verification

OUTPUTS = 24  # histograms drawn; the table has all outputs


def report(check: Verification, title: str, about: Mapping[str, str]) -> str:
    """The page of a verification."""
    headline = "The models agree" if check.passed else "The models do not agree"
    body = joined([tag("p", None, sentence(check)), tiles(figures(check))])
    verdict = Verdict("good" if check.passed else "bad", headline, body)
    return page(title or "Verification", about, verdict, sections(check))


def sentence(check: Verification) -> str:
    """The comparison's outcome in words."""
    if check.passed:
        factor = check.tolerance / check.error if check.error else math.inf
        times = f", {words.number(factor)} times below the tolerance" if 2 <= factor < 1e9 else ""
        equal = "every output is equal, bit for bit" if not check.error else "the outputs agree up to rounding"
        return f"On {words.counted(check.samples, 'sample')} {equal}{times}."
    where = f" The first value inside the models that differs is {check.divergence}." if check.divergence else ""
    return f"{words.sentence(check.reason or 'the outputs differ')}.{where}"


def figures(check: Verification) -> dict[str, Content]:
    """The tiles of a comparison."""
    found: dict[str, Content] = {
        "error of the worst output, relative to its scale": words.number(check.error),
        "tolerance": words.number(check.tolerance),
    }
    if check.agreement is not None:
        found["same largest output"] = words.percent(check.agreement)
    level = f", graph optimizations {check.optimization}" if check.optimization else ""
    provider = check.provider.removesuffix("ExecutionProvider")
    return {**found, "samples": f"{check.samples:,}", f"provider{level}": provider.upper()}


def sections(check: Verification) -> list[Section]:
    """Histograms, the table of outputs, where the nodes ran and notes."""
    plots = [_histogram(one, check.tolerance) for one in check.outputs if _drawable(one)][:OUTPUTS]
    found = []
    if plots:
        explanation = (
            "How many values of an output differ by how much, as a share of the output's largest value. Rounding makes "
            "a hill far left of the dashed line, the tolerance; columns right of it are values that are wrong."
        )
        found.append(Section("outputs", "Differences", explanation, tag("div", {"class": "pair"}, *plots)))
    if check.outputs:
        found.append(_table(check))
    if len(check.placement) > 1:
        items = [f"{provider}: {words.counted(nodes, 'node')}" for provider, nodes in check.placement.items()]
        explanation = "Which provider ran the candidate's nodes."
        found.append(Section("placement", "Where it ran", explanation, listed(items)))
    return [*found, *remarks({}, check.notes)]


def _drawable(one: OutputError) -> bool:
    return sum(one.histogram[1:]) > 0


def _histogram(one: OutputError, tolerance: float) -> Html:
    edges = np.array([EDGES[0] / 10, *EDGES, EDGES[-1] * 10])
    counts = np.asarray(one.histogram[1:], np.float64)
    there = np.flatnonzero(counts)
    first, last = int(there[0]), int(there[-1]) + 1
    x = charts.across(min(edges[first], tolerance / 10), max(edges[last], tolerance * 3), "difference", log=True)
    y = charts.upward(0.8, float(counts.max()) * 1.3, "values", log=True)
    low, high = edges[first : last + 1], counts[first:last]
    over = low[:-1] >= tolerance
    limit = charts.line(x, y, [tolerance, tolerance], [y.low, y.high], "limit-line")
    equal, total = one.histogram[0], sum(one.histogram)
    said = f"{words.percent(equal / total)} of {total:,} values are equal, the largest difference is {one.error:.1e}"
    plot = charts.chart(
        f"Differences of output {one.name}: {said}",
        x,
        y,
        charts.columns(x, y, low, np.where(over, 0, high), "columns"),
        charts.columns(x, y, low, np.where(over, high, 0), "columns over"),
        limit,
        charts.label(float(x.at(tolerance)) - 5, charts.TOP + 14, "tolerance", "end"),
    )
    head = joined([tag("strong", None, name(one.name, words.shortened(one.name, 34))), f": {said}"])
    return tag("div", None, tag("p", None, head), plot)


def _table(check: Verification) -> Section:
    headers = ["output", "shape", "dtype", "error", "largest difference", "average difference", "agreement"]
    problems = any(one.problem for one in check.outputs)
    headers += ["problem"] if problems else []
    rows: list[list[Content]] = []
    for one in sorted(check.outputs, key=lambda one: -one.error):
        figures = [words.number(each) for each in (one.error, one.max_error, one.mean_error)]
        shape = "x".join(str(size) for size in one.shape)
        label = name(one.name, words.shortened(one.name, 44))
        rows.append([label, shape, one.dtype, *figures, words.percent(one.agreement)])
        if problems:
            rows[-1].append(tag("span", {"class": "wide"}, one.problem))
    explanation = "The error is the largest difference over the largest value of the reference."
    return Section("table", "All outputs", explanation, table("All outputs", headers, rows))
