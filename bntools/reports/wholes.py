"""What concerns the whole model: eval against train mode, other ways to preprocess, domains in the data."""

from __future__ import annotations

from collections.abc import Sequence

from bntools import words
from bntools.diagnosis.records import Diagnosis, Domain, ModeGap, Preprocessing
from bntools.reports.bars import Bar, bars
from bntools.reports.page import Section


def modes(found: Diagnosis) -> Section | None:
    """How far eval mode's output is from train mode's, by batch size."""
    if not found.modes:
        return None
    rows = [Bar(_size(one), one.error, _mode(one)) for one in found.modes]
    explanation = (
        "Difference between the model's output in eval mode, with stored statistics, and in train mode, with each "
        "batch's own: the largest one, in percent of the largest output. If it stays when all samples are one batch, "
        "the stored statistics do not fit; if it is only there in small batches, it is their noise. Samples "
        "agree whose largest output is the same one."
    )
    body = bars("Difference between eval and train mode by batch size", rows, least=0.01)
    return Section("modes", "Eval against train mode", explanation, body)


def _size(one: ModeGap) -> str:
    return "all samples in one batch" if one.batch_size is None else f"batches of {one.batch_size:,}"


def _mode(one: ModeGap) -> str:
    agreement = "" if one.agreement is None else f", {words.percent(one.agreement)} agree"
    return f"{words.percent(one.error)} off{agreement}"


def preprocessing(found: Sequence[Preprocessing]) -> Section | None:
    """The first layer's drift under the usual ways to preprocess images."""
    if not found:
        return None
    rows = []
    for one in sorted(found, key=lambda one: one.drift):
        given = "as the data came" if one.given and one.name != "as given" else ""
        rows.append(Bar(one.name, one.drift, f"{words.number(one.drift)} std", words.severity(one.drift), remark=given))
    explanation = (
        "Drift of the first BN layer if the images were prepared otherwise. A far shorter bar than that of the data as "
        "it came says that the model was trained on images prepared that way."
    )
    return Section("preprocessing", "Preprocessing", explanation, bars("First layer's drift by preprocessing", rows))


def domains(found: Diagnosis) -> list[Section]:
    """How far parts of the data are from all of it: its domains, and its first and second half."""
    named = _parts("domains", "Parts of the data", sorted(found.domains, key=lambda one: -one.drift))
    halves = _parts("halves", "From the first half of the data to the second", found.halves)
    return [one for one in (named, halves) if one is not None]


def _parts(anchor: str, title: str, parts: Sequence[Domain]) -> Section | None:
    if not parts:
        return None
    rows = []
    for one in parts:
        level = "noise" if one.drift <= one.noise else words.severity(one.drift)
        count = f"{words.counted(one.samples, 'sample')}; first layer {words.number(one.look)} std"
        rows.append(Bar(one.name, one.drift, f"{words.number(one.drift)} std", level, 0.0, one.noise, count))
    explanation = (
        "How far the statistics of each part are from those of all data: the root mean square over a layer's channels, "
        "in the layer where that is most. The dashed mark is what a part of that size would show by chance: a bar well "
        "beyond it is a part that differs. Where the first layer, too, is off, the part looks different, as from "
        "another camera; where only deeper ones are, it holds other classes."
    )
    return Section(anchor, title, explanation, bars(title, rows, least=words.BOUNDS[0][0]))
