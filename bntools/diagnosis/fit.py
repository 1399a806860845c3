"""How well data fits what a layer has stored, in the few numbers from which advice follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bntools.diagnosis.records import LayerDrift

CAP = 10.0  # standard deviations: beyond, a channel is off altogether, and must not hide all the others


@dataclass(frozen=True)
class Fit:
    """One layer: ``extent`` is the root mean square over its channels of the shift of the mean and the relative change
    of the standard deviation together, ``typical`` their median, both in stored standard deviations. Unlike the largest
    of the channels, neither grows with their number. ``apart`` is the extent with no channel
    capped at CAP. ``noise`` is the standard error of the measured mean in the worst channel, in stored standard
    deviations, ``left`` the same in measured ones: what recalibration would leave to chance
    (``LayerDrift.remaining_error``). ``ratio`` is the median over the channels of measured over stored standard
    deviation.
    """

    name: str
    extent: float
    apart: float
    typical: float
    noise: float
    left: float
    ratio: float
    frozen: bool


def of(layers: Iterable[LayerDrift]) -> list[Fit]:
    """The fit of each layer whose stored statistics are finite, in model order."""
    return [_fit(one) for one in layers if all(np.isfinite(part).all() for part in one.layer.stats)]


def _fit(one: LayerDrift) -> Fit:
    apart = np.nan_to_num(np.hypot(one.mean_shift, one.std_ratio - 1), nan=CAP)
    off = np.minimum(apart, CAP)
    living = np.delete(one.std_ratio, one.dead)
    ratio = float(np.median(living)) if living.size else 1.0
    return Fit(
        name=one.name,
        extent=float(np.sqrt(np.mean(off**2))),
        apart=float(np.sqrt(np.mean(apart**2))),
        typical=float(np.median(off)),
        noise=one.standard_error,
        left=one.remaining_error,
        ratio=ratio,
        frozen=one.layer.stats_frozen,
    )
