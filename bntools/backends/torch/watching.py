"""Watching a model run: every ATen call, the module it was made in, and which values it reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bntools.backends.torch import operators
from bntools.backends.torch.layers import modules
from bntools.backends.torch.linear import Weight
from bntools.backends.torch.meaning import Entry, Made, meaning, view_of_weight
from bntools.backends.torch.owners import Owners
from bntools.backends.torch.values import Values
from bntools.graph import Linear, Node, Norm, Op, Other


@dataclass(eq=False)
class Call:
    """One run of a module's ``forward``: the values it was given and the values it gave."""

    module: nn.Module
    name: str
    parent: Call | None
    given: list[int] = field(default_factory=list)
    gave: list[int] = field(default_factory=list)

    def within(self, other: Call) -> bool:
        """Whether this call was made during another one, or is it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.parent
        return call is other


@dataclass(frozen=True, eq=False)
class Event:
    """One ATen call: what it is for folding, where it was made, and its arguments that are not tensors."""

    node: Node
    call: Call | None
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Watch(TorchDispatchMode):
    """A record of one forward pass of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.events: list[Event] = []
        self.calls: list[Call] = []
        self.outputs: dict[int, str] = {}
        self.overwritten: set[int] = set()
        self.values = Values(Owners(model))
        self._layers = {id(module): name for name, module in modules(model).items()}
        self._call: Call | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what happens until the end of the block."""
        own = [(m, name) for name, m in self.model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        before = {module: vars(module).get("forward") for module, _ in own}
        try:
            for module, name in own:
                # On the instance, and not as a hook, so that model.layer.forward(x) is seen as well.
                vars(module)["forward"] = partial(self._forward, module, name, module.forward)
            with self:
                yield
        finally:
            for module, forward in before.items():
                vars(module).pop("forward", None)
                if forward is not None:
                    vars(module)["forward"] = forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operators.base_name(func)
        if not operators.is_known(name):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = _tensors((args, kwargs))[: operators.reads(name)]
        read = [self._value(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        given = operators.given_arguments(func, args, kwargs)
        changed = _tensors([given.get(argument) for argument in operators.written(func)])
        fresh = [t for t in _tensors(result) if not any(t is other for other in (*inputs, *changed))]
        if changed or fresh or not _tensors(result):
            self._record(Made(func, name, given, inputs, read, changed, fresh))
        return result

    def _record(self, made: Made) -> None:
        # A tensor that is changed in place has a new value from then on. Other views of it keep their old
        # number; that does no harm, since they and the change all read the value they are views of.
        if (weight := view_of_weight(made)) is not None:
            self.values.is_weight(made.fresh[0], weight)
            return
        ops, data = meaning(made, self._weight, self._layer)
        entries = sorted(zip(made.inputs, made.read, strict=True), key=lambda pair: pair[0] is not data)
        inputs = tuple(entry for _, entry in entries if isinstance(entry, int))
        reads = frozenset(slot for weight in made.weights for slot in weight.slots)
        label = self._label(ops[0], made.name)
        self.overwritten |= self.values.sharing(made.changed)
        values = tuple(self.values.new(tensor, made.inputs) for tensor in made.outputs)
        arguments = {key: value for key, value in made.given.items() if not isinstance(value, torch.Tensor | list)}
        for op, part in zip(ops, [values] if len(ops) == 1 else [(value,) for value in values], strict=True):
            self._add(Node(op, label, inputs, part, reads), made.name, arguments)

    def _forward(self, module: nn.Module, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call(module, name, self._call, self._values_in((args, kwargs)))
        self.calls.append(call)
        self._call = call
        try:
            result = forward(*args, **kwargs)
        finally:
            self._call = call.parent
        call.gave = self._values_in(result)
        if any(map(_looks_at_values, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            self._add(Node(Other(), f"a forward hook on {name!r}", (*call.given, *call.gave), ()))
        return result

    def _value(self, tensor: torch.Tensor) -> Entry:
        """What a tensor is: a stored weight, or a value of the forward pass by number."""
        if (known := self.values.known(tensor, self._call)) is not None:
            return known
        value = self.values.new(tensor)
        if slots := self.values.owners.sharing(tensor):
            self._add(Node(Other(), "a view of a stored tensor", (), (value,), frozenset(slots)))
        return value

    def _weight(self, tensor: torch.Tensor) -> Weight | None:
        value = self._value(tensor)
        return value if isinstance(value, Weight) else None

    def _values_in(self, tree: Any) -> list[int]:
        return [value for value in map(self._value, _tensors(tree)) if isinstance(value, int)]

    def _layer(self, given: Mapping[str, Any]) -> str | None:
        """The BN layer whose stored statistics, scale, shift and eps a call normalizes with."""
        if given["running_mean"] is None or given.get("training") or given.get("use_input_stats"):
            return None
        module = self.values.owners.module_of(given["running_mean"], self._call)
        if module is None or id(module) not in self._layers:
            return None
        own = {name: getattr(module, name, None) for name in ("weight", "bias", "running_var")}
        eps = given.get("eps", given.get("epsilon"))
        same = all(given[name] is tensor for name, tensor in own.items()) and eps == getattr(module, "eps", None)
        return self._layers[id(module)] if same else None

    def _label(self, op: Op, name: str) -> str:
        if isinstance(op, Norm):
            return f"batch norm {op.layer!r}"
        word = _word(op, name)
        if self._call is None or not self._call.name:
            return word
        return f"{word} in {self._call.name!r}" if self._call.module._modules else f"{word} {self._call.name!r}"

    def _add(self, node: Node, name: str = "", arguments: Mapping[str, Any] | None = None) -> None:
        self.events.append(Event(node, self._call, name, arguments or {}))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _word(op: Op, name: str) -> str:
    """What messages call an operation."""
    if not isinstance(op, Linear):
        return name.strip("_")
    if "conv" not in name:
        return "dense"
    return "conv" if op.out_axis == 0 else "transposed conv"


def _looks_at_values(hook: Any) -> bool:
    # The hooks of weight_norm, spectral_norm and pruning compute weights and look at no values.
    return not type(hook).__module__.startswith("torch.nn.utils")
