"""The graph of layers inside a model: which models have one, and which layers do what Keras says they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from bntools.backends.keras.calls import nodes_of

# What a subclass may have of its own and still compute what its parent computes.
HARMLESS = {"__init__", "get_config", "from_config", "__module__", "__doc__", "__qualname__", "__annotations__"}
HARMLESS |= {"__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"}


def graph_of(operation: Any) -> Any | None:
    """The functional graph by which a model computes; None for a layer and for a model with a ``call`` of its own."""
    if not isinstance(operation, keras.Model) or nodes_of(operation) is None or "call" in vars(operation):
        return None
    inner = getattr(operation, "_functional", None)
    base = keras.Sequential if isinstance(operation, keras.Sequential) else functional_class(operation)
    if type(operation).call is not base.call or type(operation).__call__ is not keras.Model.__call__:
        return None
    return operation if inner is None else inner


def functional_class(model: Any) -> Any:
    """Keras's own class of functional models, which has no public name."""
    return next(cls for cls in type(model).__mro__ if cls.__name__ == "Functional" and cls.__module__[:6] == "keras.")


def inlined(model: Any) -> Iterator[Any]:
    """The functional graphs of a model and of the models that it calls as layers, each once, outer before inner."""
    seen: set[int] = set()
    waiting = [graph_of(model)]
    while waiting:
        graph = waiting.pop(0)
        if graph is None or id(graph) in seen:
            continue
        seen.add(id(graph))
        yield graph
        waiting += [graph_of(node.operation) for node in nodes_of(graph) or []]


def stock(operation: Any) -> str:
    """The class of keras.layers whose computation a layer has, by name; "" for a layer with code of its own.

    A subclass that only has another constructor or configuration counts as its parent.
    """
    own = vars(operation)
    if "call" in own or "__call__" in own:
        return ""
    for cls in type(operation).__mro__:
        if cls is getattr(keras.layers, cls.__name__, None):
            return str(cls.__name__)
        if not vars(cls).keys() <= HARMLESS and not cls.__module__.startswith("bntools."):
            return ""
    return ""


def label(operation: Any, path: str) -> str:
    """How messages call a layer or an operation: ``Conv2D 'backbone.conv1'``."""
    return f"{type(operation).__name__} {path!r}"
