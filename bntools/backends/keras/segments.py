"""The graph of a functional model in segments that begin at BN layers, compiled once they have run often enough.

Run eagerly, Keras spends as long on its bookkeeping around a layer as small batches spend in it. On TensorFlow, what
lies between two BN layers is one ``tf.function``; tracing it pays from some ten batches of one shape on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import keras
from keras import tree

from bntools.backends.keras import slopes
from bntools.backends.keras.calls import functional, nodes_of
from bntools.backends.keras.naming import inside, named

TRACE_AFTER = 2  # batches of one shape
SHAPES = 8  # of which a segment is kept compiled
DEPTH = 4  # of containers in a layer's attributes that are looked into
STOCK = ("keras.", "bntools.")

Values = dict[int, Any]


class Walking(Protocol):
    """What a segment has to know of the measurement that it is part of."""

    meets: dict[int, Callable[[Any], None]]  # by the id of a BN layer: what to do with its input before it normalizes
    compiles: bool

    def tracing(self) -> AbstractContextManager[None]:
        """A context in which BN layers do not stop."""


@dataclass(frozen=True)
class Traced:
    """The segments of one graph, by the layers to stop at, and the attributes of its layers at that time."""

    attributes: list[Any]
    segments: dict[frozenset[int], list[Segment]] = field(default_factory=dict)


_traced: WeakKeyDictionary[Any, Traced] = WeakKeyDictionary()


@dataclass(eq=False)
class Segment:
    """Nodes that run one after the other; only the first may be a BN layer that is measured.

    ``reads`` and ``gives`` are the values that cross its borders, ``dead`` those that nobody needs after it, by the
    ``id`` of the symbolic tensor. ``stock`` tells whether all of it is Keras's own code, which may be traced.
    """

    nodes: list[Any]
    stock: bool
    reads: list[int] = field(default_factory=list)
    gives: list[int] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    seen: dict[Any, int] = field(default_factory=dict)
    functions: dict[Any, Any] = field(default_factory=dict)

    @property
    def first(self) -> Any:
        """The operation with which it begins."""
        return self.nodes[0].operation


def segments_of(graph: Any, measured: set[int]) -> list[Segment]:
    """The segments of a functional model; ``measured`` are the BN layers to stop at, by ``id``.

    They are kept, with what was traced, for the verbs that come: ``forget_changed`` drops what has changed.
    """
    known, key = _traced.setdefault(graph, Traced([])).segments, frozenset(measured)
    if key not in known:
        known[key] = _cut(graph, measured)
    return known[key]


def takes_any_batch(model: Any) -> bool:
    """Whether what a model gives for a sample cannot depend on what else is in its batch, nor on how many there are.

    True of functional models of Keras's own layers without states, where no input fixes its batch size.
    """
    nodes = nodes_of(model)
    if nodes is None or any(tensor.shape[0] is not None for tensor in functional(model).inputs):
        return False
    stateful = any(getattr(layer, "stateful", False) for layer in named(model).values())
    return not stateful and all(_is_stock(node.operation, set(), False) for node in nodes if node.operation)


def forget_changed(model: Any) -> None:
    """Drop what was traced of a model if its layers have other attributes by now; variables are read as it runs.

    Every verb calls it before it sets attributes of its own.
    """
    for one in (model, *named(model).values()):
        if (graph := functional(one)) is not None and nodes_of(one):
            now = _attributes(graph)
            if graph not in _traced or not _same(_traced[graph].attributes, now):
                _traced[graph] = Traced(now)


def run(segment: Segment, values: Values, call: Callable[[Any], Any], walk: Walking) -> bool:
    """Stop at the segment's BN layer and compute what it gives from compiled code; False where neither was done.

    ``call(operation)`` is how Keras wants an operation called here.
    """
    if not segment.stock or not walk.compiles or keras.backend.backend() != "tensorflow" or not _infers(call):
        return False
    given = [values[key] for key in segment.reads]
    if not all(map(_is_plain, given)):
        return False
    key = tuple((tuple(x.shape), x.dtype) for x in given)
    if key not in segment.functions:
        if len(segment.functions) >= SHAPES:
            return False
        segment.seen[key] = segment.seen.get(key, 0) + 1
        if segment.seen[key] <= TRACE_AFTER:
            return False
        with walk.tracing():
            segment.functions[key] = _function(segment, given, call)
    function = segment.functions[key]
    if function is None:
        return False
    if meet := walk.meets.get(id(segment.first)):
        meet(values[id(segment.nodes[0].input_tensors[0])])
    values.update(zip(segment.gives, function(*given), strict=True))
    return True


def compute(segment: Segment, values: Values, call: Callable[[Any], Any]) -> None:
    """Run the nodes of a segment one after the other, dropping each value after its last use in it."""
    kept = {*segment.gives, *segment.reads} - set(segment.dead)
    last = {id(tensor): i for i, node in enumerate(segment.nodes) for tensor in node.input_tensors}
    for i, node in enumerate(segment.nodes):
        args, kwargs = node.arguments.fill_in(values)
        for tensor in node.input_tensors:
            if last[id(tensor)] == i and id(tensor) not in kept:
                values.pop(id(tensor), None)
        outputs = tree.flatten(call(node.operation)(*args, **kwargs))
        del args, kwargs
        values.update({id(tensor): value for tensor, value in zip(node.outputs, outputs, strict=True)})
        del outputs


def _function(segment: Segment, given: list[Any], call: Callable[[Any], Any]) -> Any:
    """The segment as a concrete function; None where it cannot be traced, or gives what a function should not give."""
    import tensorflow as tf

    plain = True

    def body(*arrays: Any) -> list[Any]:
        nonlocal plain
        values = dict(zip(segment.reads, arrays, strict=True))
        compute(segment, values, call)
        outputs = [values[key] for key in segment.gives]
        plain = all(map(_is_plain, outputs))
        return outputs

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in given]
    try:
        function = tf.function(body, autograph=False).get_concrete_function(*specs)
    except Exception:  # code that needs values, which run eagerly it has
        return None
    return function if plain and not slopes.lost_in(function.graph) else None


def _is_plain(x: Any) -> bool:
    """Whether a value is a dense tensor without a mask, which is an attribute of it and would stay outside."""
    import tensorflow as tf

    return isinstance(x, tf.Tensor) and getattr(x, "_keras_mask", None) is None


def _infers(call: Callable[[Any], Any]) -> bool:
    """Whether Keras calls the operations of this graph with ``training=False`` and nothing else of its own.

    A model written in Python may call a functional one with ``training=True``: what was traced is of no use then.
    """
    told = inspect.getclosurevars(call).nonlocals
    return told.get("training", True) is False and not told.get("kwargs")


def _cut(graph: Any, measured: set[int]) -> list[Segment]:
    nodes = [node for node in nodes_of(graph) or [] if node.operation]
    segments: list[Segment] = []
    for node in nodes:
        begins = id(node.operation) in measured
        # A mask that is handed over as an argument is read by a BN layer beside its input: that runs eagerly.
        stock = _is_stock(node.operation, measured, begins) and not (begins and len(node.input_tensors) > 1)
        if not segments or begins or not stock or not segments[-1].stock:
            segments.append(Segment([], stock))
        segments[-1].nodes.append(node)
    needed = {id(tensor) for tensor in graph.outputs}
    for segment in reversed(segments):
        made = [id(tensor) for node in segment.nodes for tensor in node.outputs]
        read = dict.fromkeys(id(tensor) for node in segment.nodes for tensor in node.input_tensors)
        segment.reads = [key for key in read if key not in made]
        segment.gives = [key for key in made if key in needed]
        segment.dead = [key for key in segment.reads if key not in needed]
        needed |= set(segment.reads)
    return segments


def _is_stock(operation: Any, measured: set[int], begins: bool) -> bool:
    """Whether an operation may be traced: Keras's own code throughout, and no layer inside at which to stop."""
    held = inside(operation) if isinstance(operation, keras.layers.Layer) else []
    own = all(type(one).__module__.startswith(STOCK) and _calls_stock(one) for one in [operation, *held])
    lambdas = any(isinstance(one, keras.layers.Lambda) for one in [operation, *held])
    return own and not lambdas and (begins or not any(id(one) in measured for one in held))


def _calls_stock(operation: Any) -> bool:
    """Whether the functions that an operation was given, its activation for one, are Keras's own as well."""
    given = [value for value in vars(operation).values() if isinstance(value, (FunctionType, MethodType, partial))]
    return all(str(getattr(value, "__module__", "")).startswith(STOCK) for value in given)


def _attributes(graph: Any) -> list[Any]:
    """What the layers of a graph are and hold, those inside of them as well; objects as they are, containers copied."""
    operations = [node.operation for node in nodes_of(graph) or [] if node.operation]
    held = [one for operation in operations if isinstance(operation, keras.layers.Layer) for one in inside(operation)]
    return [_content(part) for one in (*operations, *held) for part in (type(one), vars(one))]


def _content(value: Any, depth: int = DEPTH) -> Any:
    if depth and isinstance(value, dict):
        return [(_content(key, 0), _content(each, depth - 1)) for key, each in value.items()]
    if depth and isinstance(value, (list, tuple, set)):
        return [_content(each, depth - 1) for each in value]
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two contents are of the same objects, plain values compared by what they are."""
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    plain = (bool, int, float, str)
    return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)
