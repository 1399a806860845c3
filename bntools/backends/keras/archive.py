"""BN layers of a model file of Keras, read without Keras.

``inspect`` needs no model: the config says which layers there are and the HDF5 inside holds their variables. Where a
file has a class whose layout is not known here, or anything is in doubt, there is no such short cut (None).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from bntools.backends.keras import contents
from bntools.backends.keras.contents import Contents
from bntools.backends.keras.facts import Facts, initial, record
from bntools.layer import BatchNorm

NORM = "BatchNormalization"
MODELS = ("Functional", "Model", "Sequential")
RECURRENT = ("RNN", "Bidirectional", "StackedRNNCells")  # keep what is inside under names of their own
STATISTICS = ("moving_mean", "moving_variance")


@dataclass(frozen=True)
class Archive:
    """A model file of which only the BN layers are known."""

    path: str
    records: tuple[BatchNorm, ...]


@dataclass(frozen=True)
class Place:
    """A BN layer in a config: its name, its config, where a ``.keras`` archive and where ``.h5`` keeps it."""

    name: str
    config: dict[str, Any]
    group: str
    layer: str
    told: bool


class _Unknown(Exception):
    """The file has something whose layout only Keras knows."""


def peek(path: str) -> Archive | None:
    """The BN layers in a ``.keras`` or whole-model ``.h5`` file; None where only Keras can tell.

    Raises BntoolsError where the file is damaged or no model of Keras.
    """
    held = contents.read(path)
    if held.config is None:
        return None
    try:
        places = list(_places(held.config, "", "", "", False))
        if not places or len({place.name for place in places}) != len(places):
            return None
        if held.form == "archive":
            with contents.weights(path) as file:
                found = _from_archive(held, places, file)
        else:
            with contents.hdf5(path) as file:
                found = _from_hdf5(held, places, file)
    except (_Unknown, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError):
        return None  # in short: not as Keras writes it, so let Keras say what it makes of it
    return Archive(path, tuple(found))


def _places(entry: dict[str, Any], prefix: str, group: str, top: str, told: bool) -> Iterator[Place]:
    """The BN layers of a model's config in the order of bntools's names: definition order, outer before inner.

    ``top`` is the layer of the outermost model that holds them, under which ``.h5`` keeps all that is inside.
    """
    seen: dict[str, int] = {}
    config = entry["config"]
    for layer in config["layers"]:
        kind, inner = layer["class_name"], layer["config"]
        if str(layer.get("module")).startswith(("keras.ops", "keras.src.ops")):  # an operation, which is no layer
            continue
        snake = _snake(kind)
        number = seen[snake] = seen.get(snake, -1) + 1
        where = f"{group}layers/{snake}{f'_{number}' if number else ''}"
        name = inner["name"]
        yield from _inside(layer, f"{prefix}{name}", where, top or name, told or _called_for_inference(layer))


def _inside(layer: dict[str, Any], name: str, group: str, top: str, told: bool) -> Iterator[Place]:
    kind, config = layer["class_name"], layer["config"]
    if not _holds_norm(layer) and _is_known(layer):
        return
    if not _is_known(layer) or "shared_object_id" in layer:
        raise _Unknown
    if kind == NORM:
        yield Place(name, config, group, top, told)
    elif kind in MODELS:
        yield from _places(layer, f"{name}.", f"{group}/", top, told)
    elif isinstance(config.get("layer"), dict) and kind not in RECURRENT:
        inner = config["layer"]
        yield from _inside(inner, f"{name}.{inner['config']['name']}", f"{group}/layer", top, told)
    else:
        raise _Unknown


def _is_known(layer: dict[str, Any]) -> bool:
    """Whether a layer is Keras's own. Legacy files give no module; there the weights must come out even."""
    kind = layer["class_name"]
    own = str(layer.get("module", "keras")).partition(".")[0] == "keras"
    return own and layer.get("registered_name") in (None, kind) and ">" not in kind


def _holds_norm(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_norm, value))
    if not isinstance(value, dict):
        return False
    return value.get("class_name") == NORM or any(map(_holds_norm, value.values()))


def _called_for_inference(layer: dict[str, Any]) -> bool:
    """Whether a call in the graph has ``training=False``."""

    def told(node: Any) -> bool:
        if isinstance(node, list):  # of Keras 2: [layer, call, output, arguments], one or several
            return any(map(told, node))
        return isinstance(node, dict) and node.get("kwargs", node).get("training") is False

    return any(map(told, layer.get("inbound_nodes", ())))


