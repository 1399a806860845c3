"""How far measured statistics are from the stored ones of a layer, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bntools.layer import BatchNorm, distance

STILL = 1e-3  # a standard deviation below this share of sqrt(eps): what BN makes of the channel does not vary
ROUNDING = 2.0**-21  # of a float32 mean: a spread below it is rounding, not signal


@dataclass(frozen=True, eq=False)
class Drift:
    """``mean_shift``, ``std_ratio`` and ``kl`` per channel, and their layer's ``drift``, as ``LayerDrift`` has them."""

    mean_shift: np.ndarray
    std_ratio: np.ndarray
    kl: np.ndarray
    drift: float


def between(layer: BatchNorm, mean: np.ndarray, var: np.ndarray) -> Drift:
    """How far a measured mean and variance, of shape (features,), are from what a layer has stored.

    Where the stored statistics are not finite, drift and divergence are infinite and the others not a number.
    """
    stored_mean, stored_var = layer.stats
    with np.errstate(divide="ignore", invalid="ignore"):
        std, seen = layer.std, np.sqrt(var + layer.eps)
        same = (mean == stored_mean) & (seen == std)  # also where both are 0, in a dead channel with eps=0
        shift = np.where(same, 0.0, (mean - stored_mean) / std)
        ratio = np.where(same, 1.0, seen / std)
    drift = distance(layer.stats, (mean, var), layer.eps)
    finite = np.isfinite(stored_mean) & np.isfinite(stored_var)
    return Drift(
        mean_shift=np.where(finite, shift, np.nan),
        std_ratio=np.where(finite, ratio, np.nan),
        kl=np.where(finite, _divergence(shift, ratio), np.inf),
        drift=drift if finite.all() and not np.isnan(drift) else np.inf,
    )


def _divergence(shift: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """KL(measured || stored) of two Gaussians, from their shift and ratio in stored standard deviations, in nats.

    ``log(s / m) + (m**2 + d**2) / (2 * s**2) - 1 / 2`` with deviations m and s, and d between the means.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (np.square(ratio) + np.square(shift) - 1) / 2 - np.log(ratio)
    return np.where(np.isnan(divergence), np.inf, np.maximum(divergence, 0.0))


def still(mean: np.ndarray, var: np.ndarray, eps: float) -> list[int]:
    """The channels whose values do not vary, up to rounding and to what eps lets through."""
    std = np.sqrt(var)
    return [int(c) for c in np.flatnonzero(std <= np.maximum(STILL * eps**0.5, ROUNDING * np.abs(mean)))]
