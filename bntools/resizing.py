"""Other batches made from one: of another size, or with other values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bntools.batches import count


def mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with a function applied to everything in it that is no container; mappings become dicts."""
    if isinstance(batch, Mapping):
        return {key: mapped(function, part) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [mapped(function, part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return function(batch)


def resized(batch: Any, samples: int) -> Any:
    """The batch with another number of samples: its first ones, or all of them again and again."""
    size = count(batch)

    def one(value: Any) -> Any:
        if not getattr(value, "shape", ()) or value.shape[0] != size:
            return value
        return value[[i % size for i in range(samples)]]

    return mapped(one, batch)


def redrawn(batch: Any) -> Any:
    """A batch like this one with other values, always the same, as numpy arrays.

    Floats are drawn from a normal distribution with the array's mean and standard deviation (1 where that
    is 0); all else comes in another order. Arrays without axes stay as they are.
    """
    generator = np.random.default_rng(0)

    def one(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            return _permuted(generator, array)
        mean, std = array.mean(dtype=np.float64), array.std(dtype=np.float64)
        return (mean + (std or 1) * generator.standard_normal(array.shape)).astype(array.dtype)

    return mapped(lambda value: one(to_numpy(value)) if getattr(value, "shape", ()) else value, batch)


def shuffled(batch: Any) -> Any:
    """A batch with the values of each array in another order, always the same, as numpy arrays: none is new."""
    generator = np.random.default_rng(1)
    return mapped(
        lambda value: _permuted(generator, to_numpy(value)) if getattr(value, "shape", ()) else value,
        batch,
    )


def _permuted(generator: np.random.Generator, array: np.ndarray) -> np.ndarray:
    return generator.permutation(array.ravel()).reshape(array.shape)


def to_numpy(value: Any) -> np.ndarray:
    """An array of any framework as numpy; bfloat16 as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)
