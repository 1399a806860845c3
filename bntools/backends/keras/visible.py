"""BN that an exporter of TensorFlow writes as one operator, and under the name of its layer.

Keras computes BN in inference with a product and a sum, in which nobody finds the statistics again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from bntools.backends.keras.found import array
from bntools.backends.keras.frozen import FrozenBatchNormalization
from bntools.backends.keras.naming import norms
from bntools.backends.keras.state import attributes_set

OPERATOR = "FusedBatchNormV3"
FORMATS = {True: ("NHWC", "NDHWC"), False: ("NCHW", "NCDHW")}  # by whether the channels are last, for 4 and 5 axes
STOCK = (keras.layers.BatchNormalization.call, FrozenBatchNormalization.call)


@contextmanager
def visible(model: Any) -> Iterator[None]:
    """While it lasts, every BN layer of the model is one operator in what is traced.

    Subclasses with a call of their own are left alone.
    """
    from tf2onnx.optimizer import back_to_back_optimizer

    found = norms(model)
    stops = [
        (found[name], "call", partial(_fused, found[name], label, constants(found[name]), found[name].call))
        for label, name in labels(model).items()
        if operable(found[name])
    ]
    rules: dict[Any, Callable[..., Any]] = back_to_back_optimizer._func_map
    fusion = {key: rule for key, rule in rules.items() if key == ("Conv", "BatchNormalization")}
    for key in fusion:  # tf2onnx would fold on its own account, and only some of it
        del rules[key]
    try:
        with attributes_set(stops):
            yield
    finally:
        rules.update(fusion)


def labels(model: Any) -> dict[str, str]:
    """The names of a model's BN layers by what an exported graph calls them."""
    found: dict[str, str] = {}
    for name in norms(model):
        label = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
        label = label if label[0].isalnum() else f"bn{label}"
        while label in found:
            label += "_"
        found[label] = name
    return found


def operable(layer: Any) -> bool:
    """Whether a layer computes BN alone: a subclass with a call of its own may do more."""
    return type(layer).call in STOCK


def _fused(
    layer: Any,
    label: str,
    values: dict[str, np.ndarray],
    usual: Callable[..., Any],
    inputs: Any,
    training: Any = None,
    mask: Any = None,
) -> Any:
    """The layer in inference, as one operator over four or five axes, where it computes in float32."""
    import tensorflow as tf

    rank = len(inputs.shape)
    last = layer.axis % rank == rank - 1
    wide = keras.backend.result_type(inputs.dtype, "float32") != "float32"
    if wide or not 2 <= rank <= 5 or not (last or layer.axis == 1):
        return usual(inputs, training=False)
    x = ops.cast(inputs, "float32")
    place = -2 if last else -1
    for _ in range(4 - rank):
        x = ops.expand_dims(x, place)
    with tf.name_scope(f"{label}/"):  # a name that ends so is taken as it is, wherever the layer lies
        y = tf.raw_ops.FusedBatchNormV3(
            x=x,
            **{name: tf.constant(value, name=name) for name, value in values.items()},
            epsilon=layer.epsilon,
            data_format=FORMATS[last][len(x.shape) - 4],
            is_training=False,
            name=OPERATOR,
        ).y
    for _ in range(4 - rank):
        y = ops.squeeze(y, place)
    return ops.cast(y, layer.compute_dtype)


def constants(layer: Any) -> dict[str, np.ndarray]:
    """What a layer normalizes with, float32 of shape (channels,): mean, variance, scale and offset."""
    mean, var, scale, shift = map(array, (layer.moving_mean, layer.moving_variance, layer.gamma, layer.beta))
    assert mean is not None
    values = {
        "mean": mean,
        "variance": var,
        "scale": np.ones_like(mean) if scale is None else scale,
        "offset": np.zeros_like(mean) if shift is None else shift,
    }
    return {name: np.asarray(value, np.float32) for name, value in values.items()}
