"""What Keras and TensorFlow keep per thread, and a model per forward pass: set aside while a replica waits."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.backend.common import global_state

from bntools.backends.keras.naming import named

_entering = threading.Lock()
_eager: list[bool] = []  # what the setting was, then one entry for each measurement that is under way
_TF_CONTEXT = ("is_eager", "scope_name", "device_name", "device_spec")  # of its EagerContextThreadLocalData

State = dict[str, Any]


class Attributes:
    """The thread's settings, and the plain attributes of the model's own layers.

    Keras keeps the stacks of name scopes, autocast and the call under way in one object per thread, TensorFlow
    its name scope and device in another. Models store values on themselves in ``call`` and read them back a few
    layers on; Keras's own layers do not.
    """

    def __init__(self, model: Any):
        own = [model, *named(model).values()]
        self._watched = [layer for layer in own if not type(layer).__module__.startswith("keras.")]
        self._thread = vars(global_state.GLOBAL_STATE_TRACKER)
        self._context = _tf_context()
        self.open = True
        self._start = self._taken()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Everything as it was at the start, for as long as a replica waits."""
        mine = self._taken()
        self._put(self._start)
        try:
            yield
        finally:
            self._put(mine)

    def restore(self) -> None:
        """Put everything back as it was at the start."""
        self._put(self._start)

    def close(self) -> None:
        """Put everything back for good: a replica that is cleared away later changes nothing any more."""
        self.restore()
        self.open = False

    def fresh(self) -> None:
        """Give the next replica its own copies of the lists and dicts that it may fill."""
        for owner in self._owners():
            owner.update({key: copy.copy(value) for key, value in owner.items() if type(value) in (list, dict, set)})

    def _owners(self) -> list[dict[str, Any]]:
        return [self._thread, *(vars(layer) for layer in self._watched)]

    def _taken(self) -> tuple[list[State], State]:
        context = {} if self._context is None else {key: getattr(self._context, key) for key in _TF_CONTEXT}
        return [dict(owner) for owner in self._owners()], context

    def _put(self, state: tuple[list[State], State]) -> None:
        if not self.open:
            return
        attributes, context = state
        for owner, wanted in zip(self._owners(), attributes, strict=True):
            owner.update(wanted)
            for key in owner.keys() - wanted.keys():
                del owner[key]
        for key, value in context.items():
            setattr(self._context, key, value)


def _tf_context() -> Any:
    if keras.backend.backend() != "tensorflow":
        return None
    from tensorflow.python.eager import context

    return context.context()._thread_local_data


@contextmanager
def eagerly() -> Iterator[None]:
    """Functions compiled by ``tf.function`` run as the Python they were made from; no gradients are recorded."""
    backend = keras.backend.backend()
    if backend == "torch":
        with sys.modules["torch"].no_grad():  # which Keras has imported; this back end does not
            yield
        return
    if backend != "tensorflow":
        yield
        return
    import tensorflow as tf

    with _entering:  # the setting is the process's, and threads may measure beside each other
        if not _eager:
            _eager.append(tf.config.functions_run_eagerly())
            tf.config.run_functions_eagerly(True)
        _eager.append(True)
    try:
        yield
    finally:
        with _entering:
            _eager.pop()
            if len(_eager) == 1:
                tf.config.run_functions_eagerly(_eager.pop())


@contextmanager
def variables_kept(model: Any, measured: set[int]) -> Iterator[None]:
    """Put back what a model counts or draws in variables while it runs; ``measured`` are those left out, by ``id``."""
    states = [getattr(layer, "states", None) for layer in named(model).values() if getattr(layer, "stateful", False)]
    every = [*model.non_trainable_variables, *keras.tree.flatten(states)]
    others = [v for v in every if isinstance(v, keras.Variable) and id(v) not in measured]
    before = [(variable, keras.ops.copy(variable.value)) for variable in others]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


@contextmanager
def losses_kept(model: Any) -> Iterator[None]:
    """Put back what layers have to add to the loss: ``fit`` would add what replicas leave there to its own."""
    layers = [model, *named(model).values()]
    before = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in layers]
    try:
        yield
    finally:
        for layer, losses, ids in before:
            layer._losses[:] = losses
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)


@contextmanager
def attributes_set(values: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Instance attributes for a while, written past Keras's own ``__setattr__``; afterwards as they were."""
    absent = object()
    before = [(vars(owner), name, vars(owner).get(name, absent)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            vars(owner)[name] = value
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is absent:
                attributes.pop(name, None)
            else:
                attributes[name] = value
