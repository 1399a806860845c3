"""freeze, unfreeze and reset on the BN modules of an nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from bntools.backends.torch.layers import StaysInEval, affine_parameters, has_train_mode, modules

# parameter -> how many freezes hold it, and whether it wanted gradients before the first
_frozen: MutableMapping[torch.Tensor, tuple[int, bool]] = WeakTensorKeyDictionary()


def freeze(model: nn.Module, names: Iterable[str], *, stats: bool, affine: bool) -> Callable[[], None]:
    """Freeze the named layers; returns the function that gives them back what they had."""
    undo: list[Callable[[], None]] = []
    found = modules(model)
    for name in names:
        module = found[name]
        if stats and has_train_mode(module):
            undo.append(_freeze_stats(module))
        if affine:
            undo.extend(_freeze_parameter(parameter) for parameter in affine_parameters(module))

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    return undo_all


def unfreeze(model: nn.Module, names: Iterable[str]) -> None:
    """Let the named layers train again; each takes the mode it would be in had it not been frozen."""
    found = modules(model)
    for name in names:
        _wake(found[name])
        for parameter in affine_parameters(found[name]):
            _frozen.pop(parameter, None)
            parameter.requires_grad = True


@torch.no_grad()
def reset(model: nn.Module, names: Iterable[str]) -> None:
    """Statistics to mean 0 and variance 1, the counter to 0."""
    found = modules(model)
    for name in names:
        module = found[name]
        module.running_mean.zero_()
        module.running_var.fill_(1)
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.zero_()


def _freeze_stats(module: nn.Module) -> Callable[[], None]:
    stand_in = vars(module).get("train")
    if isinstance(stand_in, StaysInEval):
        stand_in.holders += 1
    else:
        stand_in = vars(module)["train"] = StaysInEval(module)
    module.training = False
    return lambda: _let_go(module, stand_in)


def _let_go(module: nn.Module, stand_in: StaysInEval) -> None:
    stand_in.holders -= 1
    if not stand_in.holders and vars(module).get("train") is stand_in:
        _wake(module)


def _wake(module: nn.Module) -> None:
    if isinstance(stand_in := vars(module).get("train"), StaysInEval):
        del vars(module)["train"]
        module.training = stand_in.asked


def _freeze_parameter(parameter: nn.Parameter) -> Callable[[], None]:
    holders, before = _frozen.get(parameter, (0, parameter.requires_grad))
    _frozen[parameter] = (holders + 1, before)
    parameter.requires_grad = False
    parameter.grad = None  # an optimizer with momentum or weight decay would still apply it
    return lambda: _thaw_parameter(parameter)


def _thaw_parameter(parameter: nn.Parameter) -> None:
    if parameter not in _frozen:
        return  # unfreeze came first
    holders, before = _frozen.pop(parameter)
    if holders > 1:
        _frozen[parameter] = (holders - 1, before)
    else:
        parameter.requires_grad = before
