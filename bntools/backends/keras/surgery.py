"""Taking BN layers out of a Keras model: a new one whose other weights have taken up their scale and shift."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from bntools.affine import absorb_input, absorb_output
from bntools.backends.keras.linear import WEIGHTS
from bntools.backends.keras.naming import inside, named
from bntools.backends.keras.rebuilding import Config, Rebuilding
from bntools.backends.keras.structure import graph_of, label
from bntools.errors import BntoolsError
from bntools.graph import Graph, Linear, Norm
from bntools.legality import Step, Target

STORED = (*WEIGHTS, "gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
Place = tuple[str, str]


def absorb(model: keras.Model, graph: Graph, steps: Sequence[Step]) -> keras.Model:
    """A new model in which these steps are made; the model stays as it is.

    It is of Keras's own making, saves and loads without bntools, and has the old one's name, inputs, outputs, layer
    names, weights and ``trainable`` flags. A model class of the user's own stays where it is made as Keras's are, from
    inputs and outputs; else the new model is a plain ``keras.Model``. Weights are computed in float64 and cast once; a
    bias is added where one is missing. What ``compile`` set up is not taken over.

    Raises BntoolsError where a weight does not fit the dtype in which the model stores it, or a layer cannot be made
    anew.
    """
    layers = named(model)
    weights = _Weights(layers)
    for step in steps:
        for target in step.targets:
            weights.absorb(target)
    gone = {id(layers[step.layer]) for step in steps}
    edited = weights.edits(gone)
    rebuilding = Rebuilding(gone, edited)
    new = rebuilding.of(model)
    pairs = [pair for pair in rebuilding.made.values() if isinstance(pair[0], keras.layers.Layer)]
    found = {id(old): made for old, made in _all_pairs(pairs)}
    for old, made in pairs:
        _copy(old, made, edited)
    _flags(model, new, rebuilding.made)
    weights.store(found)
    return new


class _Weights:
    """The weights that folding changes, in float64 until they are stored."""

    def __init__(self, layers: dict[str, Any]):
        self._layers = layers
        self._changed: dict[Place, np.ndarray] = {}

    def absorb(self, target: Target) -> None:
        """Let one weight take up its scale and shift."""
        op, affine = target.op, target.affine
        if isinstance(op, Linear):
            weight, bias = _placed(op.weight), None if op.bias is None else _placed(op.bias)
            change = absorb_output if target.side == "output" else absorb_input
            stored = self._value(weight)
            assert stored is not None
            old = None if bias is None else self._value(bias)
            new_weight, new_bias = change(stored, old, affine, op.out_axis, op.in_axis, op.groups)
            self._changed[weight] = new_weight
            if bias is not None and (old is not None or new_bias.any()):
                self._changed[bias] = new_bias
        elif isinstance(op, Norm):
            scale, shift = self._value((op.layer, "gamma")), self._value((op.layer, "beta"))
            self._changed[op.layer, "gamma"] = affine.scale * (1.0 if scale is None else scale)
            self._changed[op.layer, "beta"] = affine.scale * (0.0 if shift is None else shift) + affine.shift
        else:
            raise BntoolsError(f"found {type(op).__name__} as the place of a fold, which no Keras layer is")

    def edits(self, gone: set[int]) -> dict[int, Config]:
        """What has to change in the configuration of layers, by id, so that they have all their weights."""
        found: dict[int, dict[str, Any]] = {}
        for path, name in self._changed:
            layer = self._layers[path]
            if id(layer) in gone or getattr(layer, name) is not None:
                continue
            change: dict[str, Any] = {{"gamma": "scale", "beta": "center"}.get(name, "use_bias"): True}
            if isinstance(layer, keras.layers.EinsumDense):
                change = {"bias_axes": layer.equation.strip()[-1]}
            found.setdefault(id(layer), {}).update(change)
        return dict(found)

    def store(self, new: dict[int, Any]) -> None:
        """Cast what has changed to the dtypes of the new model, and write it there."""
        for (path, name), value in self._changed.items():
            old = self._layers[path]
            if id(old) not in new:  # a BN layer that took up another one and went as well
                continue
            variable = getattr(new[id(old)], name)
            dtype = keras.backend.standardize_dtype(variable.dtype)
            wide = "float32" if keras.backend.backend() == "jax" else "float64"  # more, JAX would warn, is not there
            stored = ops.cast(ops.convert_to_tensor(value, dtype=wide), dtype)
            if not np.isfinite(np.asarray(ops.convert_to_numpy(ops.cast(stored, "float32")))).all():
                raise BntoolsError(
                    f"{label(old, path)}: a {name} of {float(np.abs(value).max()):.3g} does not fit {dtype}"
                )
            variable.assign(stored)
            if getattr(old, name) is None:
                kernel = next(v for v in (getattr(old, one, None) for one in reversed(STORED)) if v is not None)
                variable.trainable = bool(old.trainable and kernel.trainable)

    def _value(self, place: Place) -> np.ndarray | None:
        if place in self._changed:
            return self._changed[place]
        path, name = place
        variable = getattr(self._layers[path], name)
        return None if variable is None else np.array(ops.convert_to_numpy(variable)).astype(np.float64)


def _placed(slot: str) -> Place:
    path, _, name = slot.rpartition(".")
    return path, name


def _all_pairs(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Old and new layers, those inside of wrappers as well."""
    found = list(pairs)
    for old, new in pairs:
        if graph_of(old) is None:
            found += zip(inside(old), inside(new), strict=False)
    return found


