"""One micro-batch on its way through an nn.Module, stopping at every BN layer.

A replica is a greenlet: the model's own eager code runs as it is, and where it reaches a BN layer the
greenlet hands over the moments of the layer's input and waits. All replicas share one thread and one
model, so whatever PyTorch keeps per thread or the model per forward pass is set aside while a replica
waits, and the next one finds everything as at the start.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy

from bntools import coroutines
from bntools.alone import alone
from bntools.backends.torch.eager import eager
from bntools.backends.torch.layers import has_train_mode, modules, parts, unwrap
from bntools.backends.torch.layout import Layout
from bntools.backends.torch.measuring import moments_of, sample_means_of, values_of
from bntools.backends.torch.normalizing import stopping_forward
from bntools.backends.torch.running import Forward, call, eval_mode, named, prepared
from bntools.backends.torch.state import Ambient, Attributes, thread_kept
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.moments import Arrival
from bntools.runner import Outputs


@contextmanager
def measuring(
    model: nn.Module,
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

    The model is in eval mode meanwhile. The named layers normalize with their ``"stored"``
    statistics, with those of the ``"batch"``, or train as the framework does (``"update"``). Of ``memory``
    bytes a quarter may be used to make the forward pass faster. ``waiting``, that replicas
    go from layer to layer together, and ``outputs``, that what the model gives is wanted, make no difference to a
    module. Of the layers in ``values`` the input itself is handed over. On the way out, whatever happened, every
    mode, hook, attribute and other buffer of the model is as before.
    """
    model = unwrap(model)
    found = modules(model)
    targets = {name: found[name] for name in names}
    _check_ready(model, targets, normalize)
    stack = ExitStack()
    try:
        stack.enter_context(alone(parts(model)))
        stack.enter_context(thread_kept())
        stack.enter_context(eager())
        stack.enter_context(eval_mode(model))
        stack.enter_context(_buffers_kept(model, targets.values()))
        stack.enter_context(_normalizing(targets.values(), normalize))
        layout = stack.enter_context(Layout(model, memory / 4 if forward is None else 0).used())
        walk = Walk(model, forward, per_sample, layout, frozenset(values))
        stack.enter_context(_stopping(targets, walk.meet))
        walk.attributes = Attributes(model)
        stack.callback(walk.attributes.close)
        stack.enter_context(_each_output(walk.note))
        yield walk
    finally:
        with uninterrupted():
            stack.close()


class Replica:
    """One micro-batch on its way through the model."""

    def __init__(self, walk: Walk, batch: Any):
        self._walk = walk
        self._batch = batch
        self._stops = self._skip = 0
        self._converted = False
        self._given: Any = None
        self.noted: list[weakref.ref[torch.Tensor]] = []
        self._coroutine = coroutines.made(self._run)

    def advance(self) -> Arrival | None:
        """Run on to the next BN layer; None when the forward pass has come to its end."""
        try:
            return self._switch()
        except Exception:
            if not self._converted:
                raise
        # Many a model asks for .view where channels-last memory needs .reshape. Its replica starts again
        # in the model's own layout and passes the layers that it has behind it without stopping.
        self._walk.layout.give_up()
        self._skip, self._stops = self._stops, 0
        self._coroutine = coroutines.made(self._run)
        return self._switch()

    def close(self) -> None:
        """End the replica where it stands; its context managers and finally blocks run."""
        coroutines.end(self._coroutine, self._resuming)

    def held(self) -> int:
        """Bytes of the tensors that the waiting replica holds, the model's own not counted."""
        # Outputs of modules, for what lies on a frame's value stack ("cat([a(x), b(x)])") is not in its locals.
        outputs = coroutines.leaves(output() for output in self.noted)
        sizes: dict[int, int] = {}
        for value in chain(outputs, coroutines.held(self._coroutine)):
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        return sum(size for pointer, size in sizes.items() if pointer not in self._walk.own)

    def outputs(self) -> Outputs:
        """What the model gave, by name; the replica has come to its end."""
        return named(self._given)

    def _resuming(self) -> None:
        self._walk.running = self

    def _switch(self) -> Arrival | None:
        self._resuming()
        return self._coroutine.switch()

    def _run(self) -> None:
        self._walk.attributes.fresh()
        self._converted = self._walk.layout.channels_last
        try:
            self._given = self._walk.forward(self._batch)
        finally:
            self._walk.attributes.restore()

    def is_current(self) -> bool:
        """Whether the calling code is this replica's."""
        return coroutines.is_current(self._coroutine)

    def stop(self, arrival: Callable[[], Arrival]) -> None:
        """Wait at a layer (called by the model's forward pass, inside the greenlet)."""
        coroutines.check_current(self._coroutine)
        self._stops += 1
        if self._stops > self._skip:
            met = arrival()
            with self._walk.attributes.set_aside(), self._walk.ambient.restored():
                self._coroutine.parent.switch(met)


