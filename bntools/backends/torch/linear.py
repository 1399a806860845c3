"""Convolutions and matrix products with a stored weight, as ATen calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bntools.graph import Linear

_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution"
CONVOLUTIONS = frozenset(_CONVOLUTIONS.split())
DENSE = frozenset(["linear", "addmm", "mm", "matmul"])


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor that the model stores, or a view of one with its axes in another order.

    ``slots`` are the places it may have been read from: one, where that can be told. ``order`` is as in
    graph.Permute. ``place`` is the slot of the bias that its owner would also use, None if there is
    no such place; ``kind`` is "parameter" or "buffer".
    """

    slots: tuple[str, ...]
    order: tuple[int, ...]
    kind: str = "parameter"
    place: str | None = None

    def locked(self) -> str:
        """Why the stored tensor cannot be rewritten; empty if it can."""
        if len(self.slots) != 1:
            return f"its weight is shared by {' and '.join(self.slots)} and used outside of them"
        return "" if self.kind == "parameter" else f"its weight {self.slots[0]} is a buffer, not a parameter"


Find = Callable[[torch.Tensor], Weight | None]


def linear_of(name: str, given: Mapping[str, Any], find: Find) -> tuple[Linear, torch.Tensor] | None:
    """The linear operation that a call is, and its data input; None if it is not one with a stored weight.

    ``find`` gives the stored weight that a tensor is, if it is one.
    """
    if name in CONVOLUTIONS:
        return None if find(given["input"]) else (_convolution(name, given, find), given["input"])
    if name == "linear":
        x, weight, bias = given["input"], find(given["weight"]), given["bias"]
        if find(x) or (weight and len(weight.order) != 2):
            return None
        return _dense(weight, bias, find, (0, 1), x.ndim - 1), x
    if name == "addmm":
        x, weight, bias = given["mat1"], find(given["mat2"]), given["self"]
        plain = given.get("alpha", 1) == given.get("beta", 1) == 1 and bias.shape == given["mat2"].shape[1:]
        return (_dense(weight, bias, find, (1, 0), 1), x) if plain and weight and not find(x) else None
    if name in ("mm", "matmul"):
        return _product(given["self"], given.get("mat2", given.get("other")), find)
    return None


def _product(left: torch.Tensor, right: torch.Tensor, find: Find) -> tuple[Linear, torch.Tensor] | None:
    before, after = find(left), find(right)
    if after and not before and len(after.order) == 2:
        return _dense(after, None, find, (1, 0), left.ndim - 1), left
    if before and not after and len(before.order) == 2 and right.ndim >= 2:
        return _dense(before, None, find, (0, 1), right.ndim - 2), right
    return None


def _dense(weight: Weight | None, bias: torch.Tensor | None, find: Find, out_in: tuple[int, int], axis: int) -> Linear:
    out, into = (weight.order[i] for i in out_in) if weight else out_in
    slot, place, locked = _stored(weight, bias, find)
    return Linear(slot, place, out, into, 1, axis, axis, locked)


def _convolution(name: str, given: Mapping[str, Any], find: Find) -> Linear:
    weight = find(given["weight"])
    slot, place, locked = _stored(weight, given["bias"], find)
    if weight and weight.order != tuple(range(given["weight"].ndim)):
        locked = "its weight is stored with its axes in another order"
    transposed = "transpose" in name or given.get("transposed", False)
    axis = given["input"].ndim - given["weight"].ndim + 1
    out, into = (1, 0) if transposed else (0, 1)
    leak = _transposed_leak(given) if transposed else _padding_leak(given)
    return Linear(slot, place, out, into, int(given["groups"]), axis, axis, locked, leak)


def _padding_leak(given: Mapping[str, Any]) -> str:
    padding = given["padding"]
    if isinstance(padding, str):
        pads = padding == "same" and any(n > 1 for n in given["weight"].shape[2:])
    else:
        pads = any(padding)
    return "pads with zeros" if pads else ""


def _transposed_leak(given: Mapping[str, Any]) -> str:
    """With taps or strides of more than 1, outputs get inputs through different sets of taps."""
    even = all(n == 1 for n in (*given["weight"].shape[2:], *given["stride"])) and not any(given["output_padding"])
    return "" if even else "gives its outputs from different numbers of inputs"


def _stored(weight: Weight | None, bias: torch.Tensor | None, find: Find) -> tuple[str, str | None, str]:
    """The slots of weight and bias, and why they cannot be rewritten."""
    if weight is None:
        return "", None, "its weight is computed in the forward pass"
    if bias is None:
        return weight.slots[0], weight.place, weight.locked()
    stored = find(bias)
    if stored is None:
        return weight.slots[0], None, "its bias is computed in the forward pass"
    return weight.slots[0], stored.slots[0], weight.locked() or stored.locked().replace("weight", "bias")
