"""The neutral graph of a functional or Sequential Keras model, with the shapes of one real run."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import keras
from keras import tree

from bntools.backends.keras.functions import ORDERED, function_kind, function_parts, pieces
from bntools.backends.keras.linear import WEIGHTS, linear_parts
from bntools.backends.keras.meaning import Called, Part
from bntools.backends.keras.naming import inside, named, norms
from bntools.backends.keras.operators import MERGES, layer_parts
from bntools.backends.keras.rebuilding import check_rebuildable
from bntools.backends.keras.structure import graph_of, label, stock
from bntools.backends.keras.watching import Event, Watch
from bntools.errors import BntoolsError
from bntools.graph import Graph, Identity, Linear, Node, Norm, Other, Reshape

NORM = "BatchNormalization"


def graph(model: keras.Model, example: Any) -> Graph:
    """The graph of one run of a model in inference mode on ``example``, a batch; models inside it are inlined.

    Raises BntoolsError for a model that is written in Python and so has no graph of layers, one that does not run on
    the example, and one with a layer that cannot be made anew from its configuration.
    """
    if graph_of(model) is None:
        raise BntoolsError(
            f"the model {model.name!r} ({type(model).__name__}) is written in Python code and has no graph of layers "
            f'to fold in: its fold is done on the ONNX graph, bntools.export(model, "model.onnx", example)'
        )
    check_rebuildable(model)
    watch = Watch()
    watch.run(model, example)
    return _Description(model, watch).graph()


class _Description:
    """The neutral graph in the making."""

    def __init__(self, model: keras.Model, watch: Watch):
        self.watch = watch
        self.layers = named(model)
        self.paths = {id(layer): path for path, layer in self.layers.items()}
        self.norms = {id(layer): path for path, layer in norms(model).items()}
        self.slots, self.owners = _slots(self.layers)
        self.fixed: dict[str, str] = {}

    def graph(self) -> Graph:
        nodes = tuple(node for event in self.watch.events for node in self._nodes(event))
        outputs = dict.fromkeys(self.watch.outputs, "an output of the model")
        dtypes = frozenset(dtype for dtype in self.watch.dtypes.values() if "float" in dtype)
        return Graph(nodes, self.watch.shapes, outputs, frozenset(), dtypes, self.fixed)

    def _nodes(self, event: Event) -> Iterator[Node]:
        """The neutral nodes that one call is, one after the other; a split is one for each output."""
        if event.operation is None:
            yield self._conversion(event)
            return
        name = label(event.operation, self.paths.get(id(event.operation), event.operation.name))
        event = yield from self._cast(event, name)
        if self._is_plain(event):
            called = self._called(event, name)
            if called.kind == "Split":
                shapes = [self.watch.shapes[output] for output in event.outputs]
                for op, output in zip(pieces(called, shapes), event.outputs, strict=True):
                    yield Node(op, name, event.inputs, (output,))
                return
            if (parts := self._parts(called)) is not None and len(event.outputs) == 1:
                yield from self._chained(event, called, parts)
                return
        self._refuse_inside(event.operation, name)
        yield Node(Other(), name, event.inputs, event.outputs, self._reads(event.operation))

    def _cast(self, event: Event, name: str) -> Generator[Node, None, Event]:
        """The call, after the casts of its inputs to the type in which it computes.

        A scale that moves across a cast can leave the range of the smaller type.
        """
        wanted = getattr(event.operation, "compute_dtype", None)
        if wanted is None:  # an operation of keras.ops
            return event
        inputs = []
        for value in event.inputs:
            dtype = self.watch.dtypes.get(value, "")
            if "float" in dtype and "float" in wanted and dtype != wanted and value in self.watch.shapes:
                made = self.watch.fresh(shape=self.watch.shapes[value])
                self.watch.dtypes[made] = wanted
                yield Node(Other(), f"the cast from {dtype} to {wanted} in front of {name}", (value,), (made,))
                value = made
            inputs.append(value)
        return replace(event, inputs=tuple(inputs))

    def _is_plain(self, event: Event) -> bool:
        """Whether floating-point arrays go in and come out, of known shapes."""
        values = (*event.inputs[:1], *event.outputs)
        shaped = all(value in self.watch.shapes for value in (*event.inputs, *event.outputs))
        return bool(event.inputs) and shaped and all("float" in self.watch.dtypes.get(value, "") for value in values)

    def _called(self, event: Event, name: str) -> Called:
        operation, node = event.operation, event.node
        is_layer = isinstance(operation, keras.layers.Layer)
        kind = stock(operation) if is_layer else function_kind(operation)
        arguments = {} if is_layer else _arguments(operation, node)
        dtypes = {self.watch.dtypes[value] for value in (event.inputs[0], event.outputs[0])}
        kind = kind if is_layer or len(dtypes) == 1 else ""  # a cast
        several = MERGES if is_layer else ORDERED
        if (len(event.inputs) > 1 and kind not in (*several, NORM)) or arguments is None:
            kind, arguments = "", {}
        source, result = self.watch.shapes[event.inputs[0]], self.watch.shapes[event.outputs[0]]
        path = self.paths.get(id(operation), operation.name)
        symbolic = tuple(node.input_tensors[0].shape)
        locked = self._locked(operation) if is_layer else ""
        return Called(operation, kind, path, name, source, result, symbolic, locked, arguments)

    def _parts(self, called: Called) -> list[Part] | None:
        if not isinstance(called.layer, keras.layers.Layer):
            return function_parts(called)
        if called.kind == NORM:
            return [Part(Norm(called.path, called.layer.axis % len(called.source)), called.result)]
        if called.kind == "TimeDistributed":
            return self._distributed(called)
        return linear_parts(called) or layer_parts(called)

    def _distributed(self, called: Called) -> list[Part] | None:
        """A linear layer that is applied to every step: the same one, with its axes one further."""
        inner, lead = called.layer.layer, called.source[:2]
        at_a_step = replace(
            called,
            layer=inner,
            kind=stock(inner),
            path=self.paths[id(inner)],
            source=(lead[0], *called.source[2:]),
            result=(lead[0], *called.result[2:]),
            symbolic=(called.symbolic[0], *called.symbolic[2:]),
            locked=self._locked(inner),
        )
        return [
            Part(_one_further(part.op), (*lead, *part.shape[1:]), part.label) for part in linear_parts(at_a_step) or []
        ] or None

    def _chained(self, event: Event, called: Called, parts: list[Part]) -> Iterator[Node]:
        inputs = event.inputs[:1] if called.kind == NORM else event.inputs
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            output = event.outputs[0] if last else self.watch.fresh(shape=part.shape)
            if isinstance(part.op, Linear):
                reads = frozenset(slot for slot in (part.op.weight, part.op.bias) if slot)
            else:
                reads = self._reads(called.layer) if isinstance(part.op, Norm) else frozenset()
            yield Node(part.op, part.label or called.label, inputs, (output,), reads)
            inputs = (output,)

    def _conversion(self, event: Event) -> Node:
        """What a nested model does to an input of another dtype or rank than it was built for."""
        (before,), (after,) = event.inputs, event.outputs
        shapes = [self.watch.shapes.get(value) for value in (before, after)]
        floating = all("float" in self.watch.dtypes.get(value, "") for value in (before, after))
        known = floating and None not in shapes
        op = (Identity() if shapes[0] == shapes[1] else Reshape()) if known else Other()
        return Node(op, "the input of a nested model", event.inputs, event.outputs)

    def _refuse_inside(self, operation: Any, name: str) -> None:
        """BN layers that an opaque layer calls, or is, have to stay."""
        if id(operation) in self.norms:
            reason = f"its class {type(operation).__name__} has code of its own, or its input is not an array of floats"
            self.fixed[self.norms[id(operation)]] = reason
        for layer in inside(operation) if isinstance(operation, keras.layers.Layer) else ():
            if id(layer) in self.norms:
                self.fixed[self.norms[id(layer)]] = f"it is inside {name}, whose own code calls it"

    def _reads(self, operation: Any) -> frozenset[str]:
        if not isinstance(operation, keras.layers.Layer):
            return frozenset()
        return frozenset(self.slots[id(variable)] for variable in operation.variables if id(variable) in self.slots)

    def _locked(self, layer: Any) -> str:
        """Why the weights of a layer cannot be rewritten; empty if they can."""
        if getattr(layer, "lora_enabled", False):
            return "its kernel has LoRA adapters: merge them first"
        if getattr(layer, "quantization_mode", None):
            return f"its kernel is quantized ({layer.quantization_mode})"
        for name in WEIGHTS:
            others = self.owners.get(id(getattr(layer, name, None)), [])
            if others and (shared := [path for path in others if path != self.paths.get(id(layer))]):
                return f"its {name} is also a weight of {shared[0]!r}"
        return ""


def _slots(layers: dict[str, Any]) -> tuple[dict[int, str], dict[int, list[str]]]:
    """The slot of every variable by its id, and the layers that have it as a weight of their own."""
    slots: dict[int, str] = {}
    owners: dict[int, list[str]] = {}
    for path, layer in layers.items():
        for name in WEIGHTS if stock(layer) and layer.built else ():
            variable = getattr(layer, name, None)
            if isinstance(variable, keras.Variable):
                slots.setdefault(id(variable), f"{path}.{name}")
                owners.setdefault(id(variable), []).append(path)
    for path, layer in layers.items():
        for i, variable in enumerate(layer.variables):
            slots.setdefault(id(variable), f"{path}[{i}]")
    return slots, owners


def _arguments(operation: Any, node: Any) -> dict[str, Any] | None:
    """What an operation of keras.ops is given besides tensors of the graph; None where it is given a mixture."""
    given = inspect.signature(operation.call).bind(*node.arguments.args, **node.arguments.kwargs).arguments
    kept: dict[str, Any] = {}
    for name, value in given.items():
        kinds = {isinstance(part, keras.KerasTensor) for part in tree.flatten(value)}
        if len(kinds) > 1:
            return None
        if kinds != {True}:
            kept[name] = value
    return kept


def _one_further(op: Any) -> Any:
    return replace(op, x_axis=op.x_axis + 1, y_axis=op.y_axis + 1) if isinstance(op, Linear) else op
