"""What to do about a model's BN statistics, and why, from what a diagnosis measured.

The order is the order of thought: what makes all other figures meaningless comes first (broken statistics, a wrong
preprocessing), then what no statistics can mend (mixed domains, layers that are called on different things, training
on small batches), then the drift itself, weighed against what it does to the output and against its own noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from bntools.diagnosis import domains, fit, lines, looks, roads
from bntools.diagnosis.domains import CLEAR
from bntools.diagnosis.fit import Fit
from bntools.diagnosis.records import Advice, Diagnosis
from bntools.diagnosis.roads import MATTERS
from bntools.layer import SMALL_SHARE
from bntools.words import counted, number, percent

MOSTLY = 0.5  # of the initial value still inside: more of it than of any data
CALLS_APART = 0.5  # standard deviations between the calls of one layer and all of them: no statistics fit both
SMALL = 16  # samples in a training batch: below, BN is known to cost accuracy (Wu and He 2018, figure 1)
NOISY = 0.35  # standard deviations by which a batch's mean misses, in the worst channel: about batches of 4 in a CNN


def of(diagnosis: Diagnosis, *, batch_size: int | None = None) -> list[Advice]:
    """What to do, first what to do first; ``batch_size`` is that of the training to come.

    Where statistics are broken or the data is preprocessed otherwise, nothing else is concluded from it.
    """
    fits = fit.of(diagnosis)
    small = list(_small_batches(diagnosis, fits, batch_size))
    first = _broken(diagnosis) or _preprocessed(diagnosis)
    if first is not None:
        return [first, *(one for one in small if one.action != "replace")]
    structural = [one for one in (_separate(diagnosis), _recurrent(diagnosis), *small) if one is not None]
    urgent = [one for one in structural if one.action in ("separate", "replace")]
    later = [one for one in structural if one not in urgent]
    apart = any(one.action == "separate" for one in urgent)  # then statistics of all the data together say nothing
    return [*urgent, *([] if apart else [roads.by_drift(diagnosis, fits, batch_size)]), *later]


def notes(diagnosis: Diagnosis) -> list[str]:
    """What else is worth knowing of the layers and the data: sentences that ask for no action of their own."""
    found = [f"dead in this data: {counted(len(one.dead), 'channel')} of {one.name}" for one in diagnosis if one.dead]
    found += [
        f"{percent(one.layer.remainder)} of the initial value is still inside the statistics of {one.name}"
        for one in diagnosis
        if SMALL_SHARE < one.layer.remainder < MOSTLY
    ]
    loose = [name for name, reason in diagnosis.untouched.items() if reason.startswith("keeps no statistics")]
    if loose:
        found.append(
            f"eval mode normalizes with each batch's own statistics, so that an output depends on the batch: "
            f"{', '.join(loose)}"
        )
    contents = [one for one in diagnosis.domains if one.drift > max(MATTERS, CLEAR * one.noise)]
    if contents and not domains.differing(diagnosis.domains):
        worst = max(contents, key=lambda one: one.drift)
        found.append(
            f"the parts of the data look alike at the first layer, and differ in deep ones ({worst.name!r} by "
            f"{number(worst.drift)} standard deviations): classes rather than sites"
        )
    return found


def _broken(diagnosis: Diagnosis) -> Advice | None:
    """Statistics that hold nothing of any data."""
    layers = [one.layer for one in diagnosis]
    broken = [one.name for one in layers if not all(np.isfinite(part).all() for part in one.stats)]
    broken += [one.name for one in layers if one.name not in broken and (one.stats[1] < 0).any()]
    initial = {one.name: one.remainder for one in layers if one.name not in broken and one.remainder >= MOSTLY}
    names = [*broken, *initial]
    if not names:
        return None
    figures = {"layers": float(len(names))}
    what = f"the stored statistics of {_named(broken, diagnosis)} hold NaN, Inf or negative variances"
    if not broken:
        share = max(initial.values())
        figures["initial_share"] = share
        what = f"{_named(names, diagnosis)} were never updated"
        if share < 1:
            what = f"up to {percent(share)} of the initial value is still inside {_named(names, diagnosis)}"
    line, command = lines.resetting(diagnosis, names)
    return Advice("reset", f"{what}. There is nothing to keep: measure them on data", line, figures, command)


def _preprocessed(diagnosis: Diagnosis) -> Advice | None:
    """Another preprocessing under which the first layer fits far better."""
    found = looks.better(diagnosis.preprocessing)
    if found is None:
        return None
    given, best = found
    reason = (
        f"the data was probably preprocessed otherwise in training: as it is, the first BN layer is off by "
        f"{number(given.drift)} standard deviations in its worst channel, with the preprocessing {best.name!r} by "
        f"{number(best.drift)}. Mend how the data is read first: no other figure means anything before"
    )
    return Advice("preprocess", reason, best.how, {"given": given.drift, "better": best.drift})


def _separate(diagnosis: Diagnosis) -> Advice | None:
    """Parts of the data that look different."""
    found = sorted(domains.differing(diagnosis.domains), key=lambda one: -one.look)
    if not found:
        return None
    worst = found[0]
    reason = (
        f"{len(found)} of {len(diagnosis.domains)} parts of the data look{'s' if len(found) == 1 else ''} different: "
        f"at the first layer {worst.name!r} is {number(worst.look)} standard deviations from all of the data, where "
        f"{worst.samples} samples drawn at random would be {number(worst.look_noise)}. Statistics of the mixture fit "
        f"none of the parts: give each its own"
    )
    figures = {"look": worst.look, "noise": worst.look_noise, "parts": float(len(found))}
    line, command = lines.separating()
    return Advice("separate", reason, line, figures, command)


def _recurrent(diagnosis: Diagnosis) -> Advice | None:
    """A layer that one pass calls on things that differ."""
    found = [one for one in diagnosis if one.calls > 1 and one.call_gap > CALLS_APART]
    if not found:
        return None
    worst = max(found, key=lambda one: one.call_gap)
    reason = (
        f"a forward pass calls {worst.name} {worst.calls} times, on inputs up to {number(worst.call_gap)} standard "
        f"deviations from those of all calls together: no one set of statistics fits them. Give each call a BN layer "
        f"of its own, or take a normalization that keeps no statistics"
    )
    line = lines.replacing(diagnosis, [one.name for one in found])
    return Advice("replace", reason, line, {"call_gap": worst.call_gap})


def _small_batches(diagnosis: Diagnosis, fits: Sequence[Fit], batch_size: int | None) -> Iterator[Advice]:
    """Training on batches whose own statistics are noisy; called out in any case below SMALL."""
    moving = [one for one in fits if not one.frozen]
    if batch_size is None or batch_size >= SMALL or not moving:
        return
    noise = max(one.left for one in moving) * math.sqrt(diagnosis.samples / batch_size)
    seen = next((one.agreement for one in diagnosis.modes if one.batch_size == batch_size), None)
    text = (
        f"training batches of {batch_size} are small: the mean of one is typically {number(noise)} standard deviations "
        f"from that of the data, in the worst channel"
    )
    if seen is not None:
        text += f". Eval mode and train mode in such batches agree on {percent(seen)} of the samples"
    figures = {"batch_size": float(batch_size), "noise": noise}
    if math.isfinite(noise) and noise > NOISY:
        text += (
            ". Train with GroupNorm or LayerNorm in place of BN; or with BN frozen; or recalibrate exactly when "
            "training is over, which does not depend on the batch size"
        )
        yield Advice("replace", text, lines.replacing(diagnosis, [one.name for one in moving]), figures)
    else:
        line, command = lines.recalibrating(diagnosis)
        line, command = (f"{each}  # when training is over" for each in (line, command))
        reason = f"{text}. Measure the statistics exactly when training is over"
        yield Advice("recalibrate", reason, line, figures, command)


def _named(names: Sequence[str], diagnosis: Diagnosis) -> str:
    if len(names) == len(diagnosis):
        return "the only layer" if len(names) == 1 else f"all {len(names)} layers"
    return f"{counted(len(names), 'layer')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
