"""Taking BN layers out of an ONNX model: a new one whose other weights have taken up their scale and shift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bntools.affine import absorb_input, absorb_output
from bntools.backends.onnx.document import Document, opened
from bntools.backends.onnx.draft import Draft
from bntools.backends.onnx.layers import SCALE, SHIFT, attribute, drop_attributes, found
from bntools.backends.onnx.probing import forget
from bntools.backends.onnx.rewiring import insert_after, take_out
from bntools.backends.onnx.view import label, placed
from bntools.errors import BntoolsError
from bntools.graph import Bias, Graph, Linear, Norm
from bntools.legality import Step, Target

SLAB = 1 << 20  # elements of a weight that are computed at a time, in float64: what fits the cache


def absorb(model: Any, graph: Graph, steps: Sequence[Step]) -> Document:
    """A new document in which these steps are made; the model stays as it is.

    Each layer's node goes, and the graph's outputs keep their names. Weights are computed in float64 and cast once; a
    bias is added where one is missing; a weight that nodes share is parted where not all of them need the same.
    External weights stay external, in files of the document's own.

    Raises BntoolsError where a weight does not fit the dtype in which the model stores it, or cannot be read.
    """
    document = opened(model)
    forget(document)
    draft = Draft(document)
    gone = {step.layer for step in steps}
    outputs = {one.name: one.node.output[0] for one in found(draft.source) if not one.inside}
    changes: dict[Linear | Norm | Bias, list[Target]] = {}
    for step in steps:
        for target in step.targets:
            changes.setdefault(target.op, []).append(target)
    for op, targets in changes.items():
        match op:
            case Linear():
                _change_linear(draft, op, targets)
            case Bias():
                _change_bias(draft, op, targets)
            case Norm(layer) if layer not in gone:
                _change_norm(draft, draft.nodes[outputs[layer]], targets)
    take_out(draft.proto.graph, {outputs[layer] for layer in gone})
    return draft.finish()


@dataclass(frozen=True, eq=False)
class _Slab:
    """A part of a weight whose outputs depend on nothing else: where it lies, its output and input channels."""

    where: tuple[slice, ...]
    outs: slice
    ins: slice
    groups: int


def _change_linear(draft: Draft, op: Linear, targets: list[Target]) -> None:
    output, place = placed(op.weight)
    node = draft.nodes[output]
    weight = draft.read(node, place)
    assert weight is not None
    assert op.bias is not None
    maker, bias_place = placed(op.bias)
    holder = draft.nodes[maker]
    on_left = node.op_type in ("MatMul", "Gemm") and place == 0
    missing = holder is node and node.op_type == "MatMul"
    stored = None if missing else draft.read(holder, bias_place)
    # Gemm multiplies by alpha and beta: that goes into the weights.
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    old = None if stored is None else _channels_last(stored.astype(np.float64) * beta, on_left)
    weight, bias = _absorbed(weight, alpha, old, op, targets, label(node))
    stem = node.input[place].removesuffix("weight").rstrip("._") or node.name or node.output[0]
    draft.put(node, place, weight)
    if node.op_type == "Gemm":
        drop_attributes(node, "alpha", "beta")
    if bias is None or (stored is None and not bias.any()):
        return
    bias = np.moveaxis(np.atleast_2d(bias), -1, -2) if on_left else bias
    new = _cast(bias, weight.dtype, f"{label(node)}: a bias")
    if missing:
        _add_bias(draft, node, new, f"{stem}.bias")
    elif stored is None or not np.array_equal(new, stored):
        draft.put(holder, bias_place, new, f"{stem}.bias")


def _channels_last(bias: np.ndarray, on_left: bool) -> np.ndarray:
    return np.moveaxis(np.atleast_2d(bias), -2, -1) if on_left else np.atleast_1d(bias)


def _absorbed(
    weight: np.ndarray, alpha: float, bias: np.ndarray | None, op: Linear, targets: list[Target], name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The new weight in its own dtype, and the new bias in float64, channels last."""
    result = weight if weight.flags.writeable else np.empty_like(weight)
    channels = weight.shape[op.out_axis] * (op.groups if op.out_axis == 1 else 1)
    if bias is not None:
        bias = np.broadcast_to(bias, (*bias.shape[:-1], channels))
    parts = []
    for slab in _slabs(op, weight.shape):
        part = weight[slab.where].astype(np.float64)
        if alpha != 1:
            part *= alpha
        own = None if bias is None else bias[..., slab.outs]
        for target in targets:
            change, which = (absorb_output, slab.outs) if target.side == "output" else (absorb_input, slab.ins)
            affine = target.affine.map(lambda values, which=which: values[which])  # type: ignore[misc]
            part, own = change(part, own, affine, op.out_axis, op.in_axis, slab.groups)
        result[slab.where] = _cast(part, weight.dtype, f"{name}: a weight")
        if own is not None:
            parts.append(own)
    return result, np.concatenate(parts, axis=-1) if parts else None


