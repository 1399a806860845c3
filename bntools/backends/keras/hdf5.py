"""Keras's HDF5 files of old: configs of Keras 2 in terms of Keras 3, and new weights in a copy of a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import ops

from bntools.backends.keras.contents import dataset
from bntools.errors import BntoolsError

INNER = {"layer", "backward_layer", "cell"}  # the keys of layers that are part of another one
PLACES = {"Sequential": "keras", "Functional": "keras.src.models.functional", "Model": "keras.src.models.functional"}
TOP = "top_level_model_weights"


def modernized(config: Any) -> Any:
    """The config of a model as Keras 2 wrote it in terms that Keras 3 takes; one of Keras 3 as it is.

    The axis of BN was a list, layers inside a wrapper came without a module, and a Sequential
    inside another model counted its own graph as its first call.
    """
    if isinstance(config, list):
        return [modernized(each) for each in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "__tuple__":
        return modernized(config.get("items"))
    new = {key: modernized(value) for key, value in config.items()}
    for key in INNER & new.keys():
        new[key] = _placed(new[key])
    if new.get("time_major") is False:  # of recurrent layers; Keras 3 has no other order
        del new["time_major"]
    axis, layers = new.get("axis"), new.get("layers")
    if "moving_mean_initializer" in new and isinstance(axis, list) and len(axis) == 1:
        new["axis"] = axis[0]
    if isinstance(layers, list) and "output_layers" in new and _has_nodes_of_keras_2(layers):
        nested = {layer["name"] for layer in layers if layer.get("class_name") == "Sequential"}
        for layer in layers:
            layer["inbound_nodes"] = _recounted(layer["inbound_nodes"], nested)
        new["output_layers"] = _recounted(new["output_layers"], nested)
        for key in ("input_layers", "output_layers"):  # a list of one, and Keras 3 would ask for a list to be called
            new[key] = new[key][0] if isinstance(new.get(key), list) and len(new[key]) == 1 else new.get(key)
    return new


def _placed(inner: Any) -> Any:
    """The config of a layer inside a wrapper with the module that Keras 3 looks it up in."""
    if not isinstance(inner, dict) or "class_name" not in inner or "module" in inner:
        return inner
    kind = inner["class_name"]
    module = PLACES.get(kind) or ("keras.layers" if hasattr(keras.layers, kind) else None)
    return {**inner, "module": module, "registered_name": None} if module else inner


def _has_nodes_of_keras_2(layers: list[Any]) -> bool:
    """Keras 2 wrote each call as a list of [layer, call, output, arguments]; Keras 3 writes an object."""
    nodes = [node for layer in layers if isinstance(layer, dict) for node in layer.get("inbound_nodes", ())]
    return bool(nodes) and all(isinstance(node, list) for node in nodes)


def _recounted(value: Any, nested: set[str]) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int):
        return [value[0], value[1] - (value[0] in nested), *value[2:]]
    return [_recounted(each, nested) for each in value]


def steps(path: str) -> int | None:
    """How many steps the optimizer made whose state a whole-model file holds; None where it holds none."""
    with h5py.File(path, "r") as file:
        if "optimizer_weights" not in file:
            return None
        group = file["optimizer_weights"]
        first = next(iter(names(group, "weight_names")), "")
        if first.rpartition("/")[2].partition(":")[0] not in ("iter", "iteration", "iterations"):
            return None
        return int(dataset(group, first)[()])


def restore_optimizer(path: str, model: keras.Model) -> None:
    """Give the optimizer of a loaded model the state that its file holds.

    Keras builds it for the variables of the outermost model alone (legacy_h5_format.py), so that it gets none.
    """
    optimizer = getattr(model, "optimizer", None)
    with h5py.File(path, "r") as file:
        if optimizer is None or "optimizer_weights" not in file:
            return
        group = file["optimizer_weights"]
        stored = [dataset(group, name)[()] for name in names(group, "weight_names")]
    if len(stored) <= len(optimizer.variables):
        return  # one that had made no step
    optimizer.built = False
    optimizer.build(model.trainable_variables)
    variables = optimizer.variables
    if [tuple(one.shape) for one in variables] == [np.shape(one) for one in stored]:
        for variable, value in zip(variables, stored, strict=True):
            variable.assign(value)


def rewrite(source: str, model: keras.Model, target: Path) -> None:
    """Copy a file and put the model's weights in place of its own; all else in it stays (optimizer, other groups).

    Raises BntoolsError where the file is not that of the model any more.
    """
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        group = file.get("model_weights", file)
        for stored, variable in _pairs(source, group, model):
            value = ops.convert_to_numpy(variable)
            if stored.shape != value.shape:
                raise _misfit(source)
            stored[...] = np.asarray(value)


def names(group: Any, attribute: str) -> list[str]:
    """The names in an attribute, which Keras cuts into several where it is too long for one."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    found = [name for part in parts for name in group.attrs[part]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in found]


def _pairs(path: str, group: Any, model: keras.Model) -> Iterator[tuple[h5py.Dataset, Any]]:
    """What Keras loads into which variable: layers in order, trainable weights first (legacy_h5_format.py)."""
    layers = [layer for layer in model.layers if layer.weights]
    groups = [group[name] for name in names(group, "layer_names") if names(group[name], "weight_names")]
    if len(layers) != len(groups):
        raise _misfit(path)
    own = [layer.trainable_weights + layer.non_trainable_weights for layer in layers]
    if TOP in group and names(group[TOP], "weight_names"):
        inner = {id(weight) for layer in layers for weight in layer.weights}
        own.append([weight for weight in model.weights if id(weight) not in inner])
        groups.append(group[TOP])
    for place, variables in zip(groups, own, strict=True):
        stored = names(place, "weight_names")
        if len(stored) != len(variables):
            raise _misfit(path)
        yield from ((dataset(place, name), variable) for name, variable in zip(stored, variables, strict=True))


def _misfit(path: str) -> BntoolsError:
    return BntoolsError(f"{path}: its weights are not those of the model any more: save the model as .keras")
