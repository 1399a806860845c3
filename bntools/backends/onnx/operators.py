"""What an ONNX operator means for folding: the neutral operation for each node that has one."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import onnx

from bntools.backends.onnx.layers import attribute
from bntools.backends.onnx.view import View
from bntools.graph import Add, Concat, Identity, Op, Pad, Permute, Pool, Reduce, Reshape, Resize, Scale, Slice

RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
# These read how large a value is, not what it holds.
SIZES = ("Shape", "Size")
MOST = 1 << 20  # elements of a constant factor; a larger one is data
_EXTRAPOLATED = (b"tf_crop_and_resize",)  # makes up values outside of the input


def transparent(node: onnx.NodeProto, view: View) -> list[Op] | None:
    """The operations that give each output from the first input (Concat, Add: from all), None for any other node.

    One operation stands for the first output, except where a tensor is split: then there is one for each.
    Raises KeyError where the shape or a parameter that it takes is unknown.
    """
    name = node.op_type
    if name in RESHAPES:
        return [Reshape()]
    if name == "Transpose":
        rank = len(view.shape(node.input[0]))
        return [Permute(tuple(attribute(node, "perm", range(rank)[::-1])))]
    if name == "Concat":
        return [Concat(int(attribute(node, "axis", 1)) % len(view.shape(node.output[0])))]
    if name in ("Add", "Sum"):
        return [Add()] if attribute(node, "broadcast", None) is None else None
    if name in ("Mul", "Div"):
        return _scaling(node, view)
    if name in ("Identity", "Dropout", "Cast"):
        return [Identity()] if _is_copy(node, view) else None
    if name in ("Slice", "Split"):
        return _slices(node, view)
    return _windows(node, view)


def swapped(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node of two inputs with these in the other order."""
    return onnx.helper.make_node(node.op_type, [*node.input][::-1], node.output, name=node.name)


def _scaling(node: onnx.NodeProto, view: View) -> list[Op] | None:
    """The first input times or by a constant."""
    if [view.is_constant(name) for name in node.input] != [False, True]:
        return None
    if view.shape(node.input[0]) != view.shape(node.output[0]):
        return None
    if math.prod(view.shape(node.input[1])) > MOST or not view.is_float(node.output[0]):
        return None
    value = view.document.constant(node.input[1])
    assert value is not None
    with np.errstate(divide="ignore"):
        factor = value.astype(np.float64) if node.op_type == "Mul" else 1 / value.astype(np.float64)
    rank = len(view.shape(node.output[0]))
    return [Scale(factor.reshape((1,) * (rank - factor.ndim) + factor.shape))] if np.isfinite(factor).all() else None


def _is_copy(node: onnx.NodeProto, view: View) -> bool:
    if node.op_type == "Cast":
        return view.is_float(node.input[0]) and view.is_float(node.output[0])
    if node.op_type == "Dropout":
        training = view.parameter(node, 2)
        return training is None or not training.any()
    return True


def _slices(node: onnx.NodeProto, view: View) -> list[Op] | None:
    shape = view.shape(node.input[0])
    if node.op_type == "Split":
        axis = int(attribute(node, "axis", 0)) % len(shape)
        ends = np.cumsum([view.shape(output)[axis] for output in node.output]).tolist()
        return [Slice(axis, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    starts, ends, axes, steps = (_given(node, view, place, what) for place, what in _SLICE)
    if starts is None or ends is None or len(starts) != 1:
        return None
    axis = (axes or [0])[0] % len(shape)
    step = (steps or [1])[0]
    return [Slice(axis, *slice(starts[0], ends[0], step).indices(shape[axis]))] if step > 0 else None


_SLICE = ((1, "starts"), (2, "ends"), (3, "axes"), (4, "steps"))


def _windows(node: onnx.NodeProto, view: View) -> list[Op] | None:
    """Pooling, reducing, resizing and padding: what works along some of the axes."""
    name = node.op_type
    rank = len(view.shape(node.input[0])) if node.input and node.input[0] else 0
    spatial = tuple(range(2, rank))
    kind: Literal["average", "max"] = "max" if "Max" in name else "average"
    if name in ("MaxPool", "AveragePool"):
        return [Pool(kind, spatial, partial=name == "AveragePool" and _counts_padding(node))]
    if name in ("GlobalAveragePool", "GlobalMaxPool"):
        return [Reduce(kind, spatial, True)]
    if name in ("ReduceMean", "ReduceMax"):
        return _reduction(node, view, kind, rank)
    if name in ("Resize", "Upsample"):
        return _resizing(node, view, rank)
    if name == "Pad":
        return _padding(node, view, rank)
    return None


def _counts_padding(node: onnx.NodeProto) -> bool:
    if not attribute(node, "count_include_pad", 0):
        return False
    padded = any(attribute(node, "pads", ())) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return padded or bool(attribute(node, "ceil_mode", 0))


def _reduction(node: onnx.NodeProto, view: View, kind: Literal["average", "max"], rank: int) -> list[Op]:
    axes = _given(node, view, 1, "axes")
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return [Identity()]
        axes = list(range(rank))
    return [Reduce(kind, tuple(sorted(axis % rank for axis in axes)), bool(attribute(node, "keepdims", 1)))]


def _resizing(node: onnx.NodeProto, view: View, rank: int) -> list[Op] | None:
    if attribute(node, "coordinate_transformation_mode", b"") in _EXTRAPOLATED:
        return None
    before, after = view.shape(node.input[0]), view.shape(node.output[0])
    axes = {axis for axis in range(rank) if axis >= 2 or before[axis] != after[axis]}
    # Resize of opset 10 and Upsample have scales in the second place, later ones the region of interest.
    old = node.op_type == "Upsample" or view.document.opset < 11
    scales = view.parameter(node, 1 if old else 2)
    if scales is None:
        scales = np.asarray(attribute(node, "scales", ()))
    named = attribute(node, "axes", range(rank))
    axes |= {axis % rank for axis, scale in zip(named, scales.tolist(), strict=False) if scale != 1}
    return [Resize(tuple(sorted(axes)))]


def _padding(node: onnx.NodeProto, view: View, rank: int) -> list[Op] | None:
    pads = _given(node, view, 1, "pads")
    if pads is None:
        return None
    named = _given(node, view, 3, "") or list(range(rank))
    axes = tuple(axis % rank for i, axis in enumerate(named) if pads[i] or pads[i + len(named)])
    if attribute(node, "mode", b"constant") != b"constant":
        return [Pad(axes, None)]
    value: Any = view.parameter(node, 2)
    if value is None:
        value = attribute(node, "value", 0.0)
    return [Pad(axes, float(np.asarray(value).reshape(-1)[0]))] if np.size(value) else [Pad(axes, 0.0)]


def _given(node: onnx.NodeProto, view: View, place: int, name: str) -> list[int] | None:
    """A list of integers that older opsets have as an attribute and newer ones as an input."""
    value = view.parameter(node, place)
    if value is None:
        value = attribute(node, name, None)
    return None if value is None else [int(one) for one in np.asarray(value).reshape(-1)]
