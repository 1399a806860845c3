"""SavedModel folders in which Keras 2 saved a model (``model.save(folder)``): read by Keras 3, and rewritten.

The config comes from ``keras_metadata.pb``, the weights from the checkpoint under ``variables/`` by the path of
objects that leads to each. Written back, the folder is a copy in which the checkpoint has new values under the
same keys: its serving functions, optimizer and assets stay. This file alone needs TensorFlow.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

# The only reader of configs from before Keras 3; keras.models.load_model takes them from .h5 files alone.
from keras.src.legacy.saving import json_utils, saving_options, saving_utils
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from bntools.backends.keras import contents, hdf5
from bntools.backends.keras.files import explained, quiet, said
from bntools.backends.keras.found import remember, remembered
from bntools.backends.keras.naming import inside, named
from bntools.backends.keras.trust import admitted
from bntools.errors import BntoolsError

METADATA = "keras_metadata.pb"
NOTE = Path("assets.extra", "bntools.json")  # a folder that TensorFlow leaves to users
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "VARIABLE_VALUE"
ITERATIONS = ("optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE", "optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE")


@dataclass(frozen=True)
class Saved:
    """An object of Keras in a SavedModel: the path that leads to it (``layer-1.cell``) and its metadata."""

    path: tuple[str, ...]
    metadata: dict[str, Any]


def load(path: str, allow: Sequence[str]) -> tuple[keras.Model, list[str]]:
    """The model that a SavedModel carries, not compiled, and the checkpoint keys of ``model.weights``.

    Raises BntoolsError for a SavedModel without a Keras model, or with one that Keras 3 cannot rebuild.
    """
    metadata = Path(path, METADATA)
    if not metadata.is_file():
        raise BntoolsError(
            f"{path}: a SavedModel without a Keras model: it holds only functions to serve (model.export or "
            f"tf.saved_model.save wrote it). Save the Keras model itself, model.save('model.keras')"
        )
    objects = list(_objects(path, metadata.read_bytes()))
    root = next((one for one in objects if not one.path), None)
    config = hdf5.modernized({key: root.metadata.get(key) for key in ("class_name", "config")}) if root else {}
    custom = admitted(path, (config,), allow)
    if not config.get("config") or not ("layers" in config["config"] or config["class_name"] in custom):
        raise BntoolsError(
            f"{path}: a SavedModel whose Keras model is written in Python, without a config to rebuild it from: "
            f"save its weights where its class is, model.save_weights('model.weights.h5'), and pass arch= (--arch)"
        )
    with quiet(), explained(path, "2"):
        model = _rebuilt(config, custom)
    keys = _keys(path, model, objects)
    reader = _checkpoint(path)
    for variable, key in zip(model.weights, keys, strict=True):
        variable.assign(reader.get_tensor(key))
    remember(model, _updates(path, model, reader))
    return model, keys


def save(model: keras.Model, path: str, temporary: Path, source: str, keys: Sequence[str]) -> None:
    """Copy the folder a model came from to ``temporary``, with the model's weights in its checkpoint.

    Raises BntoolsError where the model has other weights by now, or the folder is not what it was.
    """
    reader = _checkpoint(source)
    shapes = reader.get_variable_to_shape_map()
    fits = len(model.weights) == len(keys) and all(
        key in shapes and tuple(variable.shape) == tuple(shapes[key])
        for variable, key in zip(model.weights, keys, strict=False)
    )
    if not fits:
        raise BntoolsError(
            f"{path}: a SavedModel is written back only with the same weights, and the model has others by now (was it "
            f"folded?): save it as .keras"
        )
    shutil.copytree(source, temporary, dirs_exist_ok=True)
    # A hash of the checkpoint that was; nothing but statistics of use reads it.
    temporary.joinpath("fingerprint.pb").unlink(missing_ok=True)
    new = {key: ops.convert_to_numpy(variable) for variable, key in zip(model.weights, keys, strict=True)}
    _write_checkpoint(temporary / "variables", reader, new)
    note = temporary / NOTE
    note.unlink(missing_ok=True)
    if text := contents.comment(remembered(model)):
        note.parent.mkdir(exist_ok=True)
        note.write_bytes(text)


def _rebuilt(config: dict[str, Any], custom: dict[str, Any]) -> keras.Model:
    with saving_options.keras_option_scope(use_legacy_config=True), keras.saving.CustomObjectScope(custom):
        model = saving_utils.model_from_config(config, custom_objects=custom)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError("the config alone does not say the shapes of its inputs")
    return model


def _objects(path: str, data: bytes) -> Iterator[Saved]:
    """The entries of ``keras_metadata.pb`` (saved_metadata.proto of Keras 2: nodes = 1, their path = 3, JSON = 5)."""
    try:
        for _, node in _fields(data, 1):
            fields = dict(_fields(node, 3, 5))
            place = fields.get(3, b"").decode().split(".")
            metadata = json_utils.decode(fields.get(5, b"{}").decode())
            if place[0] == "root" and isinstance(metadata, dict):
                yield Saved(tuple(place[1:]), metadata)
    except (ValueError, IndexError, RecursionError) as error:
        raise BntoolsError(f"{path}: its {METADATA} is damaged ({error})") from error


def _fields(data: bytes, *wanted: int) -> Iterator[tuple[int, bytes]]:
    """The fields of these numbers that hold bytes, in a protobuf message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == 0:
            _, place = _varint(data, place)
            continue
        size, place = (8, place) if tag & 7 == 1 else (4, place) if tag & 7 == 5 else _varint(data, place)
        if place + size > len(data):
            raise ValueError("it ends in the middle of an entry")
        if tag & 7 == 2 and tag >> 3 in wanted:
            yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _checkpoint(path: str) -> Any:
    try:
        return tf.train.load_checkpoint(str(Path(path, "variables", "variables")))
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise BntoolsError(f"{path}: its checkpoint variables/ is missing or damaged: {said(error)}") from error


