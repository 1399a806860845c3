"""Functions of keras.ops that stand in a functional model as operations of their own, for folding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from bntools.backends.keras.meaning import Called, Part
from bntools.backends.keras.operators import chain, spatial_axes
from bntools.graph import Add, Concat, Identity, Pad, Permute, Pool, Reduce, Reshape, Scale, Slice

MOST = 1 << 20  # elements of a constant factor; a larger one is data
ORDERED = ("Concatenate", "Add")  # what reads several tensors


def function_kind(operation: Any) -> str:
    """Which function of keras.ops an operation is, by the name of its class; "" for any other."""
    cls = type(operation)
    plain = cls.__module__.startswith("keras.src.ops.") and "call" not in vars(operation)
    return cls.__name__ if plain else ""


def function_parts(called: Called) -> list[Part] | None:
    """What an operation does, in neutral ones; None if nothing gets past it."""
    describe = _KINDS.get(called.kind)
    return None if describe is None else describe(called)


def pieces(called: Called, shapes: list[tuple[int, ...]]) -> list[Slice]:
    """The slices that a split into outputs of these shapes gives, one for each."""
    axis = called.layer.axis % len(called.source)
    ends = np.cumsum([shape[axis] for shape in shapes]).tolist()
    return [Slice(axis, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _add(called: Called) -> list[Part] | None:
    return None if called.arguments else chain(called, Add())


def _scale(called: Called) -> list[Part] | None:
    """The tensor times or by a constant."""
    constants = list(called.arguments.items())
    if len(constants) != 1 or called.source != called.result:
        return None
    name, value = constants[0]
    if isinstance(value, keras.Variable) or (called.kind != "Multiply" and name == "x1"):
        return None
    array = np.asarray(ops.convert_to_numpy(value) if ops.is_tensor(value) else value)
    if array.dtype.kind not in "fiu" or array.size > MOST:
        return None
    with np.errstate(divide="ignore"):
        factor = array.astype(np.float64) if called.kind == "Multiply" else 1 / array.astype(np.float64)
    if not np.isfinite(factor).all():
        return None
    return chain(called, Scale(factor.reshape((1,) * (len(called.source) - factor.ndim) + factor.shape)))


def _concatenate(called: Called) -> list[Part]:
    return chain(called, Concat(called.layer.axis % len(called.result)))


def _reshape(called: Called) -> list[Part]:
    return chain(called, Reshape())


def _order(called: Called) -> list[Part]:
    """An operation that orders axes, found by showing it an array with telling lengths."""
    probe = np.empty([2 + i for i in range(len(called.source))], np.int8)
    shape = ops.convert_to_numpy(called.layer.call(ops.convert_to_tensor(probe))).shape
    return chain(called, Permute(tuple(size - 2 for size in shape)))


def _reduce(called: Called) -> list[Part] | None:
    layer, rank = called.layer, len(called.source)
    if getattr(layer, "initial", None) is not None:
        return None
    axis = layer.axis
    axes = range(rank) if axis is None else [axis] if isinstance(axis, int) else axis
    kind = "average" if called.kind == "Mean" else "max"
    return chain(called, Reduce(kind, tuple(sorted(one % rank for one in axes)), bool(layer.keepdims)))  # type: ignore[arg-type]


def _pad(called: Called) -> list[Part] | None:
    widths = [tuple(pair) for pair in called.layer.pad_width]
    widths = widths * len(called.source) if len(widths) == 1 else widths
    axes = tuple(axis for axis, pair in enumerate(widths) if any(pair))
    if called.layer.mode != "constant":
        return chain(called, Pad(axes, None)) if called.layer.mode in ("reflect", "symmetric", "edge") else None
    value = called.arguments.get("constant_values", 0)
    value = 0 if value is None else value
    return chain(called, Pad(axes, float(value))) if isinstance(value, (int, float)) else None


def _slices(called: Called) -> list[Part] | None:
    """Indexing with slices alone."""
    key = called.arguments.get("key")
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    if keys.count(Ellipsis) == 1:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (len(called.source) - len(keys) + 1)
    if not all(isinstance(one, slice) for one in keys):
        return None
    parts, shape = [], list(called.source)
    for axis, one in enumerate(key for key in keys if isinstance(key, slice)):
        start, stop, step = one.indices(shape[axis])
        if step < 1:
            return None
        if (start, stop, step) != (0, shape[axis], 1):
            shape[axis] = max(0, math.ceil((stop - start) / step))
            parts.append(Part(Slice(axis, start, stop, step), tuple(shape)))
    return parts or chain(called, Identity())


def _copy(called: Called) -> list[Part]:
    return chain(called, Identity())


def _pool(called: Called) -> list[Part]:
    return chain(called, Pool("max" if called.kind == "MaxPool" else "average", spatial_axes(called)))


_KINDS: dict[str, Callable[[Called], list[Part] | None]] = {
    "Add": _add,
    **dict.fromkeys(["Multiply", "Divide", "TrueDivide"], _scale),
    "Concatenate": _concatenate,
    **dict.fromkeys(["Reshape", "Squeeze", "ExpandDims", "Ravel"], _reshape),
    **dict.fromkeys(["Transpose", "Moveaxis", "Swapaxes"], _order),
    **dict.fromkeys(["Mean", "Max", "Amax"], _reduce),
    "Pad": _pad,
    "GetItem": _slices,
    **dict.fromkeys(["Cast", "StopGradient", "Copy"], _copy),
    **dict.fromkeys(["MaxPool", "AveragePool"], _pool),
}
