"""What the layers of a Keras model are called, and which of them are BN."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import keras


def named(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Every layer inside a model by name, outer before inner, in definition order; a shared one under its first name.

    A name is the path of layer names from the model down, joined by dots: ``backbone.conv1_bn`` is the
    layer ``conv1_bn`` of the nested model ``backbone``. Where a path is taken already, " (2)" and so on follows.
    """
    found: dict[str, keras.layers.Layer] = {}
    seen: set[int] = {id(model)}
    for path, layer in _inside(model, "", seen):
        name, number = path, 1
        while name in found:
            number += 1
            name = f"{path} ({number})"
        found[name] = layer
    return found


def parts(model: keras.Model) -> set[Hashable]:
    """What only one thread may work on at a time: the model and the layers inside it, whose calls are switched."""
    return {id(model), *map(id, named(model).values())}


def norms(model: keras.Model) -> dict[str, keras.layers.BatchNormalization]:
    """Every BN layer of a model by name."""
    return {name: layer for name, layer in named(model).items() if isinstance(layer, keras.layers.BatchNormalization)}


def inside(layer: keras.layers.Layer, recursive: bool = True) -> list[keras.layers.Layer]:
    """The layers that a layer or model holds, which Keras has no public way to list; those inside of them as well."""
    return list(layer._flatten_layers(include_self=False, recursive=recursive))


def _inside(layer: keras.layers.Layer, prefix: str, seen: set[int]) -> Iterator[tuple[str, keras.layers.Layer]]:
    for child in inside(layer, recursive=False):
        if id(child) in seen:
            continue
        seen.add(id(child))
        path = f"{prefix}{child.name}"
        yield path, child
        yield from _inside(child, f"{path}.", seen)