def _keys(path: str, model: keras.Model, objects: Sequence[Saved]) -> list[str]:
    """The checkpoint key of every weight of the model, in the order of ``model.weights``."""
    graph = TrackableObjectGraph()
    try:
        graph.ParseFromString(_checkpoint(path).get_tensor(GRAPH))
    except Exception as error:  # of the reader or of protobuf: the bytes are not ours
        raise BntoolsError(f"{path}: its checkpoint does not say which weight is whose: {said(error)}") from error
    names = {one.path: str(one.metadata.get("name")) for one in objects}
    layers = {"": model, **named(model)}
    places = {_dotted(one.path, names): one.path for one in objects}
    found: dict[int, str] = {}
    for name, layer in layers.items():
        node = _walked(graph, places[name]) if name in places else None
        for variable in _own(layer):
            if node is not None and (key := _key(graph, node, variable.name)):
                found[id(variable)] = key
    if missing := [variable.path for variable in model.weights if id(variable) not in found]:
        raise BntoolsError(
            f"{path}: Keras 3 builds its model with weights that its checkpoint has not under the same names "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): load it with Keras 2 (tf_keras) and "
            f"save it as .h5"
        )
    return [found[id(variable)] for variable in model.weights]


def _dotted(place: tuple[str, ...], names: Mapping[tuple[str, ...], str]) -> str:
    """The name of an object by bntools's rule: the names of the layers on the way, joined by dots."""
    ends = [place[:length] for length in range(1, len(place) + 1)]
    return ".".join(names[end] for end in ends if end in names)


def _walked(graph: Any, place: tuple[str, ...]) -> Any:
    node = graph.nodes[0]
    for part in place:
        children = {child.local_name: child.node_id for child in node.children}
        if part not in children:
            return None
        node = graph.nodes[children[part]]
    return node


def _key(graph: Any, node: Any, name: str) -> str | None:
    for child in node.children:
        if child.local_name == name:
            attributes = graph.nodes[child.node_id].attributes
            return next((one.checkpoint_key for one in attributes if one.name == VALUE), None)
    return None


def _own(layer: Any) -> list[Any]:
    inner = {id(variable) for child in inside(layer) for variable in child.weights}
    return [variable for variable in layer.weights if id(variable) not in inner]


def _updates(path: str, model: keras.Model, reader: Any) -> dict[str, int]:
    """What bntools noted, and the optimizer's steps for what trains: the model itself is not compiled."""
    note = Path(path, NOTE)
    noted = contents.notes(note.read_bytes()) if note.is_file() else {}
    counter = next((key for key in ITERATIONS if reader.has_tensor(key)), None)
    if counter is None:
        return noted
    steps = int(reader.get_tensor(counter))
    return {name: steps for name, layer in named(model).items() if layer.trainable} | noted


def _write_checkpoint(folder: Path, reader: Any, new: Mapping[str, np.ndarray]) -> None:
    """Write the checkpoint anew, all of its keys, with new values for some."""
    tensors = {}
    for key, dtype in sorted(reader.get_variable_to_dtype_map().items()):
        tensors[key] = tf.constant(new.get(key, reader.get_tensor(key)), dtype=dtype)
    shutil.rmtree(folder)
    folder.mkdir()
    with tf.device("/CPU:0"):
        part = str(folder / "part")
        tf.raw_ops.SaveV2(
            prefix=part, tensor_names=list(tensors), shape_and_slices=[""] * len(tensors), tensors=[*tensors.values()]
        )
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[part], destination_prefix=str(folder / "variables"), delete_old_dirs=False
        )
