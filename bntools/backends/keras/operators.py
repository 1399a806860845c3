"""Keras layers that let a scale and shift pass: pooling, padding, reshaping, merging, and what is idle in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import keras
import numpy as np

from bntools.backends.keras.linear import function_name, is_linear
from bntools.backends.keras.meaning import Called, Part
from bntools.graph import Add, Concat, Identity, Op, Other, Pad, Permute, Pool, Reduce, Reshape, Resize, Scale, Slice

IDLE = "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise AlphaDropout"
IDLE += " ActivityRegularization Identity"
# Interpolations whose weights sum to 1.
SMOOTH = ("nearest", "bilinear", "bicubic")
MERGES = ("Add", "Concatenate")


def layer_parts(called: Called) -> list[Part] | None:
    """What a layer of keras.layers without weights does, in neutral operations; None if nothing gets past it."""
    describe = _KINDS.get(called.kind)
    return None if describe is None else describe(called)


def chain(called: Called, *ops: Op) -> list[Part]:
    """One operation, or several of which each keeps the shape, up to the call's result."""
    return [Part(op, called.result) for op in ops]


def spatial_axes(called: Called) -> tuple[int, ...]:
    """All axes but those of samples and channels."""
    rank = len(called.source)
    layout = getattr(called.layer, "data_format", "channels_last") or keras.config.image_data_format()
    return tuple(range(2, rank) if layout == "channels_first" else range(1, rank - 1))


def _idle(called: Called) -> list[Part]:
    return chain(called, Identity())


def _activation(called: Called) -> list[Part]:
    function = called.layer.activation
    if is_linear(function):
        return chain(called, Identity())
    return [Part(Other(), called.result, f"{called.label} ({function_name(function)})")]


def _kind(called: Called) -> Literal["average", "max"]:
    return "max" if "Max" in called.kind else "average"


def _pool(called: Called) -> list[Part]:
    """Keras leaves what it pads out of an average: all of its back ends do."""
    return chain(called, Pool(_kind(called), spatial_axes(called)))


def _global(called: Called) -> list[Part]:
    return chain(called, Reduce(_kind(called), spatial_axes(called), bool(called.layer.keepdims)))


def _flatten(called: Called) -> list[Part]:
    rank = len(called.source)
    if called.layer.data_format != "channels_first" or rank < 3:
        return chain(called, Reshape())
    order = (0, *range(2, rank), 1)
    moved = tuple(called.source[axis] for axis in order)
    return [Part(Permute(order), moved), Part(Reshape(), called.result)]


def _reshape(called: Called) -> list[Part]:
    return chain(called, Reshape())


def _permute(called: Called) -> list[Part]:
    return chain(called, Permute((0, *called.layer.dims)))


def _padding(called: Called) -> list[Part]:
    widths = _pairs(called.layer.padding)
    axes = tuple(axis for axis, width in zip(spatial_axes(called), widths, strict=True) if any(width))
    return chain(called, Pad(axes, 0.0))


def _cropping(called: Called) -> list[Part]:
    parts, shape = [], list(called.source)
    for axis, (before, after) in zip(spatial_axes(called), _pairs(called.layer.cropping), strict=True):
        op = Slice(axis, before, shape[axis] - after)
        shape[axis] -= before + after
        parts.append(Part(op, tuple(shape)))
    return parts


def _pairs(widths: tuple) -> list[tuple[int, int]]:
    """One pair for each axis; layers of one axis have the pair alone."""
    return [widths] if isinstance(widths[0], int) else list(widths)


def _up_sampling(called: Called) -> list[Part] | None:
    if getattr(called.layer, "interpolation", "nearest") not in SMOOTH:
        return None
    return chain(called, Resize(spatial_axes(called)))


def _resizing(called: Called) -> list[Part] | None:
    layer = called.layer
    if layer.interpolation not in SMOOTH or getattr(layer, "pad_to_aspect_ratio", False) or len(called.source) != 4:
        return None
    return chain(called, Resize(spatial_axes(called)))


def _concatenate(called: Called) -> list[Part]:
    return chain(called, Concat(called.layer.axis % len(called.result)))


def _add(called: Called) -> list[Part]:
    return chain(called, Add())


def _rescaling(called: Called) -> list[Part] | None:
    factor = np.asarray(called.layer.scale, dtype=np.float64)
    if np.any(called.layer.offset) or factor.ndim or not np.isfinite(factor):
        return None
    return chain(called, Scale(factor.reshape((1,) * len(called.source))))


_Describe = Callable[[Called], list[Part] | None]
_N = (1, 2, 3)
_KINDS: dict[str, _Describe] = {
    **dict.fromkeys(IDLE.split(), _idle),
    **dict.fromkeys([f"{kind}Pooling{n}D" for kind in ("Max", "Average") for n in _N], _pool),
    **dict.fromkeys([f"Adaptive{kind}Pooling{n}D" for kind in ("Max", "Average") for n in _N], _pool),
    **dict.fromkeys([f"Global{kind}Pooling{n}D" for kind in ("Max", "Average") for n in _N], _global),
    **dict.fromkeys([f"ZeroPadding{n}D" for n in _N], _padding),
    **dict.fromkeys([f"Cropping{n}D" for n in _N], _cropping),
    **dict.fromkeys([f"UpSampling{n}D" for n in _N], _up_sampling),
    "Activation": _activation,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "Resizing": _resizing,
    "Concatenate": _concatenate,
    "Add": _add,
    "Rescaling": _rescaling,
}