class Walk:
    """What all replicas of one measurement share; called with a batch, it starts one."""

    attributes: Attributes
    running: Replica | None = None

    def __init__(
        self, model: nn.Module, forward: Forward | None, per_sample: bool, layout: Layout, values: frozenset[str]
    ):
        tensors = [*model.parameters(), *model.buffers()]
        device = next((t.device.type for t in tensors), "cpu")
        self._model, self._forward, self._per_sample, self.layout = model, forward, per_sample, layout
        self._values = values
        self.own = {t.untyped_storage().data_ptr() for t in tensors}
        self.ambient = Ambient.now(frozenset({"cpu", device}))

    @property
    def held(self) -> int:
        """Bytes that the preparation of the model holds."""
        return self.layout.held

    def __call__(self, batch: Any) -> Replica:
        """A replica on this batch, not started yet."""
        return Replica(self, batch)

    def forward(self, batch: Any) -> Any:
        """The forward pass of one replica."""
        if self.layout.channels_last:
            batch = self.layout.of(prepared(self._model, batch))
        return call(self._model, batch, self._forward)

    def note(self, output: Any) -> None:
        """Remember, without keeping it alive, what a module of the running replica returned."""
        running = self.running
        if running is not None and isinstance(output, torch.Tensor) and running.is_current():
            running.noted.append(weakref.ref(output))

    def meet(self, name: str, x: torch.Tensor) -> None:
        """Measure what a layer is about to normalize, and wait there."""
        assert self.running is not None
        self.running.stop(lambda: self._arrival(name, x))

    def _arrival(self, name: str, x: torch.Tensor) -> Arrival:
        samples = sample_means_of(x) if self._per_sample else None
        return Arrival(name, moments_of(x), samples, values_of(x) if name in self._values else None)


def _check_ready(model: nn.Module, targets: dict[str, nn.Module], normalize: str) -> None:
    own: list[Any] = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in own):
        raise BntoolsError("the model has lazy layers that are not initialized yet: run one batch through it first")
    fixed = [name for name, module in targets.items() if not has_train_mode(module)]
    if fixed and normalize != "stored":
        raise BntoolsError(
            f"layer {fixed[0]!r} is a {type(targets[fixed[0]]).__name__}, which knows no train mode: only "
            f"method='exact' can recalibrate it"
        )


@contextmanager
def _stopping(targets: dict[str, nn.Module], meet: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    own = {module: vars(module).get("forward") for module in targets.values()}
    try:
        for name, module in targets.items():
            vars(module)["forward"] = stopping_forward(module, partial(meet, name))
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


@contextmanager
def _normalizing(targets: Iterable[Any], normalize: str) -> Iterator[None]:
    before = [(module, getattr(module, "momentum", None)) for module in targets]
    found = [getattr(module, "num_batches_tracked", None) for module, _ in before] if normalize == "batch" else []
    counters = [(counter, counter.clone()) for counter in found if counter is not None]
    try:
        for module, _ in before:
            module.training = normalize != "stored"
            if normalize == "batch" and hasattr(module, "momentum"):
                module.momentum = 0.0  # normalize with the batch, but leave the stored statistics alone
        yield
    finally:
        for module, momentum in before:
            if hasattr(module, "momentum"):
                module.momentum = momentum
        for counter, updates in counters:
            counter.copy_(updates)


@contextmanager
def _buffers_kept(model: nn.Module, targets: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what a model counts or caches in buffers while it runs."""
    measured = {id(buffer) for module in targets for buffer in module._buffers.values()}
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in measured]
    try:
        yield
    finally:
        for buffer, values in before:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


@contextmanager
def _each_output(note: Callable[[Any], None]) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, output: note(output))
    try:
        yield
    finally:
        handle.remove()
