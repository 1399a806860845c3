"""Running models in another way than Keras does, to the same result.

Keras keeps the outputs of all layers until a functional model returns, which for a hundred layers is many times what
the forward pass needs. TimeDistributed runs its layer once for each time step; as one batch of all steps, BN in it has
one set of statistics that all steps see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
from keras import ops, tree

from bntools.backends.keras.calls import functional
from bntools.backends.keras.naming import inside, named
from bntools.backends.keras.segments import Walking, compute, run, segments_of
from bntools.backends.keras.state import attributes_set

RUN = "_run_through_graph"


@contextmanager
def freeing(model: Any, walk: Walking) -> Iterator[None]:
    """Functional models, this one and those inside it, drop each value after its last use, and run compiled."""
    graphs = [functional(one) for one in (model, *named(model).values())]
    graphs = list({id(graph): graph for graph in graphs if hasattr(graph, RUN)}.values())
    with attributes_set([(graph, RUN, _runner(graph, walk)) for graph in graphs]):
        yield


@contextmanager
def steps_together(model: Any) -> Iterator[None]:
    """TimeDistributed layers take the steps of a sequence as samples, which in inference is the same."""
    wrappers = [layer for layer in named(model).values() if type(layer).call is keras.layers.TimeDistributed.call]
    with attributes_set([(wrapper, "call", partial(_as_one_batch, wrapper.layer)) for wrapper in wrappers]):
        yield


@contextmanager
def steps_once(model: Any) -> Iterator[None]:
    """Recurrent layers with BN in their cell call it once for each step.

    In a loop Keras calls it for the first step once more, to see what comes of it (keras/src/backend, ``rnn``): the
    moments would count that step twice.
    """
    loops = [layer for layer in named(model).values() if isinstance(layer, keras.layers.RNN)]
    norm = keras.layers.BatchNormalization
    held = [layer for layer in loops if any(isinstance(one, norm) for one in inside(layer))]
    with attributes_set([(layer, "unroll", True) for layer in held]):
        yield


def _as_one_batch(layer: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
    samples, steps = inputs.shape[:2]

    def joined(x: Any) -> Any:
        return ops.reshape(x, (samples * steps, *x.shape[2:]))

    given = {"mask": joined(mask)} if mask is not None and layer._call_has_mask_arg else {}
    given |= {"training": training} if layer._call_has_training_arg else {}
    outputs = layer.call(joined(inputs), **given)
    return tree.map_structure(lambda y: ops.reshape(y, (samples, steps, *y.shape[1:])), outputs)


def _runner(graph: Any, walk: Walking) -> Callable[..., Any]:
    """What stands for ``Function._run_through_graph`` (keras/src/ops/function.py) while values are computed."""
    segments = segments_of(graph, set(walk.meets))
    lookup = getattr(graph, "_get_operation_for_node", None)
    usual = getattr(graph, RUN)

    def run_through(inputs: Any, operation_fn: Callable[[Any], Any] = lambda op: op, call_fn: Any = None) -> Any:
        if call_fn is not None or lookup is None:
            return usual(inputs, operation_fn, call_fn)
        values = dict(zip(map(id, graph.inputs), tree.flatten(inputs), strict=True))
        del inputs
        for segment in segments:
            if not run(segment, values, operation_fn, walk):
                compute(segment, values, operation_fn)
            for key in segment.dead:
                values.pop(key, None)
        return tree.pack_sequence_as(graph.output, [values[id(tensor)] for tensor in graph.outputs])

    return run_through
