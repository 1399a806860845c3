"""The report of a diagnosis: what to do, and every figure that says so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bntools import words
from bntools.diagnosis.records import Advice, Diagnosis, LayerDrift
from bntools.reports import channels, convergence, drifts, shapes, wholes
from bntools.reports.drifts import Drift
from bntools.reports.markup import Content, Html, joined, tag
from bntools.reports.page import Section, Verdict, code, name, page, remarks, table, tiles

HEADLINES = {
    "leave": ("good", "Leave the statistics as they are"),
    "recalibrate": ("act", "Recalibrate the statistics"),
    "freeze": ("act", "Keep the statistics frozen"),
    "adapt": ("act", "Let the statistics adapt slowly"),
    "reset": ("bad", "Reset the statistics and recalibrate"),
    "replace": ("act", "Replace batch normalization"),
    "preprocess": ("bad", "Preprocess the data differently"),
    "separate": ("act", "Treat the domains in the data separately"),
}
DRIFT = (
    "How far the statistics of the data are from the stored ones, in the channel that is farthest off: the mean in "
    "stored standard deviations (std), or the relative change of the std. The thin line is ± one standard error; each "
    "layer is measured behind layers that have their new statistics already. Look for the first long bar in model "
    "order: there the shift comes in."
)


def report(found: Diagnosis, title: str, about: Mapping[str, str]) -> str:
    """The page of a diagnosis."""
    layers = [Drift(_channels(one), one.drift, one.standard_error) for one in found.layers]
    sections = [
        drifts.section(layers, DRIFT) if layers else None,
        wholes.modes(found),
        channels.section([one.channels for one in drifts.ranked(layers)], "measured"),
        shapes.histograms(found),
        convergence.section(found.convergence),
        wholes.preprocessing(found.preprocessing),
        *wholes.domains(found),
        _table(found, layers) if layers else None,
        *remarks(found.untouched, found.notes),
    ]
    return page(title or "BN diagnosis", about, _verdict(found, layers), [one for one in sections if one is not None])


def _channels(one: LayerDrift) -> channels.Channels:
    mean, _ = one.layer.stats
    std = np.sqrt(np.maximum(one.var, 0) + one.layer.eps)
    return channels.Channels(one.name, mean, one.layer.std, one.mean, std)


def _verdict(found: Diagnosis, layers: list[Drift]) -> Verdict:
    if not found.advice:
        return Verdict("plain", "What was measured", _summary(found, layers))
    first, *others = found.advice
    tone, headline = HEADLINES.get(first.action, ("plain", first.action))
    parts = [*_advice(first), *(tag("div", None, tag("h3", None, _headline(one)), *_advice(one)) for one in others)]
    return Verdict(tone, headline, joined([*parts, _summary(found, layers)]))


def _headline(one: Advice) -> str:
    return f"Also: {HEADLINES.get(one.action, ('', one.action))[1].lower()}"


def _advice(one: Advice) -> list[Content]:
    return [tag("p", None, one.reason), code(one.how) if one.how else None]


def _summary(found: Diagnosis, layers: list[Drift]) -> Html:
    figures: dict[str, Content] = {"samples": f"{found.samples:,}", "BN layers measured": f"{len(found.layers):,}"}
    if layers:
        worst = drifts.ranked(layers)[0]
        where = name(worst.channels.name, words.shortened(worst.channels.name, 28))
        label = joined(["largest drift, in layer ", where])
        figures[label] = f"{words.number(worst.value)} std"
    whole = next((one for one in found.modes if one.batch_size is None), None)
    if whole is not None:
        figures["output, eval against train mode, all samples"] = words.percent(whole.error)
        if whole.agreement is not None:
            figures["same largest output in both modes"] = words.percent(whole.agreement)
    if found.alone is not None:
        figures["output of a sample alone against in a batch"] = words.number(found.alone)
    return tiles(figures)


def _table(found: Diagnosis, layers: list[Drift]) -> Section:
    records = {id(drift): one for drift, one in zip(layers, found.layers, strict=True)}
    place = {id(drift): index for index, drift in enumerate(layers, 1)}
    gaps = any(one.gap is not None for one in found.layers)
    headers = ["layer", "place", "channels", "drift, std", "± se", "largest mean shift, std", "std ratio", "KL, nats"]
    headers += ["fixes of the outputs' error"] if gaps else []
    headers += ["channels that lead: shift, std ratio", "dead channels"]
    problems = any(one.layer.problems for one in found.layers)
    headers += ["problems"] if problems else []
    rows = [_row(records[id(drift)], drift, place[id(drift)], gaps, problems) for drift in drifts.ranked(layers)]
    explanation = (
        "Worst first; place is the layer's place in the model. KL is the divergence of the measured Gaussian from the "
        "stored one, in its worst channel. A dead channel does not vary."
    )
    if gaps:
        explanation += (
            " What a layer fixes is the share of the outputs' error that goes if it alone gets its measured "
            "statistics; worse: alone they make the outputs worse."
        )
    return Section("table", "All layers", explanation, table("All layers", headers, rows))


def _row(one: LayerDrift, drift: Drift, place: int, gaps: bool, problems: bool) -> list[Content]:
    ratio = one.std_ratio
    cells: list[Content] = [
        name(one.name, words.shortened(one.name, 44)),
        place,
        one.layer.features,
        drifts.value(drift),
        words.number(one.standard_error),
        words.number(_extreme(one.mean_shift)),
        f"{words.number(float(ratio.min()))} to {words.number(float(ratio.max()))}" if ratio.size else "-",
        words.number(float(one.kl.max(initial=0.0))),
    ]
    if gaps:
        cells.append(words.mended(one.gap))
    cells += [drifts.leading(drift.channels), f"{len(one.dead):,}" if one.dead else ""]
    return [*cells, tag("span", {"class": "wide"}, "; ".join(one.layer.problems))] if problems else cells


def _extreme(values: np.ndarray) -> float | None:
    """The value that is farthest from zero, with its sign."""
    if not values.size:
        return None
    return float(values[int(np.argmax(np.nan_to_num(np.abs(values), nan=np.inf)))])
