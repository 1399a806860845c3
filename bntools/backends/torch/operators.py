"""What an ATen operation means for folding: the neutral operation for each call that has one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from bntools.backends.torch.linear import CONVOLUTIONS, DENSE
from bntools.graph import Add, Concat, Identity, Op, Pad, Permute, Pool, Reduce, Reshape, Resize, Slice

Given = Mapping[str, Any]


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


RESHAPES = _names(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias ravel"
)
PERMUTES = _names("permute transpose t movedim moveaxis swapaxes swapdims numpy_T mT matrix_H adjoint")
COPIES = _names(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout contiguous clone detach "
    "alias to _to_copy lift_fresh lift_fresh_copy positive type_as"
)
SPLITS = _names("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk narrow slice")
NORMS = _names(
    "batch_norm instance_norm native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm _batch_norm_no_update"
)
_POOLS = re.compile(r"(adaptive_)?(avg|max)_pool(1|2|3)d(_with_indices)?$|_adaptive_avg_pool(2|3)d$")
_RESIZES = re.compile(r"_?upsample_\w+$")
_PADS = re.compile(r"(reflection|replication)_pad(1|2|3)d$|pad$|constant_pad_nd$|_pad_circular$")
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def base_name(func: Any) -> str:
    """The operation's own name: without overload and in-place mark ("relu" for aten.relu_.default)."""
    name = func.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_known(name: str) -> bool:
    """Whether the operation is understood as it is, so that it need not be taken apart."""
    known = RESHAPES | PERMUTES | COPIES | SPLITS | NORMS | CONVOLUTIONS | DENSE
    known |= {"cat", "concat", "concatenate", "mean", "amax", "add"}
    return name in known or any(pattern.match(name) for pattern in (_POOLS, _RESIZES, _PADS))


def given_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
    return given | dict(kwargs)


def reads(name: str) -> int | None:
    """How many of an operation's tensors it reads; None for all. The others only lend shape or dtype."""
    return 1 if name in RESHAPES or name in COPIES else None


def written(func: Any) -> list[str]:
    """The names of the arguments that an operation writes to."""
    return [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def transparent(
    func: Any, given: Given, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> list[Op] | None:
    """The operations that give each output from the tensors among the inputs, or None for any other call.

    One operation stands for all outputs, except where a tensor is split: then there is one for each.
    """
    name = base_name(func)
    if not inputs or not outputs or any(not t.is_floating_point() for t in (inputs[0], outputs[0])):
        return None
    source, result = inputs[0], outputs[0]
    if name in COPIES:
        return [Identity()] if source.shape == result.shape and given.get("train", False) is False else None
    if name in RESHAPES:
        # view(dtype) reads the same bits as other numbers.
        return [Reshape()] if source.numel() == result.numel() and source.dtype == result.dtype else None
    if name in PERMUTES:
        return [Permute(order_of(func, given, source.ndim))]
    if name in SPLITS:
        return _slices(name, given, source, outputs)
    if name in ("cat", "concat", "concatenate"):
        return [Concat(given["dim"] % result.ndim)] if all(t.ndim == result.ndim for t in inputs) else None
    if name in ("mean", "amax"):
        return _reduction(name, given, source)
    if name == "add" and len(inputs) == 2 and given.get("alpha", 1) == 1:
        return [Add()]
    return _windows(name, given, source)


def order_of(func: Any, given: Given, ndim: int) -> tuple[int, ...]:
    """How an operation orders the axes of a tensor, found by showing it one with telling lengths."""
    shape = _PRIMES[:ndim]
    first = func._schema.arguments[0].name
    probe = torch.empty(shape, device="meta")
    return tuple(shape.index(n) for n in func(**{**given, first: probe}).shape)


def _slices(name: str, given: Given, source: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[Op] | None:
    axis = given["dim"] % source.ndim
    if isinstance(given.get("start"), torch.Tensor):
        return None
    size = source.shape[axis]
    if name == "slice":
        return [Slice(axis, *slice(given.get("start"), given.get("end"), given["step"]).indices(size))]
    start = int(given["start"]) if name == "narrow" else 0
    start += size if start < 0 else 0
    found: list[Op] = []
    for output in outputs:
        found.append(Slice(axis, start, start + output.shape[axis]))
        start += output.shape[axis]
    return found


def _reduction(name: str, given: Given, source: torch.Tensor) -> list[Op]:
    axes = given.get("dim")
    axes = [axes] if isinstance(axes, int) else axes or range(source.ndim)
    axes = tuple(sorted(axis % source.ndim for axis in axes))
    return [Reduce("average" if name == "mean" else "max", axes, bool(given.get("keepdim")))]


def _windows(name: str, given: Given, source: torch.Tensor) -> list[Op] | None:
    """Pooling, resizing and padding: what works on the last axes."""
    if match := _POOLS.match(name):
        axes = _last(source, int(match[3] or match[5]))
        kind: Literal["average", "max"] = "max" if "max" in name else "average"
        counted = given.get("divisor_override") is not None
        counted |= bool(given.get("count_include_pad", True)) and any(_list(given.get("padding", 0)))
        return [Pool(kind, axes, partial=kind == "average" and counted)]
    if _RESIZES.match(name):
        return [Resize(_last(source, source.ndim - 2))]
    if _PADS.match(name):
        widths = given.get("pad", given.get("padding"))
        assert widths is not None
        axes = tuple(source.ndim - 1 - i for i in range(len(widths) // 2) if widths[2 * i] or widths[2 * i + 1])
        constant = name == "constant_pad_nd" or given.get("mode") == "constant"
        return [Pad(axes, float(given.get("value") or 0) if constant else None)]
    return None


def _last(source: torch.Tensor, count: int) -> tuple[int, ...]:
    return tuple(range(source.ndim - count, source.ndim))


def _list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
