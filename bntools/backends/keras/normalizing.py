"""What a BN layer does with its input: the moments of it, and its normalization by the stored statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from bntools.errors import BntoolsError
from bntools.kernel import moments_of
from bntools.moments import Moments

STOCK = keras.layers.BatchNormalization.call


def masked_moments(x: Any, mask: Any, axis: int, per_sample: bool) -> tuple[Moments, np.ndarray | None]:
    """Moments of a layer's input per channel on ``axis``, and the samples' means, of what the mask leaves.

    ``mask`` has the shape of ``x`` without the last axis, as Keras has it; None leaves all. Half precision is measured
    in float32, in which the layer computes.
    """
    values = _readable(x)
    if mask is None:
        return moments_of(values, per_sample, axis)
    left = _left(values, mask, axis)
    samples = None
    if per_sample:
        means = [sample[rows].mean(0, np.float64) for sample, rows in zip(values, left, strict=True) if rows.any()]
        samples = np.reshape(means, (len(means), values.shape[-1]))
    return Moments.of(values[left], axis=-1), samples


def masked_values(x: Any, mask: Any, axis: int) -> np.ndarray:
    """A layer's input as rows of channels, without the positions that are masked."""
    values = _readable(x)
    rows = np.moveaxis(values, axis, -1) if mask is None else values[_left(values, mask, axis)]
    return np.array(rows.reshape(-1, rows.shape[-1]))


def _readable(x: Any) -> np.ndarray:
    values = as_numpy(x)
    return values.astype(np.float32) if values.dtype.name == "bfloat16" else values


def _left(values: np.ndarray, mask: Any, axis: int) -> np.ndarray:
    """The mask as an array of what is left. Raises BntoolsError where Keras would mask channels."""
    left = np.asarray(ops.convert_to_numpy(mask)).astype(bool)
    if axis % values.ndim != values.ndim - 1:
        raise BntoolsError(
            f"found a mask of shape {left.shape} at a layer whose channels lie on axis {axis} of {values.shape}: "
            f"Keras would mask channels; expected axis=-1"
        )
    return left


def normalized(layer: Any, usual: Callable[..., Any], x: Any, given: dict[str, Any]) -> Any:
    """The layer's output with its stored statistics.

    Where it is Keras's own layer on TensorFlow, over four axes with the channels last, one operation does what takes
    Keras three passes over memory: it is the same up to rounding.
    """
    if type(layer).call is STOCK and keras.backend.backend() == "tensorflow":
        fused = len(x.shape) == 4 and layer.axis in (-1, 3) and keras.backend.standardize_dtype(x.dtype) == "float32"
        if fused and layer.compute_dtype == "float32" and layer.variable_dtype == "float32":
            return _fused(layer, x)
    return usual(x, training=False, **given)


def _fused(layer: Any, x: Any) -> Any:
    import tensorflow as tf

    mean, var = layer.moving_mean.value, layer.moving_variance.value
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.ones_like(mean) if layer.gamma is None else layer.gamma.value,
        offset=tf.zeros_like(mean) if layer.beta is None else layer.beta.value,
        mean=mean,
        variance=var,
        epsilon=layer.epsilon,
        is_training=False,
    ).y


def as_numpy(x: Any) -> np.ndarray:
    """A tensor as numpy, without a copy where its memory is the computer's own."""
    try:
        return np.asarray(memoryview(x))
    except (TypeError, ValueError, BufferError):  # other devices, dtypes and frameworks
        return np.asarray(ops.convert_to_numpy(x))
