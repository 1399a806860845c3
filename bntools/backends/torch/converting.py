"""BN modules turned into another normalization, in a copy of the model.

A module changes its class where it is, so that whoever holds it (a second place in the tree, a plain list, a hook)
holds the new kind, and its parameters, hooks, mode and flags stay the objects they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from bntools.affine import scale_shift
from bntools.backends.torch.frozen_affine import FrozenAffine
from bntools.backends.torch.graph import copied
from bntools.backends.torch.layers import StaysInEval, layers, modules
from bntools.backends.torch.running import call, eval_mode
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm

PLAIN: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OF_BN = ("running_mean", "running_var", "num_batches_tracked")  # buffers
SETTINGS = ("num_features", "momentum", "track_running_stats", "process_group", "eps", "affine")


def convert(
    model: nn.Module, to: str, names: Iterable[str], *, groups: Mapping[str, int], example: Any = None
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of the model in which the named layers are another kind, and the reason for each that is not.

    ``example`` is one batch that shows the dimensions of inputs, ``groups`` the number of groups by layer.
    """
    new = copied(model)
    found, records = modules(new), {layer.name: layer for layer in layers(new)}
    kept: dict[str, str] = {}
    dims = _dims(new, found, example) if to == "batchnorm" else {}
    for name in names:
        reason = _obstacle(found[name], to)
        if reason is None and to == "frozen":
            reason = _to_frozen(found[name], records[name])
        elif reason is None and to == "groupnorm":
            _to_group_norm(found[name], groups[name])
        elif reason is None:
            reason = _to_batch_norm(found[name], dims.get(name), example)
        if reason is not None:
            kept[name] = reason
    return new, kept


def _obstacle(module: nn.Module, to: str) -> str | None:
    """Why a layer stays what it is, in words."""
    kind = type(module).__name__
    if to == "batchnorm" and type(module) in PLAIN:
        return f"it is a {kind} already"
    if type(module) not in (*PLAIN, nn.SyncBatchNorm):
        return f"a {kind} is not PyTorch's own BatchNorm and may do more"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _to_batch_norm(module: Any, dims: int | None, example: Any) -> str | None:
    if dims is None and example is not None:
        return "the example does not reach it with an input that a BatchNorm1d, 2d or 3d takes"
    if dims is None:
        return "nothing before it tells between BatchNorm1d, 2d and 3d: give example=, one batch for the model"
    del module.process_group
    module.__class__ = PLAIN[dims - 1]
    return None


def _to_frozen(module: Any, layer: BatchNorm) -> str | None:
    try:
        affine = scale_shift(layer)
    except BntoolsError as error:
        return str(error)
    like = module.running_var
    # What the layer adds up in: an input in half precision is normalized in float32.
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    scale, shift = (torch.from_numpy(values.copy()).to(like.device, dtype) for values in (affine.scale, affine.shift))
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return f"its scale or shift does not fit {dtype}"
    _strip(module, FrozenAffine)
    module._parameters.clear()
    module.register_buffer("scale", scale)
    module.register_buffer("shift", shift)
    return None


def _to_group_norm(module: Any, groups: int) -> None:
    channels, eps, affine = module.num_features, module.eps, module.affine
    _strip(module, nn.GroupNorm)
    module.num_groups, module.num_channels, module.eps, module.affine = groups, channels, eps, affine


def _strip(module: Any, kind: type[nn.Module]) -> None:
    """Make a module of another kind out of a BN layer, with nothing left of what only BN has."""
    own = vars(module)
    stays = own.pop("train", None)
    if isinstance(stays, StaysInEval):
        module.training = stays.asked
    elif stays is not None:
        own["train"] = stays
    for name in OF_BN:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    for name in SETTINGS:
        own.pop(name, None)
    module.__class__ = kind


def _dims(model: nn.Module, found: Mapping[str, nn.Module], example: Any) -> dict[str, int]:
    """1, 2 or 3 for each layer, as far as the example or the layer before it in definition order tells."""
    if example is not None:
        return _seen_dims(model, found, example)
    names = {module: name for name, module in found.items()}
    dims: dict[str, int] = {}
    last: int | None = None
    for module in model.modules():
        if isinstance(module, _ConvNd):
            last = len(module.kernel_size)
        elif isinstance(module, nn.Linear):
            last = 1
        elif module in names and last is not None:
            dims[names[module]] = last
    return dims


def _seen_dims(model: nn.Module, found: Mapping[str, nn.Module], example: Any) -> dict[str, int]:
    """The dimensions in one forward pass in eval mode: no layer waits for other processes there."""
    dims: dict[str, int] = {}

    def seeing(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            dims[name] = max(1, args[0].dim() - 2)

        return see

    handles = [module.register_forward_pre_hook(seeing(name)) for name, module in found.items()]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with eval_mode(model):
            call(model, example)
    except Exception as error:
        raise BntoolsError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for buffer, values in before:
            buffer.copy_(values)
    return {name: number for name, number in dims.items() if number <= len(PLAIN)}
