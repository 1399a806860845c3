"""Statistics of a live module, exchanged often: what is needed for it is looked up once.

Values are copied into the buffers that are there. Exchanging the tensors would be faster, but what holds on to a
buffer (a captured CUDA graph, compiled code, DistributedDataParallel) would go on with the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bntools.backends.torch.layers import check_fits, modules, unwrap
from bntools.errors import BntoolsError

MEAN, VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"


class Live:
    """The statistics of some layers of a module, wherever its buffers lie at the time."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self._model = unwrap(model)
        found = modules(model)
        self.layers = {name: found[name] for name in names}
        self._buffers = {name: module._buffers for name, module in self.layers.items()}
        self._tree = _tree(self._model)
        for name, buffers in self._buffers.items():
            if buffers.get(MEAN) is None or buffers.get(VAR) is None:
                raise BntoolsError(f"layer {name!r} keeps its statistics outside of its buffers: use bntools.apply")
        self._keys = {
            name: [key for key in (MEAN, VAR, COUNTER) if buffers.get(key) is not None]
            for name, buffers in self._buffers.items()
        }

    def made(self, statistics: Mapping[str, tuple[Any, Any, int | None]]) -> dict[str, list[torch.Tensor]]:
        """Statistics in the form in which the buffers hold them now. Raises BntoolsError where they do not fit."""
        result = {}
        for name, buffers in self._buffers.items():
            mean, var, updates = statistics[name]
            check_fits(name, buffers[MEAN], mean, "mean")
            check_fits(name, buffers[VAR], var, "variance")
            result[name] = [torch.as_tensor(v).to(buffers[k]) for k, v in ((MEAN, mean), (VAR, var))]
            if (counter := buffers.get(COUNTER)) is not None:
                result[name].append(counter.clone() if updates is None else torch.full_like(counter, updates))
        return result

    @torch.no_grad()
    def taken(self) -> dict[str, list[torch.Tensor]]:
        """Copies of all of them. Raises BntoolsError where layers are not the model's any more."""
        if any(children.get(key) is not child for children, key, child in self._tree):
            self._check_layers()
        return {name: [tensor.clone() for tensor in self._tensors(name)] for name in self.layers}

    @torch.no_grad()
    def put(self, values: Mapping[str, list[torch.Tensor]]) -> None:
        """Store what ``made`` or ``taken`` gave for these layers, on whatever device the module is by now."""
        if values:
            tensors = [tensor for name in values for tensor in self._tensors(name)]
            torch._foreach_copy_(tensors, [value for own in values.values() for value in own])

    def _check_layers(self) -> None:
        """Something in the model was replaced: were these layers?"""
        found = modules(self._model)
        for name, module in self.layers.items():
            if found.get(name) is not module:
                raise BntoolsError(
                    f"layer {name!r} was replaced in the model after bntools.use was called: call it again"
                )
        self._tree = _tree(self._model)

    def _tensors(self, name: str) -> list[torch.Tensor]:
        buffers = self._buffers[name]
        return [buffers[key] for key in self._keys[name]]


def _tree(model: nn.Module) -> list[tuple[dict[str, nn.Module | None], str, nn.Module | None]]:
    """Every place of a module in the model, with what is there."""
    return [(parent._modules, key, child) for parent in model.modules() for key, child in parent._modules.items()]


live = Live
