"""A digest of the weights of a Keras model that lie outside of BN statistics."""

from __future__ import annotations

from collections.abc import Iterator

import keras
from keras import ops

from bntools.backends.keras.found import RENORM
from bntools.backends.keras.naming import norms
from bntools.digests import combined

STATISTICS = ("moving_mean", "moving_variance", *RENORM)


def digest(model: keras.Model) -> str:
    """A digest of all floating-point weights; statistics, metrics and the states of random numbers are left out."""
    own = {id(getattr(layer, name, None)) for layer in norms(model).values() for name in STATISTICS}
    return combined(_weights([weight for weight in model.weights if id(weight) not in own]))


def _weights(found: list[keras.Variable]) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
    for weight in found:
        dtype = keras.backend.standardize_dtype(weight.dtype)
        if "float" in dtype:
            yield dtype, tuple(weight.shape), ops.convert_to_numpy(weight).tobytes()
