"""How a scale and shift gets past an operation, in either direction.

Two questions are answered for each operation ``y = f(x)``. Backward: which affine on the inputs gives the
wanted affine on the output? Forward: if the input is an affine of what it should be, which affine is the
output? Where there is no answer, Refused says why. A scale and shift is an array against the whole shape of
its value, so that views, permutations and concatenation are the same operation on the array.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from bntools.affine import Affine
from bntools.errors import BntoolsError
from bntools.graph import Add, Concat, Graph, Identity, Node, Pad, Permute, Pool, Reduce, Reshape, Resize, Scale, Slice

Shape = tuple[int, ...]


class Refused(BntoolsError):
    """A fold that would not be exact; the message is the reason."""


def backward(graph: Graph, node: Node, wanted: Affine) -> list[tuple[int, Affine]]:
    """The affine on each input of a node that gives ``wanted`` on its (first) output."""
    op, value = node.op, node.inputs[0] if node.inputs else -1
    match op:
        case Identity():
            return [(value, wanted)]
        case Scale(factor):
            return [(value, Affine(wanted.scale, _divided(wanted.shift, factor, node.label)))]
        case Reshape():
            return [(value, reshaped(wanted, graph.shapes[node.outputs[0]], graph.shapes[value]))]
        case Permute(order):
            return [(value, wanted.map(lambda array: array.transpose(np.argsort(order))))]
        case Pool() | Resize() | Pad():
            _check_windows(graph, node, wanted)
            return [(value, wanted)]
        case Reduce(_, axes, keepdim):
            if not keepdim:
                wanted = wanted.map(lambda array: np.expand_dims(array, axes))
            _check_windows(graph, node, wanted)
            return [(value, wanted)]
        case Concat(axis):
            ends = np.cumsum([graph.shapes[value][axis] for value in node.inputs])
            return [(v, _cut(wanted, axis, part)) for v, part in zip(node.inputs, _ranges(ends), strict=True)]
        case Add():
            if any(graph.shapes[value] != graph.shapes[node.outputs[0]] for value in node.inputs):
                raise Refused(f"{node.label} broadcasts one of its terms")
            rest = Affine(wanted.scale, np.zeros_like(wanted.shift))
            return [(value, rest if i else wanted) for i, value in enumerate(node.inputs)]
    raise Refused(f"{node.label} stands in the way")


def forward(graph: Graph, node: Node, given: Mapping[int, Affine]) -> Affine:
    """The affine on the (first) output of a node that comes from those ``given`` on some of its inputs."""
    if isinstance(node.op, Concat):
        return _joined(graph, node, node.op.axis, given)
    value = node.inputs[0]
    if [v for v in node.inputs if v in given] != [value]:
        raise Refused(f"{node.label} reads it")
    affine = given[value]
    match node.op:
        case Identity():
            return affine
        case Scale(factor):
            return Affine(affine.scale, _compressed(affine.shift * factor))
        case Reshape():
            return reshaped(affine, graph.shapes[value], graph.shapes[node.outputs[0]])
        case Permute(order):
            return affine.map(lambda array: array.transpose(order))
        case Pool() | Resize() | Pad():
            _check_windows(graph, node, affine)
            return affine
        case Reduce(_, axes, keepdim):
            _check_windows(graph, node, affine)
            return affine if keepdim else affine.map(lambda array: np.squeeze(array, axes))
        case Slice(axis, start, stop, step):
            return _cut(affine, axis, slice(start, stop, step))
    raise Refused(f"{node.label} reads it")


def reshaped(affine: Affine, before: Shape, after: Shape) -> Affine:
    """The same values against the elements in another shape; constant axes are made short again.

    Only those blocks of axes are written out along which the affine varies.
    """
    blocks = _blocks(before, after)

    def change(array: np.ndarray) -> np.ndarray:
        varies = [any(n > 1 for n in array.shape[i]) for i, _ in blocks]
        full = [n if v else 1 for (i, _), v in zip(blocks, varies, strict=True) for n in before[i]]
        result = [n if v else 1 for (_, j), v in zip(blocks, varies, strict=True) for n in after[j]]
        return _compressed(np.broadcast_to(array, full).reshape(result))

    return affine.map(change)


def along(affine: Affine, shape: Shape, axis: int, label: str) -> Affine:
    """The affine as one scale and shift per channel, for an operation with channels on ``axis``."""

    def change(array: np.ndarray) -> np.ndarray:
        others = [i for i, n in enumerate(array.shape) if n > 1 and i != axis]
        if others:
            raise Refused(f"{label} has its channels on axis {axis}, the layer on axis {others[0]}")
        return np.broadcast_to(array.reshape(-1), (shape[axis],))

    return affine.map(change)


def _check_windows(graph: Graph, node: Node, affine: Affine) -> None:
    """Pooling, resizing and padding keep an affine that is constant within each of their windows."""
    op, label = node.op, node.label
    assert isinstance(op, Pool | Reduce | Resize | Pad)
    if any(array.shape[axis] > 1 for array in (affine.scale, affine.shift) for axis in op.axes):
        raise Refused(f"{label} mixes channels")
    if isinstance(op, Pool | Reduce) and op.kind == "max":
        if (affine.scale < 0).any():
            channel = int(np.argmin(affine.scale))
            worst = affine.scale.flat[channel]
            raise Refused(f"{label} needs a scale that is not negative, and channel {channel} has {worst:.3g}")
        if any(graph.is_used(value) for value in node.outputs[1:]):
            raise Refused(f"the indices of {label} are used")
    if isinstance(op, Pool) and op.partial and affine.shift.any():
        raise Refused(f"{label} counts the zeros of its padding, which a shift would change")
    if isinstance(op, Pad) and op.value is not None:
        with np.errstate(invalid="ignore"):
            if not np.all(affine.scale * op.value + affine.shift == op.value):
                raise Refused(f"{label} pads with {op.value:g}, which the layer would change")


def _blocks(before: Shape, after: Shape) -> list[tuple[slice, slice]]:
    """The shortest runs of axes of both shapes that hold the same elements."""
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        start, left, right = (i, j), 1, 1
        while left != right or (i, j) == start:
            if i < len(before) and (left <= right or j == len(after)):
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        blocks.append((slice(start[0], i), slice(start[1], j)))
    return blocks


def _compressed(array: np.ndarray) -> np.ndarray:
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def _divided(shift: np.ndarray, factor: np.ndarray, label: str) -> np.ndarray:
    """What has to be added before a multiplication so that ``shift`` is added behind it."""
    if np.any((shift != 0) & (factor == 0)):
        raise Refused(f"{label} multiplies with 0, behind which a shift has no counterpart")
    return _compressed(shift / np.where(factor == 0, 1.0, factor))


def _ranges(ends: np.ndarray) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _cut(affine: Affine, axis: int, part: slice) -> Affine:
    where = (slice(None),) * axis + (part,)
    return affine.map(lambda array: array if array.shape[axis] == 1 else array[where])


def _joined(graph: Graph, node: Node, axis: int, given: Mapping[int, Affine]) -> Affine:
    """The affine of a concatenation, of which some parts have one and the others are as they should be."""

    def change(kind: Literal["scale", "shift"], neutral: float) -> np.ndarray:
        arrays = [getattr(given[value], kind) if value in given else None for value in node.inputs]
        shape = list(np.broadcast_shapes(*[_but(array.shape, axis) for array in arrays if array is not None]))
        parts = []
        for value, array in zip(node.inputs, arrays, strict=True):
            shape[axis] = graph.shapes[value][axis]
            parts.append(np.full(shape, neutral) if array is None else np.broadcast_to(array, shape))
        return _compressed(np.concatenate(parts, axis=axis))

    return Affine(change("scale", 1.0), change("shift", 0.0))


def _but(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], 1, *shape[axis + 1 :])
