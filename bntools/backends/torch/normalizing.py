"""Where a BN module normalizes: its forward, stopped right before it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Meet = Callable[[torch.Tensor], None]

_STOCK = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_OPERATIONS = (F.batch_norm, torch.batch_norm)


def stopping_forward(module: nn.Module, meet: Meet) -> Callable[..., Any]:
    """The module's forward, which calls ``meet(x)`` with what BN is about to normalize.

    For PyTorch's own layers that is the module's input. A subclass that does more in ``forward``
    is stopped at its batch_norm call, and one that writes the arithmetic out, at its input.
    """
    forward = module.forward
    if is_stock(module):

        def at_input(input: torch.Tensor) -> Any:
            meet(input)
            return forward(input)

        return at_input

    at_call: bool | None = None

    def at_operation(*args: Any, **kwargs: Any) -> Any:
        nonlocal at_call
        if at_call is None:
            at_call = isinstance(module, _NormBase) and _calls_batch_norm(module, forward, args, kwargs)
        if at_call:
            with _AtBatchNorm(module, meet):
                return forward(*args, **kwargs)
        meet(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
        return forward(*args, **kwargs)

    return at_operation


def is_stock(module: nn.Module) -> bool:
    """Whether a module normalizes what it is given, as PyTorch's own layers do."""
    return type(module).forward in _STOCK and "forward" not in vars(module)


class _AtBatchNorm(TorchFunctionMode):
    """Calls ``meet`` before each batch_norm with this module's statistics.

    A mode is off while its own handler runs, so no other replica meets it.
    """

    def __init__(self, module: nn.Module, meet: Meet):
        super().__init__()
        self.mean = module.running_mean
        self.meet = meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATIONS and (*args[1:2], kwargs.get("running_mean"))[0] is self.mean:
            self.meet(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def _calls_batch_norm(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether the forward of a subclass calls batch_norm: tried once, on copies, in eval mode."""
    seen: list[torch.Tensor] = []
    training, module.training = module.training, False
    try:
        with _AtBatchNorm(module, seen.append):
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            forward(*args, **kwargs)
    finally:
        module.training = training
    return bool(seen)
