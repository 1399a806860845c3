"""One micro-batch on its way through a Keras model, stopping at every BN layer.

A replica is a greenlet: the model runs eagerly, layer by layer, whether it is functional, Sequential or written in
Python, and where it reaches a BN layer the greenlet hands over the moments of the layer's input and waits. All
replicas share one thread and one model, so what Keras and TensorFlow keep per thread is set aside while one waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np

from bntools import coroutines
from bntools.alone import alone
from bntools.backends.keras.lean import freeing, steps_once, steps_together
from bntools.backends.keras.naming import norms, parts
from bntools.backends.keras.normalizing import masked_moments, masked_values, normalized
from bntools.backends.keras.running import Forward, call, named_outputs
from bntools.backends.keras.state import Attributes, attributes_set, eagerly, losses_kept, variables_kept
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.moments import Arrival
from bntools.runner import Outputs


@contextmanager
def measuring(
    model: Any,
    names: Iterable[str],
    *,
    normalize: str = "stored",
    forward: Forward | None = None,
    per_sample: bool = False,
    memory: float = 0,
    waiting: bool = False,
    outputs: bool = False,
    values: Collection[str] = (),
) -> Iterator[Walk]:
    """Prepare the model for replicas; yields what starts one on a batch.

    The model runs with ``training=False``. The named layers normalize with their ``"stored"`` statistics, with
    those of the ``"batch"``, or train as Keras does (``"update"``). ``memory``, ``waiting`` and
    ``outputs``, that what the model gives is wanted, make no difference. Of the layers in ``values`` the input itself
    is handed over. On the way out, whatever happened, every flag, attribute and other variable is as before.
    """
    found = norms(model)
    targets = {name: found[name] for name in names}
    measured = {id(variable) for layer in targets.values() for variable in layer.variables}
    stack = ExitStack()
    try:
        stack.enter_context(alone(parts(model)))
        stack.enter_context(eagerly())
        stack.enter_context(variables_kept(model, measured))
        stack.enter_context(losses_kept(model))
        walk = Walk(model, forward, per_sample, frozenset(values))
        meets = {name: partial(walk.meet, name, layer.axis) for name, layer in targets.items()}
        walk.meets = {id(layer): meets[name] for name, layer in targets.items()}
        walk.compiles = normalize == "stored"
        stops = [(layer, "call", _stopping(layer, normalize, meets[name])) for name, layer in targets.items()]
        stack.enter_context(attributes_set(stops))
        if normalize != "stored":  # BN trains only where both training and trainable are set
            stack.enter_context(attributes_set([(layer, "_trainable", True) for layer in targets.values()]))
        stack.enter_context(freeing(model, walk))
        stack.enter_context(steps_together(model))
        stack.enter_context(steps_once(model))
        walk.attributes = Attributes(model)
        stack.callback(walk.attributes.close)
        yield walk
    finally:
        with uninterrupted():
            stack.close()


class Replica:
    """One micro-batch on its way through the model."""

    def __init__(self, walk: Walk, batch: Any):
        self._walk = walk
        self._batch = batch
        self._given: Any = None
        self._coroutine = coroutines.made(self._run)

    def advance(self) -> Arrival | None:
        """Run on to the next BN layer; None when the forward pass has come to its end."""
        self._resuming()
        return self._coroutine.switch()

    def close(self) -> None:
        """End the replica where it stands; its context managers and finally blocks run."""
        coroutines.end(self._coroutine, self._resuming)

    def held(self) -> int:
        """Bytes of the tensors that the waiting replica holds, as far as its frames show them."""
        found = {id(value): value for value in coroutines.held(self._coroutine)}
        return sum(map(_bytes, found.values()))

    def outputs(self) -> Outputs:
        """What the model gave, by name; the replica has come to its end."""
        return self._walk.named(self._given)

    def _resuming(self) -> None:
        self._walk.running = self

    def _run(self) -> None:
        self._walk.attributes.fresh()
        try:
            self._given = self._walk.forward(self._batch)
        finally:
            self._walk.attributes.restore()

    def stop(self, arrival: Callable[[], Arrival]) -> None:
        """Wait at a layer (called by the model's forward pass, inside the greenlet)."""
        coroutines.check_current(self._coroutine)
        met = arrival()
        with self._walk.attributes.set_aside():
            self._coroutine.parent.switch(met)


class Walk:
    """What all replicas of one measurement share; called with a batch, it starts one."""

    attributes: Attributes
    running: Replica | None = None
    compiles = True
    held = 0  # bytes that the preparation of the model holds

    def __init__(self, model: Any, forward: Forward | None, per_sample: bool, values: frozenset[str]):
        self._model, self._forward, self._per_sample, self._values = model, forward, per_sample, values
        self.meets: dict[int, Callable[[Any], None]] = {}
        self._tracing = False

    def __call__(self, batch: Any) -> Replica:
        """A replica on this batch, not started yet."""
        return Replica(self, batch)

    def forward(self, batch: Any) -> Any:
        """The forward pass of one replica."""
        return call(self._model, batch, self._forward)

    def named(self, given: Any) -> Outputs:
        """What a forward pass gave, by name."""
        return named_outputs(self._model, given, self._forward)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """A context in which layers are called to be compiled: they stop before what comes of it is run."""
        self._tracing = True
        try:
            yield
        finally:
            self._tracing = False

    def meet(self, name: str, axis: int, x: Any, mask: Any = None) -> None:
        """Measure what a layer is about to normalize, and wait there."""
        if self._tracing:
            return
        assert self.running is not None
        if not keras.ops.is_tensor(x) or not hasattr(x, "shape") or None in tuple(x.shape):
            raise BntoolsError(
                f"layer {name!r} is called inside a compiled function, where nothing can be measured: the loop or map "
                f"around it has to run eagerly"
            )
        self.running.stop(lambda: self._arrival(name, axis, x, mask))

    def _arrival(self, name: str, axis: int, x: Any, mask: Any) -> Arrival:
        values = masked_values(x, mask, axis) if name in self._values else None
        return Arrival(name, *masked_moments(x, mask, axis, self._per_sample), values)


def _stopping(layer: Any, normalize: str, meet: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """The layer's call, which first hands what it is about to normalize to ``meet``."""
    usual = layer.call

    def at_input(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        meet(inputs, mask)
        given = {} if mask is None else {"mask": mask}
        if normalize == "stored":
            return normalized(layer, usual, inputs, given)
        before = [] if normalize == "update" else [(v, keras.ops.copy(v.value)) for v in layer.non_trainable_variables]
        outputs = usual(inputs, training=True, **given)
        for variable, value in before:
            variable.assign(value)
        return outputs

    return at_input


def _bytes(value: Any) -> int:
    """The size of a tensor that holds numbers; 0 for anything else."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    # asked first: whether something is a tensor takes Keras long to deny
    if not hasattr(value, "dtype") or not keras.ops.is_tensor(value) or isinstance(value, keras.KerasTensor):
        return 0
    try:
        width = np.dtype(keras.backend.standardize_dtype(value.dtype)).itemsize
    except TypeError:  # strings
        width = 8
    return int(np.prod([size or 1 for size in value.shape], dtype=np.int64)) * width