def _slabs(op: Linear, shape: tuple[int, ...]) -> Iterator[_Slab]:
    """A weight in parts of at most SLAB elements, where it has more; groups stay whole."""
    size = int(np.prod(shape))
    everything = slice(None)
    if size <= SLAB:
        yield _Slab((everything,), everything, everything, op.groups)
    elif op.groups == 1:
        step = max(1, SLAB * shape[op.out_axis] // size)
        for start in range(0, shape[op.out_axis], step):
            outs = slice(start, start + step)
            yield _Slab((everything,) * op.out_axis + (outs,), outs, everything, 1)
    else:
        step = max(1, SLAB * op.groups // size)
        rows = shape[0] // op.groups
        per_group = {0: rows, 1: shape[1]}
        for start in range(0, op.groups, step):
            count = min(step, op.groups - start)
            where, outs, ins = (
                slice(start * n, (start + count) * n) for n in (rows, per_group[op.out_axis], per_group[op.in_axis])
            )
            yield _Slab((where,), outs, ins, count)


def _add_bias(draft: Draft, node: onnx.NodeProto, bias: np.ndarray, wanted: str) -> None:
    """Let an Add follow a MatMul; the sum bears the product's name, by which others know it."""
    result = node.output[0]
    product = draft.unused_name(f"{result}_product")
    name = draft.unused_name(f"{node.name or result}_bias")
    add = onnx.helper.make_node("Add", [product], [result], name=name)
    draft.put(add, 1, bias, wanted)
    node.output[0] = product
    insert_after(draft.proto.graph, product, add)
    draft.reindex()


def _change_norm(draft: Draft, node: onnx.NodeProto, targets: list[Target]) -> None:
    stored = draft.read(node, SCALE), draft.read(node, SHIFT)
    assert stored[0] is not None
    assert stored[1] is not None
    scale, shift = (array.astype(np.float64) for array in stored if array is not None)
    for target in targets:
        scale, shift = target.affine.scale * scale, target.affine.scale * shift + target.affine.shift
    for place, values, old in zip((SCALE, SHIFT), (scale, shift), stored, strict=True):
        assert old is not None
        draft.put(node, place, _cast(values, old.dtype, f"{label(node)}: a scale or shift"))


def _change_bias(draft: Draft, op: Bias, targets: list[Target]) -> None:
    output, place = placed(op.slot)
    node = draft.nodes[output]
    stored = draft.read(node, place)
    assert stored is not None
    sign = -1.0 if node.op_type == "Sub" and place == 1 else 1.0
    values = stored.astype(np.float64)
    for target in targets:
        values = target.affine.scale * values + sign * target.affine.shift
    if not np.array_equal(values, stored):
        draft.put(node, place, _cast(values, stored.dtype, f"{label(node)}: a term"))


def _cast(values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if not np.isfinite(result).all():
        lost = ~np.isfinite(result) & np.isfinite(values)
        if lost.any():
            raise BntoolsError(f"{what} of {np.abs(values[lost]).max():.3g} does not fit {dtype}")
    return result
