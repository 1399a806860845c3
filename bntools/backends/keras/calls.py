"""The calls that are written into the graph of a functional model."""

from __future__ import annotations

from typing import Any

import keras


def nodes_of(model: Any) -> list[Any] | None:
    """The nodes of a functional or Sequential model in execution order; None for any other."""
    graph = getattr(model, "_functional", None) or model
    depths = getattr(graph, "_nodes_by_depth", None)
    if depths is None:
        return None
    return [node for depth in sorted(depths, reverse=True) for node in depths[depth] if not node.is_input]


def called_for_inference(model: Any) -> set[int]:
    """The BN layers, by ``id``, that a graph calls with ``training=False``, themselves or a model around them.

    ``backbone(x, training=False)`` is the usual advice for fine-tuning. In a functional model it does not hold:
    ``fit`` passes its own ``training=True`` on to every operation (keras/src/models/functional.py, operation_fn).
    """
    found: set[int] = set()
    _collect(model, False, found)
    return found


def _collect(layer: Any, inside: bool, found: set[int]) -> None:
    if isinstance(layer, keras.layers.BatchNormalization):
        found |= {id(layer)} if inside else set()
        return
    nodes = nodes_of(layer)
    if nodes is None:
        for child in layer._flatten_layers(include_self=False, recursive=False):
            _collect(child, inside, found)
        return
    for node in nodes:
        if isinstance(node.operation, keras.layers.Layer):
            _collect(node.operation, inside or node.arguments.kwargs.get("training") is False, found)