def _from_archive(held: Contents, places: list[Place], file: h5py.File) -> list[BatchNorm]:
    steps = _steps(held, file, "optimizer/vars", "0")
    found = []
    for place in places:
        group = file[f"{place.group}/vars"]
        names = _variables(place.config)
        if group.attrs.get("name", place.config["name"]) != place.config["name"] or len(group) < len(names):
            raise _Unknown
        stored = {name: contents.dataset(group, str(index)) for index, name in enumerate(names)}
        found.append(_record(held, place, stored, steps))
    return found


def _from_hdf5(held: Contents, places: list[Place], file: h5py.File) -> list[BatchNorm]:
    weights = file["model_weights"]
    paths = {layer: _listed(weights[layer]) for layer in {place.layer for place in places}}
    if sum(_ends(path, STATISTICS[0]) for layer in weights for path in _listed(weights[layer])) != len(places):
        raise _Unknown  # a layer of someone else's has BN inside
    counter = next(iter(_listed(file["optimizer_weights"])), "") if "optimizer_weights" in file else ""
    counts = re.fullmatch(r"(.*/)?iter(ation|ations)?(:0)?", counter)
    steps = _steps(held, file, "optimizer_weights", counter if counts else "")
    found = []
    for place in places:
        stored = {}
        for name in _variables(place.config):
            (path,) = _only(paths[place.layer], f"{place.config['name']}/{name}")
            stored[name] = contents.dataset(weights[place.layer], path)
        found.append(_record(held, place, stored, steps))
    return found


def _steps(held: Contents, file: h5py.File, group: str, name: str) -> int | None:
    """How many steps the stored optimizer made; None for a model that was saved without one."""
    training = held.training or {}
    optimizer = training.get("optimizer") or training.get("optimizer_config")
    if not optimizer:
        return None
    if isinstance(optimizer, dict) and optimizer.get("class_name") == "LossScaleOptimizer":
        raise _Unknown  # its own counter comes first
    if group not in file and held.form == "archive":
        return 0
    return int(contents.dataset(file[group], name)[()])


def _record(held: Contents, place: Place, stored: dict[str, h5py.Dataset], steps: int | None) -> BatchNorm:
    config = place.config
    if any("dtype" in one.attrs for one in stored.values()):
        raise _Unknown  # a dtype that HDF5 does not have
    arrays = {name: np.array(one[()], dtype=np.float64) for name, one in stored.items()}
    noted = held.updates.get(place.name)
    axis = config["axis"][0] if isinstance(config["axis"], list) else config["axis"]
    beginnings = [
        usual if one is None else initial(one["class_name"], one["config"], usual)
        for one, usual in zip((config[f"{name}_initializer"] for name in STATISTICS), (0.0, 1.0), strict=True)
    ]
    return record(
        Facts(
            name=place.name,
            kind=NORM,
            axis=int(axis),
            epsilon=config["epsilon"],
            momentum=config["momentum"],
            mean=arrays["moving_mean"],
            var=arrays["moving_variance"],
            scale=arrays.get("gamma"),
            shift=arrays.get("beta"),
            trainable=config.get("trainable", True),
            trains=config.get("trainable", True) and bool(config["scale"] or config["center"]),
            keeps_stats=False,  # a layer of bntools's own that does is no NORM, and leaves the file to Keras
            renorm=bool(config.get("renorm")),
            synchronized=bool(config.get("synchronized")),
            built=True,
            steps=steps if noted is None else noted,
            frozen_steps=noted,
            counted=noted is not None,
            told=place.told,
            initial=(beginnings[0], beginnings[1]),
            dtype=stored["moving_mean"].dtype.name,
        )
    )


def _variables(config: dict[str, Any]) -> list[str]:
    """The variables of a BN layer in Keras's order, without those of renorm, which come last."""
    affine = [name for name, has in (("gamma", config["scale"]), ("beta", config["center"])) if has]
    return [*affine, *STATISTICS]


def _listed(group: h5py.Group) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs["weight_names"]]


def _only(paths: list[str], end: str) -> list[str]:
    found = [path for path in paths if _ends(path, end)]
    if len(found) != 1:
        raise _Unknown
    return found


def _ends(path: str, end: str) -> bool:
    return f"/{path}".removesuffix(":0").endswith(f"/{end}")


def _snake(name: str) -> str:
    """Keras's name for a class in its weight files (keras/src/utils/naming.py)."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
