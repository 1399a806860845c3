"""Reading the statistics of a Keras model that trains."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from bntools.backends.keras.naming import norms


class Reading:
    """Numbers that have been read."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def ready(self) -> bool:
        """They are here."""
        return True

    def values(self) -> np.ndarray:
        """The numbers, float64."""
        return self._values


class Observer:
    """Reads the statistics of named layers; Keras has no way to do so without waiting for an accelerator."""

    def __init__(self, model: keras.Model, names: list[str]):
        found = norms(model)
        self._names = list(names)
        self._layers = [found[name] for name in names]

    def peaks(self) -> Reading:
        """The largest magnitude in each layer's statistics, of shape (layers,): NaN or Inf if one of them is."""
        return Reading(
            np.array([max(_peak(layer.moving_mean), _peak(layer.moving_variance)) for layer in self._layers])
        )

    def statistics(self) -> Reading:
        """Mean and variance of each layer one after the other, in one vector."""
        both = [v for layer in self._layers for v in (layer.moving_mean, layer.moving_variance)]
        return Reading(np.concatenate([np.asarray(ops.convert_to_numpy(v), np.float64) for v in both]))

    def order(self) -> list[str]:
        """The names in the model's order."""
        return self._names

    def close(self) -> None:
        """Nothing is left open."""


def observer(model: keras.Model, names: list[str]) -> Observer:
    """What reads the statistics of the named layers."""
    return Observer(model, names)


def _peak(variable: Any) -> float:
    values = np.abs(np.asarray(ops.convert_to_numpy(variable), np.float64))
    # Python's max would pass over a NaN.
    return float(values.max()) if np.isfinite(values).all() else float("inf")
