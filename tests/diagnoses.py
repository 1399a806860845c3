"""Diagnoses that are made by hand, for tests of what is said of them."""

from __future__ import annotations

import numpy as np

from bntools.diagnosis.records import Advice, Diagnosis, Domain, LayerDrift, ModeGap, Preprocessing
from bntools.layer import BatchNorm, distance


def layer(name: str, features: int = 8, shift: float = 0.5, seed: int = 0, **changes: object) -> LayerDrift:
    """A layer whose measured means are off by up to ``shift`` standard deviations, its last channel by just that."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=features), rng.gamma(2.0, 1.0, features) + 0.1
    std = np.sqrt(var + 1e-5)
    moves = shift * rng.uniform(-0.9, 0.9, features)
    moves[-1:] = shift
    stored = BatchNorm(
        name, "BatchNorm2d", features, 1, 1e-5, 0.1, mean, var, np.ones(features), np.zeros(features), 5, False, False
    )
    measured = mean + std * moves
    kl = moves**2 / 2
    drift = distance((mean, var), (measured, var), 1e-5)
    fields = {"standard_error": 0.01, "remaining_error": 0.01, **changes}
    return LayerDrift(stored, measured, var, drift, moves, np.ones(features), kl, **fields)


def diagnosis(*names: str, features: int = 8, seed: int = 0) -> Diagnosis:
    """A diagnosis with something in every field; the layer named last drifts the most."""
    edges = np.linspace(-4, 4, 33)
    counts = np.histogram(np.random.default_rng(seed).normal(0.3, 0.8, 2000), edges)[0]
    layers = [layer(name, features, 0.2 * (index + 1), index) for index, name in enumerate(names)]
    layers[0] = layer(names[0], features, 0.2, 0, histogram=(edges, counts), dead=[1, 2], gap=0.25)
    return Diagnosis(
        samples=1200,
        layers=layers,
        advice=[
            Advice("recalibrate", "two of the layers are off by 0.4 std", "bntools recalibrate model.pt data/"),
            Advice("freeze", "batches of 4 add noise", "bntools.freeze(model)"),
        ],
        modes=[ModeGap(1, 0.9, 0.4), ModeGap(32, 0.5, None), ModeGap(None, 0.47, 0.73)],
        alone=2e-7,
        preprocessing=[Preprocessing("as given", 0.6, True), Preprocessing("0..255", 418.0)],
        domains=[Domain("site-a", 400, 0.05, 0.06), Domain("site-b", 800, 0.31, 0.06, 0.3, 0.05)],
        halves=[Domain("first half", 600, 0.02, 0.03), Domain("second half", 600, 0.02, 0.03)],
        convergence=[(2**power, 0.6 / 2 ** (power / 2)) for power in range(11)],
        untouched={"head.bn": "not selected by layers="},
        notes=["one of the layers is frozen"],
    )
