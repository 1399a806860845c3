"""Which module stores a tensor, under which name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from bntools.backends.torch.linear import Weight
from bntools.backends.torch.values import address

if TYPE_CHECKING:
    from bntools.backends.torch.watching import Call


class Owners:
    """The parameters and buffers of a model, and the places (module, attribute) where each is stored."""

    def __init__(self, model: nn.Module):
        self._places: dict[int, list[tuple[nn.Module, str, str]]] = {}
        self._stored: dict[int, torch.Tensor] = {}
        self._addresses: dict[int, set[str]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        self._add(module, slot_of(name, attribute), tensor)

    def _add(self, module: nn.Module, slot: str, tensor: torch.Tensor) -> None:
        self._stored[id(tensor)] = tensor
        self._places.setdefault(id(tensor), []).append((module, slot, slot.rpartition(".")[2]))
        if place := address(tensor):
            self._addresses.setdefault(place, set()).add(slot)

    def weight(self, tensor: torch.Tensor, call: Call | None) -> Weight | None:
        """The stored tensor that this is, as read during ``call``; None for any other tensor.

        A tensor that several modules share is taken to be the innermost running module's own.
        """
        places = self._used(tensor, call)
        if not places:
            return None
        module, slot, _ = places[0]
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        at_home = call is not None and call.module is module
        takes_bias = len(places) == 1 and at_home and module._parameters.get("bias", tensor) is None
        place = slot_of(slot.rpartition(".")[0], "bias") if takes_bias else None
        return Weight(tuple(s for _, s, _ in places), tuple(range(tensor.ndim)), kind, place)

    def module_of(self, tensor: torch.Tensor, call: Call | None) -> nn.Module | None:
        """The module that stores a tensor as its ``running_mean``, where that can be told."""
        places = self._used(tensor, call)
        return places[0][0] if len(places) == 1 and places[0][2] == "running_mean" else None

    def sharing(self, tensor: torch.Tensor) -> set[str]:
        """The places of stored tensors whose memory this tensor shares."""
        return self._addresses.get(address(tensor), set())

    def _used(self, tensor: torch.Tensor, call: Call | None) -> list[tuple[nn.Module, str, str]]:
        if self._stored.get(id(tensor)) is not tensor:
            return []
        places = self._places[id(tensor)]
        while call is not None and len(places) > 1:
            places = [place for place in places if place[0] is call.module] or places
            call = call.parent
        return places


def slot_of(module: str, attribute: str) -> str:
    """The slot of a module's parameter or buffer."""
    return f"{module}.{attribute}" if module else attribute
