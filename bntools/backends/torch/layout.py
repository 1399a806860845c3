"""The memory layout in which a model is measured: channels last where that is faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bntools.backends.torch.measuring import HALF


class Layout:
    """Channels last for a while: oneDNN's convolutions, and the moments, are faster with it; on CUDA in half precision.

    The values of the weights are the same and every weight gets its own memory back. Only
    a model with 2-D convolutions has anything to gain. A second copy of their weights is
    held meanwhile; where that takes more than ``memory`` bytes, the model keeps its layout.
    """

    def __init__(self, model: nn.Module, memory: float):
        convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        weights = [w for m in convolutions if (w := m._parameters.get("weight")) is not None]
        self._original = [
            (weight, weight.data) for weight in weights if not nn.parameter.is_lazy(weight) and _gains(weight)
        ]
        self.held = sum(values.nbytes for _, values in self._original)
        if self.held > memory:
            self._original, self.held = [], 0
        self.channels_last = bool(self._original)

    @contextmanager
    def used(self) -> Iterator[Layout]:
        """Convert the weights; give them back on the way out."""
        try:
            for weight, _ in self._original:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            yield self
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Back to the model's own layout, which some models' ``view`` calls need."""
        self.channels_last = False
        for weight, values in self._original:
            weight.data = values

    def of(self, inputs: Any) -> Any:
        """The inputs in this layout: every image tensor (N, C, H, W) among them."""
        return pytree.tree_map_only(torch.Tensor, _channels_last, inputs)


def _gains(weight: torch.Tensor) -> bool:
    """Whether convolutions with a weight are faster in channels last.

    On CUDA those of half precision are: tensor cores take it as it is, and cuDNN transposes anything else before and
    after. In float32 there is nothing to be had for sure.
    """
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if kind == "cuda" and torch.is_autocast_enabled(kind) else weight.dtype
    return kind == "cpu" or (kind == "cuda" and dtype in HALF)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
