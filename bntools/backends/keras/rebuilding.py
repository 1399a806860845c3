"""A functional or Sequential model made anew: the same layers, some left out and some with another configuration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import keras
from keras import tree

from bntools.backends.keras.calls import nodes_of
from bntools.backends.keras.naming import inside
from bntools.backends.keras.structure import functional_class, graph_of, inlined, label
from bntools.batches import said
from bntools.errors import BntoolsError

Config = Mapping[str, Any]


class Rebuilding:
    """A model in the making. ``made`` maps each layer of the old model, by its id, to the pair of old and new.

    ``gone`` are the ids of layers to leave out, ``edits`` what to change in the configuration of others. Weights are
    fresh ones.
    """

    def __init__(self, gone: Collection[int], edits: Mapping[int, Config]):
        self.made: dict[int, tuple[Any, Any]] = {}
        self._gone, self._edits = gone, edits

    def of(self, operation: Any) -> Any:
        """What stands for an operation, a layer or a model; the same one for each of its calls."""
        if id(operation) not in self.made:
            graph = graph_of(operation)
            if graph is None:
                new = copied(operation, self._edits)
            elif isinstance(operation, keras.Sequential):
                new = self._sequential(operation)
            else:
                new = self._functional(operation)
            self.made[id(operation)] = (operation, new)
        return self.made[id(operation)][1]

    def _sequential(self, model: Any) -> Any:
        layers = [layer for layer in model._layers if id(layer) not in self._gone]
        new = [self.of(layer) for layer in layers]
        if len(layers) == 1:  # a Sequential of nothing has no graph
            new.append(keras.layers.Identity(name=model.layers[-1].name))
        plain = _takes(type(model), ["layers", "name"])
        return (type(model) if plain else keras.Sequential)(new, name=model.name)

    def _functional(self, model: Any) -> Any:
        table = {id(symbol): self.of(symbol._keras_history.operation).output for symbol in model.inputs}
        for node in nodes_of(model) or []:
            if not all(id(symbol) in table for symbol in node.input_tensors):
                continue
            args, kwargs = node.arguments.fill_in(table)
            if id(node.operation) in self._gone:
                result = args[0] if args else kwargs["inputs"]
            else:
                result = self.of(node.operation)(*args, **kwargs)
            table.update({id(old): new for old, new in zip(node.outputs, tree.flatten(result), strict=False)})
        inputs, outputs = (
            tree.map_structure(lambda symbol: table[id(symbol)], struct) for struct in (model.input, model.output)
        )
        plain = type(model) is not functional_class(model) and _takes(type(model), ["inputs", "outputs", "name"])
        return (type(model) if plain else keras.Model)(inputs, outputs, name=model.name)


def copied(operation: Any, edits: Mapping[int, Config] | None = None) -> Any:
    """A layer or operation made anew from its configuration, with ``edits`` by the id of the layer.

    Raises BntoolsError where its class does not describe itself.
    """
    edits = edits or {}
    if isinstance(operation, keras.layers.Lambda):
        return _lambda(operation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a lambda is unsafe to load, which nothing does here
            config = operation.get_config()
        config.update(edits.get(id(operation), {}))
        inner = getattr(operation, "layer", None)
        if isinstance(inner, keras.layers.Layer) and id(inner) in edits:
            config["layer"]["config"].update(edits[id(inner)])
        for name in ("activation", "recurrent_activation"):
            if name in config and callable(getattr(operation, name, None)):
                config[name] = getattr(operation, name)  # also one that is not registered
        with keras.saving.custom_object_scope(_classes(operation)):
            new = type(operation).from_config(config)
    except Exception as error:
        raise BntoolsError(
            f"{label(operation, operation.name)} cannot be made anew from its configuration ({said(error)}), and "
            f"folding gives a new model: give its class a get_config and a from_config that describe it"
        ) from error
    # What Keras's automatic configuration leaves out where a constructor calls its keywords other than **kwargs.
    new.name = operation.name
    if getattr(operation, "dtype_policy", None) != getattr(new, "dtype_policy", None):
        new.dtype_policy = operation.dtype_policy
    return new


def check_rebuildable(model: Any) -> None:
    """Raises BntoolsError where a layer with code of its own cannot be made anew, before anything is planned."""
    seen: set[int] = set()
    for graph in inlined(model):
        for node in nodes_of(graph) or []:
            operation = node.operation
            own = not type(operation).__module__.startswith("keras.")
            if own and graph_of(operation) is None and id(operation) not in seen:
                seen.add(id(operation))
                copied(operation)


def _takes(cls: Any, arguments: list[str]) -> bool:
    """Whether a class can be made with these arguments, as Keras's own model classes are."""
    given = inspect.signature(cls.__init__).parameters
    required = [
        name
        for name, one in list(given.items())[1:]
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if cls.__init__ in (keras.Model.__init__, keras.Sequential.__init__):
        return True
    open_ended = any(one.kind is one.VAR_KEYWORD for one in given.values())
    return set(required) <= set(arguments) and (open_ended or set(arguments) <= given.keys())


def _lambda(layer: Any) -> Any:
    """A Lambda with the same function: Keras reads no code from a configuration."""
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
    )


def _classes(operation: Any) -> dict[str, Any]:
    """The classes and functions outside of Keras that the configuration of a layer may name."""
    found: dict[str, Any] = {}
    parts = [operation]
    if isinstance(operation, keras.layers.Layer):
        parts += inside(operation)
    for part in parts:
        for value in (part, *vars(part).values()):
            named = value if inspect.isfunction(value) or inspect.isclass(value) else type(value)
            if str(getattr(named, "__module__", "builtins")).split(".")[0] not in ("builtins", "keras", "tensorflow"):
                found[named.__name__] = named
    return found
