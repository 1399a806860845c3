"""What follows from a drift: which of the roads fits, and how it is taken.

Leave the statistics, keep them frozen, let them adapt, measure them anew, or forget them: the drift is weighed against
its own noise, against what it does to the output, and against what the samples at hand can measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bntools.course import GOALS, needed
from bntools.diagnosis import domains, lines
from bntools.diagnosis.fit import Fit
from bntools.diagnosis.records import Advice, Diagnosis
from bntools.words import counted, number, percent

MATTERS = 0.15  # standard deviations of extent: on digits, 0.1 cost 0.5 % of accuracy at most, 0.2 about 2 %
CHANCE = 2.0  # standard errors: what channels are off by where nothing has drifted stays below
AGREES = 0.99  # of the samples: then eval mode and the data's own statistics say the same
CLOSE = 0.02  # of the largest output: the same for outputs that are no scores
ENOUGH_TO_AGREE = 100  # samples, from which on a share of 1 % can be seen
UNSEEN = 0.3  # standard errors above it hide a drift of half a standard deviation, which matters
ENOUGH = 0.2  # standard error in the worst channel, about 0.1 in a typical one: hardly seen in the output
HOPELESS = 0.5  # standard error at which measured statistics are no better than stored ones with a drift that matters
SAME = 1e-5  # standard deviations between the samples' own means in the worst channel: rounding
FEWEST = 8  # samples: from fewer not even a standard error is known
HUGE = 3.0  # standard deviations in most channels: the data is where training never was
FACTOR = 5.0  # between measured and stored standard deviations, in most channels
LOWER = 0.96  # of the stored standard deviation: with less variety of content, deep layers vary less
USUAL_BATCH = 32  # for which a momentum is said where the training's batch size is not known
FASTEST = 0.1  # PyTorch's own momentum: what moves faster is not adapting slowly
FOLLOWS = 0.1  # standard deviations that a moving average may miss the mean by, in the worst channel


def by_drift(diagnosis: Diagnosis, fits: Sequence[Fit], batch_size: int | None) -> Advice:
    """The road for statistics that are finite; ``batch_size`` is that of the training to come."""
    samples, noise, left = diagnosis.samples, max(one.noise for one in fits), max(one.left for one in fits)
    drifting = [one for one in fits if one.extent > MATTERS and one.apart > CHANCE * one.noise]
    worst = max(drifting or fits, key=lambda one: one.extent)
    figures = {"drift": worst.extent, "standard_error": noise, "samples": float(samples)}
    if samples > 1 and left * math.sqrt(samples) < SAME:
        return _all_the_same(diagnosis, figures)
    if samples < FEWEST or (not drifting and noise > UNSEEN):
        return _too_few(diagnosis, noise, figures)
    if moving := domains.differing(diagnosis.halves):
        return _follow(diagnosis, max(one.look for one in moving), left, batch_size, figures)
    if not drifting:
        return _fits(worst, samples, figures)
    off = (
        f"{len(drifting)} of {counted(len(fits), 'layer')} {'does' if len(drifting) == 1 else 'do'} not fit the data, "
        f"worst {worst.name!r}: off by {'more than ' if worst.apart > worst.extent else ''}{number(worst.extent)} "
        f"standard deviations (root mean square over its channels), with {number(worst.ratio)} times the stored "
        f"standard deviation"
    )
    if without_effect := _without_effect(diagnosis):
        return Advice("leave", f"{off}. But {without_effect}: the weights fit what is stored", "", figures)
    if _elsewhere(worst) and left <= HOPELESS:
        reason = f"{off}. Training never saw anything like this data: nothing of the stored statistics is worth keeping"
        line, command = lines.resetting(diagnosis)
        return Advice("reset", reason, line, figures, command)
    if _other_content(fits, worst):
        reason = (
            f"{off}, while the first layer fits ({number(fits[0].extent)}): the data looks as in training, and varies "
            f"less in deep layers, as data of only some classes does. Statistics of some classes do not suit the "
            f"others; if the data holds all classes, recalibrate"
        )
        return Advice("freeze", reason, lines.freezing(diagnosis), figures)
    if left > HOPELESS:
        return _too_few(diagnosis, left, figures)
    return _measure_anew(diagnosis, off, fits, left, batch_size, figures)


def _fits(worst: Fit, samples: int, figures: dict[str, float]) -> Advice:
    reason = (
        f"the stored statistics fit the data: the layer that is farthest off, {worst.name!r}, is off by "
        f"{number(worst.extent)} standard deviations (root mean square over its channels), and up to "
        f"{number(max(MATTERS, CHANCE * worst.noise))} makes no difference or may be chance "
        f"({counted(samples, 'sample')}, standard error {number(worst.noise)} in the worst channel)"
    )
    return Advice("leave", reason, "", figures)


def _measure_anew(
    diagnosis: Diagnosis,
    off: str,
    fits: Sequence[Fit],
    left: float,
    batch_size: int | None,
    figures: dict[str, float],
) -> Advice:
    """A real drift: how much the samples suffice for decides between new statistics and a blend."""
    samples = diagnosis.samples
    if left <= ENOUGH:
        enough = [needed(samples, left, target) for target in GOALS]
        reason = (
            f"{off}. {counted(samples, 'sample')} are enough to measure its means anew to within {number(left)} "
            f"standard deviations (standard error, worst channel); about {enough[0]:,} give {GOALS[0]:g}, about "
            f"{enough[1]:,} give {GOALS[1]:g}"
        )
        figures |= {"samples_5_percent": float(enough[0]), "samples_1_percent": float(enough[1])}
        line, command = lines.recalibrating(diagnosis)
        return Advice("recalibrate", reason, line, figures, command)
    # The least expected square error of a blend of values known up to ``noise`` and ones that are off by ``extent``.
    prior = max(1, round(samples * sum(one.noise**2 for one in fits) / sum(one.extent**2 for one in fits)))
    momentum = _momentum(samples, left, batch_size)
    reason = (
        f"{off}. But {counted(samples, 'sample')} measure new means only to within {number(left)} standard deviations "
        f"(standard error, worst channel): keep what is stored in the average, as {counted(prior, 'sample')}. Or let "
        f"training move the statistics, {_in_words(momentum, batch_size)}. From about "
        f"{needed(samples, left, ENOUGH):,} samples on, recalibrate without the stored ones"
    )
    figures |= {"prior": float(prior), "momentum": momentum}
    line, command = lines.recalibrating(diagnosis, prior=prior)
    return Advice("adapt", reason, line, figures, command)


def _follow(
    diagnosis: Diagnosis, look: float, left: float, batch_size: int | None, figures: dict[str, float]
) -> Advice:
    """Statistics that move as the data goes."""
    momentum = _momentum(diagnosis.samples, left, batch_size)
    memory = needed(diagnosis.samples, left, FOLLOWS)
    reason = (
        f"the data changes as it goes: its halves are {number(look)} standard deviations from the whole at the first "
        f"layer. Let the statistics follow, remembering some {memory:,} samples; in training "
        f"{_in_words(momentum, batch_size)}. If the halves are two domains instead, give each its own statistics"
    )
    figures |= {"look": look, "momentum": momentum, "half_life": float(memory)}
    line, command = lines.following(diagnosis, memory)
    return Advice("adapt", reason, line, figures, command)


def _too_few(diagnosis: Diagnosis, noise: float, figures: dict[str, float]) -> Advice:
    samples = diagnosis.samples
    if math.isfinite(noise) and samples >= 2:
        enough = max(needed(samples, noise, ENOUGH), FEWEST)
        more = f"measure means to within {number(noise)} standard deviations only; about {enough:,} would do"
        figures |= {"samples_needed": float(enough)}
    else:
        more = "do not even tell how uncertain they are; some dozens would do"
    one = samples == 1
    reason = (
        f"{counted(samples, 'sample')} {'is' if one else 'are'} too few: so few {more}. Until then keep what is stored"
    )
    return Advice("freeze", reason, lines.freezing(diagnosis), figures)


def _all_the_same(diagnosis: Diagnosis, figures: dict[str, float]) -> Advice:
    """Samples that are one and the same: a constant, or one image many times."""
    reason = (
        f"the {diagnosis.samples:,} samples are all the same to the model: no channel's mean differs between them. "
        f"Check how the data is read; until then keep what is stored"
    )
    return Advice("freeze", reason, lines.freezing(diagnosis), figures)


def _elsewhere(worst: Fit) -> bool:
    """Whether most channels of a layer are where training never was."""
    return worst.typical > HUGE or not 1 / FACTOR < worst.ratio < FACTOR


def _other_content(fits: Sequence[Fit], worst: Fit) -> bool:
    """Whether the data looks as in training and holds less: the drift grows with depth, and deep layers vary less.

    So it was for digits of one to five classes. A camera shows in the first layer, and single layers whose
    statistics are stale show anywhere.
    """
    place = fits.index(worst)
    shallow = fits[: max(1, len(fits) // 2)]
    deep = place >= len(fits) * 2 // 3 and len(fits) > 1
    return deep and all(one.extent <= MATTERS for one in shallow) and 1 / FACTOR < worst.ratio < LOWER


def _without_effect(diagnosis: Diagnosis) -> str:
    """How well eval mode's outputs and those with the data's own statistics agree, where they do; else empty."""
    whole = next((one for one in diagnosis.modes if one.batch_size is None), None)
    if whole is None or diagnosis.samples < ENOUGH_TO_AGREE:
        return ""
    if whole.agreement is None:
        same = f"eval mode's outputs are within {percent(whole.error)} of those with the data's own statistics"
        return same if whole.error <= CLOSE else ""
    same = (
        f"stored statistics and the data's own give {percent(whole.agreement)} of the samples the same largest output"
    )
    return same if whole.agreement >= AGREES else ""


def _momentum(samples: int, left: float, batch_size: int | None) -> float:
    """PyTorch's momentum m at which a moving average forgets no faster than its noise allows.

    Averaged over batches of b samples it is worth ``b * (2 - m) / m`` of them.
    """
    batch = batch_size or USUAL_BATCH
    wanted = needed(samples, left, FOLLOWS)
    return float(f"{min(FASTEST, 2 * batch / (wanted + batch)):.2g}")


def _in_words(momentum: float, batch_size: int | None) -> str:
    return (
        f"with momentum={momentum:g} in PyTorch (the weight of the new), {1 - momentum:g} in Keras (that of the old), "
        f"at a batch size of {batch_size or USUAL_BATCH}"
    )
