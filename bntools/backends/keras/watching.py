"""One run of a functional model: every operation that its graph calls, with the shapes of what it reads and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import tree

from bntools.backends.keras.calls import nodes_of
from bntools.backends.keras.running import call
from bntools.backends.keras.structure import graph_of, inlined
from bntools.batches import said
from bntools.errors import BntoolsError

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Event:
    """An operation that ran: the node of the graph that called it, and the numbers of its tensors.

    ``operation`` is None where a nested model made its input into another dtype or rank.
    """

    operation: Any
    node: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Watch:
    """What a run showed: the events in execution order, and shape and dtype of every value by its number."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.shapes: dict[int, Shape] = {}
        self.dtypes: dict[int, str] = {}
        self.outputs: list[int] = []
        self._count = 0
        self._expected: dict[int, list[int]] = {}
        self._given: list[int] = []

    def fresh(self, value: Any = None, shape: Shape | None = None) -> int:
        """The number of a new value, with the shape and dtype of a tensor or with this shape."""
        number = self._count
        self._count += 1
        found = tuple(getattr(value, "shape", ())) if shape is None else shape
        if (value is not None or shape is not None) and all(isinstance(size, int) for size in found):
            self.shapes[number] = found
        if hasattr(value, "dtype"):
            self.dtypes[number] = keras.backend.standardize_dtype(value.dtype)
        return number

    def run(self, model: Any, example: Any) -> None:
        """Run the model on a batch. Raises BntoolsError where it refuses the batch."""
        graphs = list(inlined(model))
        top = graphs[0]
        self._expected[id(top)] = [self.fresh() for _ in top.inputs]
        try:
            for graph in graphs:
                vars(graph)["_run_through_graph"] = partial(self._through, graph)
            call(model, example)
        except BntoolsError:
            raise
        except Exception as error:
            raise BntoolsError(
                f"the model {model.name!r} does not run on the example ({said(error)}): give one batch as the model "
                f"takes it"
            ) from error
        finally:
            for graph in graphs:
                vars(graph).pop("_run_through_graph", None)
        self.outputs = self._given

    def _through(self, graph: Any, inputs: Any, operation_fn: Callable[[Any], Any], call_fn: Any = None) -> Any:
        """What Keras does in ``Function._run_through_graph``, with a record of it."""
        numbers = self._expected.pop(id(graph), None)
        if numbers is None or call_fn is not None:  # called by a layer's own code, not by a graph
            return type(graph)._run_through_graph(graph, inputs, operation_fn, call_fn)
        flat = tree.flatten(inputs)
        numbers = [self._converted(number, value) for number, value in zip(numbers, flat, strict=True)]
        frame = {id(symbol): number for symbol, number in zip(graph.inputs, numbers, strict=True)}
        values = {id(symbol): value for symbol, value in zip(graph.inputs, flat, strict=True)}
        for node in nodes_of(graph) or []:
            if all(id(symbol) in values for symbol in node.input_tensors):
                self._node(node, frame, values, operation_fn)
        self._given = [frame[id(symbol)] for symbol in graph.outputs]
        return tree.pack_sequence_as(graph.output, [values[id(symbol)] for symbol in graph.outputs])

    def _node(
        self, node: Any, frame: dict[int, int], values: dict[int, Any], operation_fn: Callable[[Any], Any]
    ) -> None:
        inner = graph_of(node.operation)
        given = None if inner is None else handed(inner, node.arguments.args, node.arguments.kwargs)
        if given is not None:
            self._expected[id(inner)] = [frame[id(symbol)] for symbol in given]
        args, kwargs = node.arguments.fill_in(values)
        result = tree.flatten(operation_fn(node.operation)(*args, **kwargs))
        values.update({id(symbol): value for symbol, value in zip(node.outputs, result, strict=False)})
        if given is not None:
            numbers = self._given
        else:
            numbers = [self.fresh(value) for value in result]
            inputs = tuple(frame[id(symbol)] for symbol in node.input_tensors)
            self.events.append(Event(node.operation, node, inputs, tuple(numbers)))
        frame.update({id(symbol): number for symbol, number in zip(node.outputs, numbers, strict=False)})

    def _converted(self, number: int, value: Any) -> int:
        """The number of what a nested model makes of what it is given; a model's own input gets its shape here."""
        known = number in self.shapes or number in self.dtypes
        shape = tuple(getattr(value, "shape", ()))
        new = self.fresh(value)
        if known and (self.shapes.get(number), self.dtypes.get(number)) != (shape, self.dtypes.get(new)):
            self.events.append(Event(None, None, (number,), (new,)))
            return new
        if not known:
            self.shapes.update({number: self.shapes[new]} if new in self.shapes else {})
            self.dtypes.update({number: self.dtypes[new]} if new in self.dtypes else {})
        return number


def handed(graph: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The tensors that a call of a nested model hands to its inputs, in their order; None where that cannot be told."""
    given = args[0] if args else kwargs.get("inputs")
    if isinstance(given, dict) and not isinstance(graph.input, dict):
        given = [given.get(one.name) for one in graph.inputs]
    flat = tree.flatten(given)
    plain = len(flat) == len(graph.inputs) and all(isinstance(one, keras.KerasTensor) for one in flat)
    return flat if plain else None