def _copy(old: Any, new: Any, edited: dict[int, Config]) -> None:
    """Give a new layer all that the old one holds: its variables, and what it keeps beside them."""
    if graph_of(old) is not None:
        return
    parts = [(old, new), *zip(inside(old), inside(new), strict=False)]
    if any(id(part) in edited for part, _ in parts):
        _copy_named(parts, set())
        return
    _copy_beside(parts)
    shapes = [[tuple(v.shape) for v in layer.variables] for layer in (old, new)]
    if shapes[0] != shapes[1]:
        raise BntoolsError(
            f"{label(old, old.name)} has other variables when it is made anew from its configuration "
            f"(found shapes {shapes[1]}, expected {shapes[0]}): its get_config has to describe it fully"
        )
    for variable, stored in zip(new.variables, old.variables, strict=True):
        variable.assign(stored)
    _copy_named(parts, {id(variable) for variable in old.variables})  # a weight borrowed from another layer


def _copy_named(parts: list[tuple[Any, Any]], known: set[int]) -> None:
    """The weights of stock layers by the names of their attributes, but for those that are known already."""
    for one, other in parts:
        for name in STORED:
            variable = getattr(one, name, None)
            if isinstance(variable, keras.Variable) and id(variable) not in known:
                getattr(other, name).assign(variable)


def _copy_beside(parts: list[tuple[Any, Any]]) -> None:
    """Vocabularies, adapted statistics and the like, by the hooks with which Keras saves them."""
    for old, new in parts:
        if hasattr(old, "load_assets"):
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)
        if hasattr(old, "finalize_state"):
            store: dict[str, Any] = {}
            old.save_own_variables(store)
            new.load_own_variables(store)


def _flags(model: Any, new: Any, made: dict[int, tuple[Any, Any]]) -> None:
    """The ``trainable`` flags of models, layers and variables, outer before inner: setting one sets all inside."""
    if hasattr(model, "dtype_policy") and new.dtype_policy != model.dtype_policy:
        new.dtype_policy = model.dtype_policy
    if new.trainable != model.trainable:
        new.trainable = model.trainable
    if graph_of(model) is not None:
        for layer in model.layers:
            if id(layer) in made:
                _flags(layer, made[id(layer)][1], made)
        return
    for old, other in zip(inside(model), inside(new), strict=False):
        if other.trainable != old.trainable:
            other.trainable = old.trainable
    if len(model.variables) == len(new.variables):
        variables = list(zip(model.variables, new.variables, strict=True))
    else:  # one has been added
        names = [name for name in STORED if isinstance(getattr(model, name, None), keras.Variable)]
        variables = [(getattr(model, name), getattr(new, name)) for name in names]
    for old, other in variables:
        if other.trainable != old.trainable:
            other.trainable = old.trainable
