"""Statistics of a live Keras model, exchanged often: what is needed for it is looked up once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from bntools.backends.keras.found import RENORM, check_fits, derived
from bntools.backends.keras.naming import norms


class Live:
    """The statistics of some layers of a model.

    The counter of updates is the optimizer's, of training steps, and goes on whatever the statistics are.
    """

    def __init__(self, model: keras.Model, names: Iterable[str]):
        found = norms(model)
        self.layers = {name: found[name] for name in names}
        self._variables = {name: _variables(layer) for name, layer in self.layers.items()}
        self._resources = _resources(self._variables)

    def made(self, statistics: Mapping[str, tuple[Any, Any, int | None]]) -> dict[str, list[Any]]:
        """Statistics in the form in which the variables hold them. Raises BntoolsError where they do not fit."""
        result = {}
        for name, layer in self.layers.items():
            mean, var = (np.asarray(values, np.float64) for values in statistics[name][:2])
            check_fits(name, layer.moving_mean, mean, "mean")
            check_fits(name, layer.moving_variance, var, "variance")
            further = derived(layer, mean, var) if layer.renorm else {}
            pairs = zip((mean, var, *(further[key] for key in RENORM if further)), self._variables[name], strict=True)
            result[name] = [ops.convert_to_tensor(values, dtype=variable.dtype) for values, variable in pairs]
        return result

    def taken(self) -> dict[str, list[Any]]:
        """Copies of all of them."""
        if not self._resources:
            return {name: [ops.copy(one.value) for one in own] for name, own in self._variables.items()}
        import tensorflow as tf

        with tf.init_scope():  # what is read shares memory with the variable until that gets another value
            return {
                name: [tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype) for handle, dtype in own]
                for name, own in self._resources.items()
            }

    def put(self, values: Mapping[str, list[Any]]) -> None:
        """Store what ``made`` or ``taken`` gave for these layers."""
        if not self._resources:
            for name, own in values.items():
                for variable, value in zip(self._variables[name], own, strict=True):
                    variable.assign(value)
            return
        import tensorflow as tf

        with tf.init_scope():
            for name, own in values.items():
                for (handle, _), value in zip(self._resources[name], own, strict=True):
                    tf.raw_ops.AssignVariableOp(resource=handle, value=value)


def _variables(layer: Any) -> list[Any]:
    further = [getattr(layer, key) for key in RENORM] if layer.renorm else []
    return [layer.moving_mean, layer.moving_variance, *further]


def _resources(variables: Mapping[str, list[Any]]) -> dict[str, list[tuple[Any, Any]]]:
    """TensorFlow's handles of plain variables, by which it assigns much faster; none where one is of another kind."""
    if keras.backend.backend() != "tensorflow":
        return {}
    from tensorflow.python.ops.resource_variable_ops import ResourceVariable

    found = {name: [variable._value for variable in own] for name, own in variables.items()}
    if not all(type(value) is ResourceVariable for own in found.values() for value in own):
        return {}
    return {name: [(value.handle, value.dtype) for value in own] for name, own in found.items()}


live = Live
