"""What one ATen call means for folding: which neutral operation it is, and on which tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bntools.backends.torch import operators
from bntools.backends.torch.linear import Weight, linear_of
from bntools.graph import Add, Bias, Identity, Norm, Op, Other, Permute

Entry = int | Weight


@dataclass(frozen=True, eq=False)
class Made:
    """An ATen call that was made: its arguments by name, its tensors, and what these are.

    ``changed`` are tensors that it wrote to in place, ``fresh`` are those it returned that are new.
    """

    func: Any
    name: str
    given: Mapping[str, Any]
    inputs: Sequence[torch.Tensor]
    read: Sequence[Entry]
    changed: Sequence[torch.Tensor]
    fresh: Sequence[torch.Tensor]

    @property
    def outputs(self) -> list[torch.Tensor]:
        """What it made: tensors that were changed, then new ones."""
        return [*self.changed, *self.fresh]

    @property
    def weights(self) -> list[Weight]:
        """The stored tensors among its inputs."""
        return [entry for entry in self.read if isinstance(entry, Weight)]


Find = Callable[[torch.Tensor], Weight | None]
Layer = Callable[[Mapping[str, Any]], str | None]


def meaning(made: Made, find: Find, layer: Layer) -> tuple[list[Op], torch.Tensor | None]:
    """The operations that a call is for folding, and the tensor that they are applied to.

    One operation, or one for each output of a split; ``[Other()]`` for most. ``find`` gives the stored
    weight that a tensor is, ``layer`` the name of the BN layer whose statistics a call normalizes with.
    """
    if made.name in operators.NORMS:
        name = layer(made.given)
        return ([Other()], None) if name is None else ([Norm(name, 1)], made.given["input"])
    if found := linear_of(made.name, made.given, find):
        return [found[0]], found[1]
    if made.name == "add" and len(made.read) == 2 and len(made.weights) == 1:
        return _bias(made)
    if made.weights:
        return [Other()], None
    ops = operators.transparent(made.func, made.given, made.inputs, made.outputs)
    if not ops or (made.changed and not isinstance(ops[0], Add)):
        return [Other()], None  # in place, unsqueeze_ and its like change the shape that others see
    return ops, None


def view_of_weight(made: Made) -> Weight | None:
    """The stored tensor that the result of a call is still a view or a cast of, if it is one."""
    plain = len(made.read) == len(made.fresh) == 1 and not made.changed and made.fresh[0].is_floating_point()
    weight = made.read[0] if plain else None
    if not isinstance(weight, Weight):
        return None
    match operators.transparent(made.func, made.given, made.inputs, made.fresh):
        case [Permute(order)]:
            return Weight(weight.slots, tuple(weight.order[axis] for axis in order), weight.kind, weight.place)
        case [Identity()]:
            return weight
    return None


def _bias(made: Made) -> tuple[list[Op], torch.Tensor | None]:
    """A stored array added to the whole of a value."""
    first, second = made.inputs
    x, stored = (second, first) if isinstance(made.read[0], Weight) else (first, second)
    (weight,) = made.weights
    plain = weight.order == tuple(range(stored.ndim)) and not weight.locked() and made.given.get("alpha", 1) == 1
    return (
        ([Bias(weight.slots[0], tuple(stored.shape))], x)
        if plain and x.shape == made.outputs[0].shape
        else ([Other()], None)
    )
