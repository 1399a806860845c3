"""The report of a recalibration: what changed, layer by layer, and what is left."""

from __future__ import annotations

from collections.abc import Mapping

from bntools import words
from bntools.recalibrated import SUSPECT, LayerChange, Recalibration
from bntools.reports import channels, convergence, drifts
from bntools.reports.bars import Bar, bars
from bntools.reports.drifts import Drift
from bntools.reports.markup import Content, Html
from bntools.reports.page import Section, Verdict, name, page, remarks, table, tiles

METHODS = {"exact": "exact", "precise": "pooled mini-batches", "ema": "the framework's own update"}
DRIFT = (
    "How far the new statistics are from the old ones, in the channel that is farthest off: the mean in old standard "
    "deviations (std), or the relative change of the std. Look for the first long bar in model order: there the data "
    "began to differ."
)


def report(result: Recalibration, title: str, about: Mapping[str, str]) -> str:
    """The page of a recalibration."""
    layers = [Drift(_channels(one), one.drift) for one in result.layers]
    sections = [
        drifts.section(layers, DRIFT) if layers else None,
        _residuals(result),
        channels.section([one.channels for one in drifts.ranked(layers)], "new"),
        convergence.section(result.convergence),
        _table(result, layers) if layers else None,
        *remarks(result.untouched, result.notes),
    ]
    verdict = Verdict("good" if layers else "plain", words.sentence(str(result).partition(";")[0]), _summary(result))
    return page(title or "BN recalibration", about, verdict, [one for one in sections if one is not None])


def _channels(one: LayerChange) -> channels.Channels:
    (before, _), (after, _) = one.before.stats, one.after.stats
    return channels.Channels(one.name, before, one.before.std, after, one.after.std)


def _summary(result: Recalibration) -> Html:
    worst = max(result.layers, key=lambda one: one.drift, default=None)
    figures: dict[str, Content] = {"samples": f"{result.samples:,}", "layers changed": f"{len(result.layers):,}"}
    if worst is not None:
        figures[f"largest drift, in layer {words.shortened(worst.name, 28)}"] = f"{words.number(worst.drift)} std"
    if result.residual is not None:
        figures["residual: what eval mode then sees is off by"] = f"{words.number(result.residual)} std"
    if result.standard_error is not None:
        figures["standard error of the worst mean"] = f"{words.number(result.standard_error)} std"
    figures["method"] = METHODS.get(result.method, result.method)
    if result.untouched:
        figures["layers left as they were"] = f"{len(result.untouched):,}"
    return tiles(figures)


def _residuals(result: Recalibration) -> Section | None:
    found = [(one, one.residual) for one in result.layers if one.residual is not None]
    if not found:
        return None
    most = sorted(found, key=lambda pair: -pair[1])[: drifts.WORST]
    rows = found if len(found) <= drifts.EACH else most
    explanation = (
        "How far what eval mode now brings to each layer is from the statistics it has stored, in standard deviations. "
        f"Rounding leaves about 1e-6 in float32, too little to see here: a row is at least {SUSPECT:g} std "
        "wide. More says that the statistics do not yet fit each other."
    )
    explanation += f" The {drifts.WORST} largest of {len(found)} are shown." if len(rows) < len(found) else ""
    drawn = [Bar(one.name, residual, f"{words.number(residual)} std") for one, residual in rows]
    return Section("residual", "What is left", explanation, bars("Residual by layer", drawn, least=SUSPECT))


def _table(result: Recalibration, layers: list[Drift]) -> Section:
    change = {id(drift): one for drift, one in zip(layers, result.layers, strict=True)}
    headers = ["layer", "channels", "drift, std", "residual, std", "average mean: before", "after"]
    headers += ["average std: before", "after", "channels that changed most: shift, std ratio"]
    rows = [_row(change[id(drift)], drift) for drift in drifts.ranked(layers)]
    return Section("table", "All layers", "Those that changed most first.", table("All layers", headers, rows))


def _row(one: LayerChange, drift: Drift) -> list[Content]:
    (before, _), (after, _) = one.before.stats, one.after.stats
    averages = [float(each.mean()) for each in (before, after, one.before.std, one.after.std)]
    return [
        name(one.name, words.shortened(one.name, 44)),
        one.before.features,
        drifts.value(drift),
        words.number(one.residual),
        *(words.number(each) for each in averages),
        drifts.leading(drift.channels),
    ]
