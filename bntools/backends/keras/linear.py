"""Keras layers with a stored weight: convolutions of every kind and dense layers, as linear operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from bntools.backends.keras.meaning import Called, Part
from bntools.graph import Linear, Other

WEIGHTS = ("kernel", "depthwise_kernel", "pointwise_kernel", "bias")
_UNEVEN = "gives its outputs from different numbers of inputs"


def linear_parts(called: Called) -> list[Part] | None:
    """What a layer with a stored weight does, its own activation last; None for any other and for odd ranks."""
    describe = _KINDS.get(called.kind)
    parts = None if describe is None else describe(called)
    return None if parts is None else [*parts, *activation_parts(called)]


def activation_parts(called: Called) -> list[Part]:
    """The activation that a layer applies itself, if it is not the identity."""
    function = getattr(called.layer, "activation", None)
    if is_linear(function):
        return []
    return [Part(Other(), called.result, f"{function_name(function)} inside {called.label}")]


def is_linear(function: Any) -> bool:
    """Whether an activation gives what it gets."""
    return function is None or function is keras.activations.linear


def function_name(function: Any) -> str:
    """What an activation is called."""
    return str(getattr(function, "__name__", type(function).__name__))


@dataclass(frozen=True)
class _Windows:
    """How a convolution moves over its input: where channels lie, and why a shift would not reach all outputs."""

    axis: int
    leak: str


def _windows(called: Called) -> _Windows | None:
    layer, rank = called.layer, called.layer.rank
    if len(called.source) != rank + 2:
        return None
    first = layer.data_format == "channels_first"
    spatial = range(2, rank + 2) if first else range(1, rank + 1)
    return _Windows(1 if first else rank + 1, "pads with zeros" if _pads(called, spatial) else "")


def _pads(called: Called, spatial: range) -> bool:
    """Whether zeros get in anywhere; with ``padding="same"`` the sizes decide, and unknown ones may do the worst."""
    layer = called.layer
    if layer.padding == "valid":
        return False
    steps = zip(spatial, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for axis, taps, stride, dilation in steps:
        reach = (taps - 1) * dilation + 1
        size = called.source[axis]
        if layer.padding == "causal" or called.symbolic[axis] is None:
            if reach > 1:
                return True
        elif (math.ceil(size / stride) - 1) * stride + reach > size:
            return True
    return False


def _linear(
    called: Called, weight: str, axes: tuple[int, int], groups: int, channels: tuple[int, int], leak: str
) -> Linear:
    """A linear operation with ``axes`` (output, input) of the weight and channel axes (of x, of y)."""
    bias = None if weight == "depthwise_kernel" else called.slot("bias")
    return Linear(called.slot(weight), bias, *axes, groups, *channels, called.locked, leak)


def _convolution(called: Called) -> list[Part] | None:
    if (windows := _windows(called)) is None:
        return None
    rank, axis = called.layer.rank, windows.axis
    op = _linear(called, "kernel", (rank + 1, rank), called.layer.groups, (axis, axis), windows.leak)
    return [Part(op, called.result)]


def _depthwise(called: Called) -> list[Part] | None:
    """The kernel is (..., channels, multiplier): as of a transposed convolution, groups split its output axis."""
    if (windows := _windows(called)) is None:
        return None
    rank, axis = called.layer.rank, windows.axis
    op = _linear(called, "kernel", (rank + 1, rank), called.source[axis], (axis, axis), windows.leak)
    return [Part(op, called.result)]


def _separable(called: Called) -> list[Part] | None:
    """A depthwise convolution without a bias, then one with kernels of one tap."""
    if (windows := _windows(called)) is None:
        return None
    rank, axis = called.layer.rank, windows.axis
    channels = called.source[axis]
    axes, between = (rank + 1, rank), list(called.result)
    between[axis] = channels * called.layer.depth_multiplier
    depthwise = _linear(called, "depthwise_kernel", axes, channels, (axis, axis), windows.leak)
    pointwise = _linear(called, "pointwise_kernel", axes, 1, (axis, axis), "")
    return [Part(depthwise, tuple(between), f"the depthwise part of {called.label}"), Part(pointwise, called.result)]


def _transposed(called: Called) -> list[Part] | None:
    if (windows := _windows(called)) is None:
        return None
    layer = called.layer
    rank, axis = layer.rank, windows.axis
    even = all(size == 1 for size in (*layer.kernel_size, *layer.strides)) and not layer.output_padding
    op = _linear(called, "kernel", (rank, rank + 1), 1, (axis, axis), "" if even else _UNEVEN)
    return [Part(op, called.result)]


def _dense(called: Called) -> list[Part] | None:
    if len(called.source) < 2:
        return None
    last = len(called.source) - 1
    return [Part(_linear(called, "kernel", (1, 0), 1, (last, last), ""), called.result)]


def _einsum(called: Called) -> list[Part] | None:
    """An equation that contracts one axis of the input with a matrix; its bias, if any, lies along the last axis."""
    layer = called.layer
    given, result = layer.equation.replace(" ", "").split("->")
    source, weight = given.split(",")
    rest = "".join(chr(ord("0") + i) for i in range(len(called.source) - len(source.replace("...", ""))))
    source, result = source.replace("...", rest), result.replace("...", rest)
    if len(weight) != 2 or "." in weight or len(set(source)) != len(source) or len(source) != len(called.source):
        return None
    shared, new = set(weight) & set(source), set(weight) - set(source)
    if len(shared) != 1 or len(new) != 1 or set(result) != (set(source) - shared) | new:
        return None
    (into,), (out,) = shared, new
    if layer.bias_axes not in (None, out) or not result.endswith(out):
        return None
    axes, channels = (weight.index(out), weight.index(into)), (source.index(into), result.index(out))
    return [Part(_linear(called, "kernel", axes, 1, channels, ""), called.result)]


_Describe = Callable[[Called], list[Part] | None]
_KINDS: dict[str, _Describe] = {
    **{f"Conv{n}D": _convolution for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": _transposed for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": _depthwise for n in (1, 2)},
    **{f"SeparableConv{n}D": _separable for n in (1, 2)},
    "Dense": _dense,
    "EinsumDense": _einsum,
}
