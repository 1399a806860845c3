"""The calls that are written into the graph of a functional model."""

from __future__ import annotations

from typing import Any

import keras

from bntools.backends.keras.naming import inside


def functional(model: Any) -> Any:
    """The functional model by which a Sequential computes, which Keras keeps to itself; any other model as it is."""
    return getattr(model, "_functional", None) or model


def symbolic_inputs(model: Any) -> list[Any]:
    """The symbolic inputs of a functional or Sequential model; none of any other, which may call what it likes so."""
    graph = functional(model)
    return list(graph.inputs) if hasattr(graph, "_nodes_by_depth") else []


def nodes_of(model: Any) -> list[Any] | None:
    """The nodes of a functional or Sequential model in execution order; None for any other."""
    depths = getattr(functional(model), "_nodes_by_depth", None)
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


def _collect(layer: Any, told: bool, found: set[int]) -> None:
    if isinstance(layer, keras.layers.BatchNormalization):
        found |= {id(layer)} if told else set()
        return
    nodes = nodes_of(layer)
    if nodes is None:
        for child in inside(layer, recursive=False):
            _collect(child, told, found)
        return
    for node in nodes:
        if isinstance(node.operation, keras.layers.Layer):
            _collect(node.operation, told or node.arguments.kwargs.get("training") is False, found)
