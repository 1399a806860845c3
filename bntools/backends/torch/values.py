"""Tensors of a forward pass as numbered values, followed as objects and held weakly.

What is still alive once the model has returned is seen from outside: as an output, on an attribute, or in
somebody's hook.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bntools.backends.torch.linear import Weight

if TYPE_CHECKING:
    from bntools.backends.torch.owners import Owners
    from bntools.backends.torch.watching import Call


class Values:
    """The number of each tensor, its shape and dtype, and which values share memory."""

    def __init__(self, owners: Owners):
        self.owners = owners
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self._known: Any = WeakTensorKeyDictionary()
        self._made: set[int] = set()
        # An address is handed out again once its tensors are gone: a memory is the address and how many times.
        self._generation: dict[int, int] = {}
        self._sharing: dict[tuple[int, int], set[int]] = {}

    def known(self, tensor: torch.Tensor, call: Call | None) -> int | Weight | None:
        """What a tensor is, as read during ``call``; None for one that was never seen."""
        found = self._known.get(tensor)
        return self.owners.weight(tensor, call) if found is None else found

    def new(self, tensor: torch.Tensor, sources: Sequence[torch.Tensor] | None = None) -> int:
        """Give a tensor a new number; ``sources`` are those it was made from, whose memory it may share."""
        value = len(self.shapes)
        self.shapes[value], self.dtypes[value] = tuple(tensor.shape), tensor.dtype
        self._known[tensor] = value
        if sources is not None:
            self._made.add(value)
        if place := address(tensor):
            if sources is not None and not any(address(source) == place for source in sources):
                self._generation[place] = self._generation.get(place, 0) + 1
            self._sharing.setdefault((place, self._generation.get(place, 0)), set()).add(value)
        return value

    def is_weight(self, tensor: torch.Tensor, weight: Weight) -> None:
        """Note that a tensor is a view of a stored one."""
        self._known[tensor] = weight

    def sharing(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """All values that lie, or lay, in the memory of these tensors."""
        places = [(place, self._generation.get(place, 0)) for t in tensors if (place := address(t))]
        return {value for place in places for value in self._sharing.get(place, ())}

    def seen_outside(self, result: Any) -> dict[int, str]:
        """The values that are alive after the forward pass, and how: call it while ``result`` is held."""
        if self._alive() - _numbers(result, self._known):
            gc.collect()  # only now: it takes a tenth of a second, and most often nothing is left over
        outputs = _numbers(result, self._known)
        return {
            value: "an output of the model" if value in outputs else "kept after the forward pass"
            for value in self._alive()
        }

    def _alive(self) -> set[int]:
        return self._made & {value for value in self._known.values() if isinstance(value, int)}


def _numbers(result: Any, known: Any) -> set[int]:
    found = {known.get(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
    return {value for value in found if isinstance(value, int)}


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins, the same for all views of it; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
