"""What the tests of folding Keras models share: telling statistics, and the comparison in float64."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

import bntools
from bntools.backends.keras.naming import norms
from bntools.folding import Folded


@contextmanager
def doubled():
    """Layers made in here compute in float64, so that a fold is exact to 1e-12.

    Not on Keras's torch back end, which computes in float32 all the same.
    """
    if keras.backend.backend() == "torch":
        yield
        return
    before, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(before)


def randomized(model: keras.Model, seed: int = 0, positive: bool = False) -> keras.Model:
    """The model with random biases, statistics, scales (some negative) and shifts."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.name == "bias":
            variable.assign(rng.normal(size=variable.shape))
    for layer in norms(model).values():
        n = layer.moving_mean.shape[0]
        layer.moving_mean.assign(rng.normal(size=n) * 0.5)
        layer.moving_variance.assign(rng.uniform(0.5, 2, n))
        if layer.gamma is not None:
            signs = np.ones(n) if positive else np.where(np.arange(n) % 3 == 1, -1, 1)
            layer.gamma.assign(rng.uniform(0.7, 1.3, n) * signs)
        if layer.beta is not None:
            layer.beta.assign(rng.normal(size=n) * 0.5)
    return model


def batch(*shape: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    """Random numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def outputs(model: keras.Model, x: Any) -> list[np.ndarray]:
    """What the model gives in inference mode."""
    return [keras.ops.convert_to_numpy(value) for value in keras.tree.flatten(model(x, training=False))]


def folds(model: keras.Model, x: Any, **options: Any) -> Folded:
    """The model folded, after checking that its function is the same on other numbers and that it is as it was."""
    before = [keras.ops.convert_to_numpy(variable).copy() for variable in model.variables]
    folded = bntools.fold(model, x, **options)
    after = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    other = keras.tree.map_structure(lambda part: batch(*part.shape, seed=1, dtype=str(part.dtype)), x)
    precision = (
        1e-12
        if "float64" in {keras.backend.standardize_dtype(variable.dtype) for variable in model.variables}
        else 1e-5
    )
    assert folded.check.error < precision
    for expected, found in zip(outputs(model, other), outputs(folded.model, other), strict=True):
        assert np.abs(expected - found).max() <= precision * np.abs(expected).max()
    assert not norms(folded.model).keys() & set(folded.folded)
    assert norms(folded.model).keys() <= folded.kept.keys()
    return folded
