"""What can stand where a BN layer stood: nothing, or what else its class does in ``forward``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bntools.affine import scale_shift
from bntools.backends.torch.operators import NORMS
from bntools.backends.torch.running import eval_mode
from bntools.errors import BntoolsError
from bntools.graph import Norm
from bntools.layer import BatchNorm

if TYPE_CHECKING:
    from bntools.backends.torch.watching import Call, Event, Watch

# ATen's name -> the module, and its arguments by ATen's names
ACTIVATIONS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "elu": (nn.ELU, ("alpha",)),
    "silu": (nn.SiLU, ()),
    "mish": (nn.Mish, ()),
    "gelu": (nn.GELU, ("approximate",)),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "tanh": (nn.Tanh, ()),
}


@dataclass(frozen=True)
class Replacement:
    """What a BN layer's class does after normalizing: run its ``children`` in a chain, or an activation.

    ``activation`` is ATen's name with the arguments that its module takes. ``whole`` says that the layer was found
    to be a scale and shift by trying it, not by its operations.
    """

    children: tuple[str, ...] = ()
    activation: tuple[str, tuple[Any, ...]] | None = None
    whole: bool = False

    def build(self, layer: nn.Module) -> nn.Module:
        """The module that stands where ``layer`` stood, with the layer's mode."""
        if self.activation is not None:
            name, arguments = self.activation
            new: nn.Module = ACTIVATIONS[name][0](*arguments)
        elif self.children:
            new = nn.Sequential(OrderedDict((name, layer.get_submodule(name)) for name in self.children))
        else:
            new = nn.Identity()
        new.training = layer.training
        return new


def replacement(watch: Watch, layer: BatchNorm, made: Call, inside: list[Event]) -> Replacement | str:
    """What can stand for the layer in this call of it, or in words why nothing can.

    ``inside`` are the ATen calls that were made during the call.
    """
    norms = [event for event in inside if isinstance(event.node.op, Norm)]
    own = [event for event in inside if event.call is made]
    children, value = tail(watch, made)
    if norms and own[0] is norms[0] and list(norms[0].node.inputs) == made.given and len(made.gave) == 1:
        normalized = norms[0].node.outputs[0]
        if len(own) == 1 and normalized == value:
            return Replacement(children)
        if len(own) == len(inside) == 2 and (activation := _activation(own[1], normalized, made)):
            return Replacement(activation=activation)
    if _is_scale_and_shift(watch, layer, made, children, value):
        return Replacement(children, whole=True)
    if any(event.name in NORMS for event in inside) and not norms:
        return "it normalizes with its batch's own statistics"
    does = ", ".join(dict.fromkeys(event.name for event in inside if event.name and event not in norms))
    return f"its {type(made.module).__name__} does more than normalize ({does})"


def tail(watch: Watch, made: Call) -> tuple[tuple[str, ...], int | None]:
    """The child modules that a layer runs in a chain at its end, and the value that the chain starts from."""
    names = {id(module): name for name, module in made.module._modules.items()}
    value = made.gave[0] if len(made.gave) == 1 else None
    chain: list[str] = []
    for child in reversed([call for call in watch.calls if call.parent is made]):
        if child.gave != [value] or len(child.given) != 1 or id(child.module) not in names:
            return (), made.gave[0] if len(made.gave) == 1 else None
        chain.insert(0, names[id(child.module)])
        value = child.given[0]
    return tuple(chain), value


def _activation(event: Event, value: int, made: Call) -> tuple[str, tuple[Any, ...]] | None:
    if event.name not in ACTIVATIONS or event.node.inputs != (value,) or made.gave != list(event.node.outputs):
        return None
    if event.name == "elu" and (event.arguments.get("scale"), event.arguments.get("input_scale")) != (1, 1):
        return None
    return event.name, tuple(event.arguments[key] for key in ACTIVATIONS[event.name][1])


def _is_scale_and_shift(
    watch: Watch, layer: BatchNorm, made: Call, children: tuple[str, ...], value: int | None
) -> bool:
    """Whether a layer, up to these children, is nothing but its scale and shift, whatever its arithmetic: tried out."""
    if len(made.given) != 1 or value is None:
        return False
    shapes, dtypes, x = watch.values.shapes, watch.values.dtypes, made.given[0]
    if shapes[x] != shapes[value] or dtypes[x] != dtypes[value]:
        return False
    try:
        affine = scale_shift(layer)
    except BntoolsError:
        return False
    shape = [1, -1] + [1] * (len(shapes[x]) - 2)
    scale, shift = (torch.from_numpy(a.copy()).view(shape) for a in (affine.scale, affine.shift))
    probe = _probe(scale, shift).to(next(made.module.buffers()).device, dtypes[x])
    try:
        with eval_mode(made.module), _left_out(made.module, children):
            given = made.module.forward(probe).double().cpu()
    except (RuntimeError, ValueError, TypeError):
        return False
    wanted = scale * probe.double().cpu() + shift
    allowed = 1e3 * torch.finfo(probe.dtype).eps * (wanted.abs() + shift.abs())
    return given.shape == wanted.shape and bool(((given - wanted).abs() <= allowed).all())


def _probe(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Inputs of both signs and many sizes, and others whose outputs are of both signs and many sizes."""
    sizes = torch.logspace(-2, 3, 11, dtype=torch.float64)
    values = torch.cat([sizes, -sizes]).view(-1, *[1] * (scale.ndim - 1))
    divisor = torch.where(scale == 0, 1.0, scale)
    return torch.cat([values.expand(-1, *scale.shape[1:]), (values - shift) / divisor])


@contextmanager
def _left_out(module: nn.Module, children: tuple[str, ...]) -> Iterator[None]:
    """The module without some of its children for a while."""
    own = {name: module._modules[name] for name in children}
    try:
        for name in children:
            module._modules[name] = nn.Identity()
        yield
    finally:
        module._modules.update(own)
