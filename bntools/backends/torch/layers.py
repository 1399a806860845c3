"""BN layers of an nn.Module: which modules they are, their records, and writing statistics back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bntools.backends.torch.measuring import stays
from bntools.errors import BntoolsError
from bntools.layer import SMALL_SHARE, BatchNorm
from bntools.moments import Moments

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel or torch.compile."""
    *_, own = inside(model)
    return own


def inside(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what each of its wrappers holds, down to the user's own module."""
    yield model
    inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        yield from inside(inner)


def parts(model: nn.Module) -> set[Hashable]:
    """What only one thread may work on at a time: the module and all inside it, whose mode and layers are switched."""
    return set(map(id, unwrap(model).modules()))


def modules(model: nn.Module) -> dict[str, Any]:
    """Every BN layer of the model by name, in definition order; a shared one under its first name."""
    named = dict(unwrap(model).named_modules())
    for name, module in named.items():
        if isinstance(module, torch.jit.ScriptModule) and (not name or hasattr(module, "running_mean")):
            raise BntoolsError(
                f"found a TorchScript module{name and f' ({name})'}: its layers run outside Python. "
                f"Use the nn.Module it was made from"
            )
    return {_clean(name): module for name, module in named.items() if is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BN layer, or a frozen or instance variant that keeps running statistics.

    Besides PyTorch's own, that is every module with two buffers ``running_mean`` and ``running_var``
    of one shape (features,): the FrozenBatchNorm of torchvision, detectron2 and timm, and others.
    """
    if isinstance(module, _InstanceNorm):
        return bool(module.track_running_stats)
    if isinstance(module, _NormBase):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False  # keeps its buffers in C++
    mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    return mean is not None and var is not None and mean.ndim == 1 and mean.shape == var.shape


def layers(model: nn.Module) -> list[BatchNorm]:
    """The records of all BN layers, in definition order."""
    return [_record(name, module) for name, module in modules(model).items()]


def write(model: nn.Module, statistics: Mapping[str, tuple[Any, Any, int | None]]) -> None:
    """Store (mean, var, updates) per layer name, in place; ``updates=None`` leaves the counter.

    Raises BntoolsError, before anything is written, where a value does not fit the layer's dtype. Values that are
    still on a device are written as they are: to look at them would wait for it.
    """
    new = [(name, _named(model, name), *values) for name, values in statistics.items()]
    for name, module, mean, var, _ in new:
        if not (isinstance(mean, torch.Tensor) and stays(mean.device)):
            check_fits(name, module.running_mean, mean, "mean")
            check_fits(name, module.running_var, var, "variance")
    for _, module, mean, var, updates in new:
        _store(module, mean, var, updates)


def stored(model: nn.Module, names: Iterable[str]) -> dict[str, Moments]:
    """The statistics of layers as moments of one value, on the device if moments stay there; of no others."""
    found = {name: _named(model, name) for name in names}
    return {
        name: Moments(
            1, *(values.detach().to(torch.float64, copy=True) for values in (of.running_mean, of.running_var))
        )
        for name, of in found.items()
        if stays(of.running_mean.device)
    }


def _named(model: nn.Module, name: str) -> Any:
    try:
        return unwrap(model).get_submodule(name)
    except AttributeError:  # behind a compiled module, whose part of the name is left out
        return modules(model)[name]


def stats_frozen(module: nn.Module) -> bool:
    """Whether training cannot move the statistics, whatever ``model.train()`` says."""
    stays = isinstance(vars(module).get("train"), StaysInEval) and not module.training
    return stays or not has_train_mode(module)


class StaysInEval:
    """Stands in for one module's ``train`` method: the module stays in eval mode.

    An ordinary object with an ordinary reference to its module, so that a frozen model copies and
    pickles. ``asked`` is the mode the module would be in without it, ``holders`` how many freezes
    are to be undone before it is in that mode again. Children of the layer (the
    dropout in timm's BatchNormAct2d) follow the model as before.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.asked = module.training
        self.holders = 1

    def __call__(self, mode: bool = True) -> nn.Module:
        """What ``module.train(mode)`` does now."""
        self.asked = mode
        self.module.training = False  # a wrapper such as torch.compile's sets the flag itself
        for child in self.module.children():
            child.train(mode)
        return self.module


def affine_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Scale and shift, as far as they are parameters; what children of the layer own is not BN's."""
    found = (module._parameters.get(name) for name in ("weight", "bias"))
    return [parameter for parameter in found if parameter is not None]


def _record(name: str, module: Any) -> BatchNorm:
    mean, var, scale, shift = (getattr(module, key, None) for key in ("running_mean", "running_var", "weight", "bias"))
    momentum, updates = getattr(module, "momentum", None), _updates(module)
    return BatchNorm(
        name=name,
        kind=type(module).__name__,
        features=_features(module),
        axis=1,
        eps=float(getattr(module, "eps", 0.0)),
        momentum=momentum,
        mean=_array(mean),
        var=_array(var),
        scale=_array(scale),
        shift=_array(shift),
        updates=updates,
        stats_frozen=stats_frozen(module),
        affine_frozen=not any(parameter.requires_grad for parameter in affine_parameters(module)),
        initial_share=_initial_share(momentum, updates),
        forgets_after=math.ceil(math.log(SMALL_SHARE) / math.log1p(-momentum)) if momentum and momentum < 1 else 0,
        dtype="none" if mean is None else str(mean.dtype).removeprefix("torch."),
        pooled=not isinstance(module, _InstanceNorm),
        remarks=tuple(_remarks(module, momentum)),
    )


def _remarks(module: Any, momentum: float | None) -> Iterator[str]:
    if _is_lazy(module):
        yield "not initialized yet: run one batch through the model first"
    if not hasattr(module, "momentum") or stats_frozen(module) or getattr(module, "running_mean", None) is None:
        return
    if not getattr(module, "track_running_stats", True):
        yield "track_running_stats was switched off: training leaves the statistics alone, eval mode uses them"
    elif momentum is None:
        yield "momentum None: a cumulative average over all updates since the last reset"
    elif momentum == 0:
        yield "momentum 0: training never moves the statistics"
    elif momentum == 1:
        yield "momentum 1: the statistics are those of the last batch alone"


def _initial_share(momentum: float | None, updates: int | None) -> float | None:
    """PyTorch's momentum is the weight of the new value, so (1 - momentum) ** updates is left."""
    if updates is None or updates < 0 or (not momentum and updates == 0) or momentum == 0:
        return None
    return 0.0 if momentum is None else (1 - momentum) ** updates


def _updates(module: Any) -> int | None:
    counter = getattr(module, "num_batches_tracked", None)
    return int(counter) if counter is not None else None


def _features(module: Any) -> int:
    if hasattr(module, "num_features"):
        return int(module.num_features)
    return module.running_mean.numel()


def _array(tensor: Any) -> np.ndarray | None:
    if tensor is None or is_lazy(tensor):
        return None
    return tensor.detach().to("cpu", torch.float64, copy=True).numpy()


def _is_lazy(module: nn.Module) -> bool:
    own: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    return any(is_lazy(tensor) for tensor in own)


def has_train_mode(module: nn.Module) -> bool:
    """The Frozen variants of the libraries keep everything in buffers and know no train mode."""
    return isinstance(module, _NormBase) or bool(module._parameters)


def check_fits(name: str, stored: torch.Tensor, values: Any, what: str) -> None:
    """Raise BntoolsError where values are too large for the dtype in which a layer stores them."""
    new = torch.as_tensor(values)
    if (lost := new.isfinite() & ~new.to(stored.dtype).isfinite()).any():
        raise BntoolsError(
            f"layer {name!r}: a {what} of {float(new[lost][0]):g} does not fit the {stored.dtype} in which the layer "
            f"stores its statistics; keep them in float32 (layer.running_mean, layer.running_var) and try again"
        )


@torch.no_grad()
def _store(module: Any, mean: Any, var: Any, updates: int | None) -> None:
    module.running_mean.copy_(torch.as_tensor(mean))
    module.running_var.copy_(torch.as_tensor(var))
    if updates is not None and getattr(module, "num_batches_tracked", None) is not None:
        module.num_batches_tracked.fill_(updates)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
