"""Leaky activations whose slope TensorFlow loses when it compiles.

Where it uses oneDNN, its graph optimizer makes one operator of a convolution with a bias, a sum and a LeakyReLU, with
the operator's default slope whatever the layer's (seen in 2.21). ``predict`` and every ``tf.function`` then give
something else than the model as it is written; a BN layer between convolution and sum keeps it from that, until it is
folded.
"""

from __future__ import annotations

from typing import Any

import keras

from bntools.backends.keras.calls import nodes_of
from bntools.backends.keras.naming import named

DEFAULT = 0.2  # of TensorFlow's LeakyRelu
LOST = "when compiled, as predict does: TensorFlow takes the slope 0.2 for a LeakyReLU behind a convolution and a sum"
ROUNDING = 1e-6  # of a slope in float32


def lost_in(graph: Any) -> bool:
    """Whether a graph that TensorFlow has traced has a slope other than the default."""
    slopes = [one.get_attr("alpha") for one in graph.get_operations() if one.type == "LeakyRelu"]
    return any(_other(slope) for slope in slopes)


def may_lose(model: Any) -> bool:
    """Whether a model has a layer or an operation with such a slope, and is compiled by TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        return False
    operations = [node.operation for node in nodes_of(model) or [] if node.operation]
    return any(_leaks(one) for one in (*named(model).values(), *operations))


def _leaks(operation: Any) -> bool:
    slope = getattr(operation, "negative_slope", DEFAULT)
    rectifies = isinstance(operation, keras.layers.ReLU) and not slope  # computed by another operator
    return not rectifies and _other(float(slope))


def _other(slope: float) -> bool:
    return abs(slope - DEFAULT) > ROUNDING
