"""Taking BN layers out of an nn.Module: a copy whose other weights have taken up their scale and shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bntools.affine import absorb_input, absorb_output
from bntools.backends.torch.graph import copied
from bntools.backends.torch.layers import modules
from bntools.backends.torch.replacing import Replacement
from bntools.errors import BntoolsError
from bntools.graph import Bias, Graph, Linear, Norm
from bntools.legality import Step, Target

Place = tuple[nn.Module, str]


def absorb(model: nn.Module, graph: Graph, steps: Sequence[Step]) -> nn.Module:
    """A copy of the model in which these steps are made.

    Each layer gives way to ``nn.Identity``, or to what else its class does, at its place in the tree, so
    that class, names and keys of the rest stay. Weights are computed in float64 and cast once; a bias is
    added where one is missing; a weight that layers share is parted where only one of them changes.

    Raises BntoolsError where a weight does not fit the dtype in which the model stores it.
    """
    model = copied(model)
    layers = modules(model)
    weights = _Weights(model, layers)
    for step in steps:
        for target in step.targets:
            weights.absorb(target)
    weights.store()
    for step in steps:
        note = graph.notes[step.layer]
        assert isinstance(note, Replacement)
        _replace(model, layers[step.layer], note.build(layers[step.layer]))
    return model


class _Weights:
    """The weights that folding changes, in float64 until they are stored."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]):
        self._modules = dict(model.named_modules())
        self._layers = layers
        self._owned = [t for m in self._modules.values() for t in m._parameters.values() if t is not None]
        self._changed: dict[Place, np.ndarray] = {}

    def absorb(self, target: Target) -> None:
        """Let one weight take up its scale and shift."""
        op, affine = target.op, target.affine
        match op:
            case Linear():
                weight, bias = self._place(op.weight), None if op.bias is None else self._place(op.bias)
                change = absorb_output if target.side == "output" else absorb_input
                old = None if bias is None else self._value(bias)
                new_weight, new_bias = change(self._required(weight), old, affine, op.out_axis, op.in_axis, op.groups)
                self._changed[weight] = new_weight
                if bias is not None and (old is not None or new_bias.any()):
                    self._changed[bias] = new_bias
            case Norm(layer):
                module = self._layers[layer]
                scale, shift = self._value((module, "weight")), self._value((module, "bias"))
                self._changed[module, "weight"] = affine.scale * (1.0 if scale is None else scale)
                self._changed[module, "bias"] = affine.scale * (0.0 if shift is None else shift) + affine.shift
            case Bias(slot):
                self._changed[self._place(slot)] = affine.scale * self._required(self._place(slot)) + affine.shift

    def store(self) -> None:
        """Cast what has changed to the dtypes of the model, and write it there."""
        for (module, name), value in self._changed.items():
            self._store(module, name, torch.from_numpy(np.ascontiguousarray(value)))

    def _store(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        old = _tensor(module, name)
        like = old if old is not None else _tensor(module, "weight")
        if like is None:
            like = next(t for t in module.buffers() if t.is_floating_point())
        if float(value.abs().max()) > torch.finfo(like.dtype).max:
            raise BntoolsError(f"a {name} of {float(value.abs().max()):.3g} does not fit {like.dtype}")
        shared = isinstance(old, nn.Parameter) and sum(t is old for t in self._owned) > 1
        if old is not None and not shared:
            with torch.no_grad():
                old.copy_(value)  # in place: whoever holds the parameter sees the new values
            return
        new = nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad)
        module.register_parameter(name, new)
        if getattr(module, "affine", True) is False:
            # A BN layer that took up another one: its repr says so.
            module.affine = True  # type: ignore[assignment]

    def _place(self, slot: str) -> Place:
        owner, _, name = slot.rpartition(".")
        return self._modules[owner], name

    def _required(self, place: Place) -> np.ndarray:
        value = self._value(place)
        if value is None:
            raise BntoolsError(f"{type(place[0]).__name__} has no {place[1]}")
        return value

    def _value(self, place: Place) -> np.ndarray | None:
        if place in self._changed:
            return self._changed[place]
        tensor = _tensor(*place)
        return None if tensor is None else tensor.detach().to("cpu", torch.float64).numpy()


def _tensor(module: nn.Module, name: str) -> Any:
    """A module's own parameter or buffer, None if it has none of this name."""
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def _replace(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """Put another module in every place of a layer, and let the layer itself do nothing.

    A model may also hold the layer in a plain list, which is no part of the module tree.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is layer:
                parent._modules[name] = new
    _neutralize(layer)


@torch.no_grad()
def _neutralize(layer: Any) -> None:
    layer.running_mean.zero_()
    layer.running_var.fill_(1 - layer.eps)
    for name, value in (("weight", (layer.running_var.double() + layer.eps).sqrt()), ("bias", 0.0)):
        tensor = _tensor(layer, name)
        if tensor is not None:
            tensor.copy_(torch.as_tensor(value))
