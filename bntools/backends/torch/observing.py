"""Reading the statistics of a model that trains, without waiting for its device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bntools.backends.torch.hooks import Hook
from bntools.backends.torch.layers import modules

REFUSAL = "bntools.watch looks at the model's first training step: pickle or save it whole before or after that"


class Reading:
    """A tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor):
        self._event: Any = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Whether it has arrived."""
        return self._event is None or self._event.query()

    def values(self) -> np.ndarray:
        """The numbers; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.to("cpu", torch.float64).numpy()


class Observer:
    """Reads the statistics of named layers.

    Buffers are looked up each time: callbacks of libraries put others in their places.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        found = modules(model)
        self._modules: list[Any] = [found[name] for name in names]
        self._order: list[str] = []
        self._hooks: list[RemovableHandle] = []
        if not any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
            # Compiled code would be compiled anew for these hooks.
            self._hooks = [found[name].register_forward_pre_hook(self._noting(name)) for name in names]

    def _noting(self, name: str) -> Hook:
        def note(*_: Any) -> None:
            if name not in self._order:
                self._order.append(name)

        return Hook(note, REFUSAL)

    def peaks(self) -> Reading:
        """The largest magnitude in each layer's statistics, of shape (layers,): NaN or Inf if one of them is."""
        self.close()
        with torch.no_grad():
            means = [module.running_mean for module in self._modules]
            variances = [module.running_var for module in self._modules]
            # One kernel for all of them on an accelerator; it is what clip_grad_norm_ calls.
            norms = torch.stack(_alike(torch._foreach_norm([*means, *variances], float("inf"))))
            return Reading(torch.maximum(*norms.view(2, -1)))

    def statistics(self) -> Reading:
        """Mean and variance of each layer one after the other, in one vector."""
        self.close()
        with torch.no_grad():
            both = [values for module in self._modules for values in (module.running_mean, module.running_var)]
            return Reading(torch.cat(_alike(both)))

    def order(self) -> list[str]:
        """The names in the order in which the first forward pass reached them, as far as it was seen."""
        return self._order

    def close(self) -> None:
        """Look at forward passes no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def observer(model: nn.Module, names: list[str]) -> Observer:
    """What reads the statistics of the named layers."""
    return Observer(model, names)


def _alike(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on one device and in one dtype, float32 or more."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(tensors[0].device, dtype) for tensor in tensors]
