"""Convolutions and matrix products with a stored weight, as ONNX writes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from bntools.backends.onnx.layers import attribute
from bntools.backends.onnx.view import View, slot
from bntools.graph import Linear

BIAS = 2  # the place of the bias; MatMul has none, and there the slot stands for an Add that is still to come


@dataclass(frozen=True, eq=False)
class Found:
    """A linear operation: its record, its data input, its output, and what else it reads that is computed."""

    op: Linear
    source: str
    output: str
    computed: tuple[str, ...] = ()


def linear_of(node: onnx.NodeProto, view: View, following: onnx.NodeProto | None) -> Found | None:
    """The linear operation that a node is, None if it is not one with a stored weight.

    ``following`` is the Add of a constant that alone reads a MatMul's output: its bias, and part of it.
    """
    if node.op_type in ("Conv", "ConvTranspose"):
        return _convolution(node, view)
    found = _product(node, view)
    if found is None or following is None:
        return found
    place = 1 if following.input[0] == node.output[0] else 0
    return replace(found, op=replace(found.op, bias=slot(following, place)), output=following.output[0])


def is_bias(node: onnx.NodeProto, place: int, view: View) -> bool:
    """Whether what an Add or Sub reads at one place is a constant that does not enlarge the other term."""
    other = node.input[1 - place]
    return (
        view.is_constant(node.input[place])
        and not view.is_constant(other)
        and view.shape(other) == view.shape(node.output[0])
    )


def _convolution(node: onnx.NodeProto, view: View) -> Found:
    transposed = node.op_type == "ConvTranspose"
    out, into = (1, 0) if transposed else (0, 1)
    locked, computed = _stored(node, (1, BIAS), view)
    leak = _transposed_leak(node, view) if transposed else _padding_leak(node, view)
    bias = None if _reads(node, BIAS) in computed else slot(node, BIAS)
    op = Linear(slot(node, 1), bias, out, into, attribute(node, "group", 1), 1, 1, locked, leak)
    return Found(op, node.input[0], node.output[0], computed)


def _product(node: onnx.NodeProto, view: View) -> Found | None:
    """``x @ W`` or ``W @ x``; Gemm may read either with its axes swapped."""
    swapped = [node.op_type == "Gemm" and bool(attribute(node, f"trans{side}", 0)) for side in "AB"]
    constant = [view.is_constant(name) for name in node.input[:2]]
    if constant[0] == constant[1]:
        return None
    place = constant.index(True)
    source, ranks = node.input[1 - place], [len(view.shape(name)) for name in node.input[:2]]
    rank = len(view.shape(node.output[0]))
    if min(ranks) < 2 or ranks[1 - place] != rank:
        return None
    # On the right the weight is (in, out) and contracts the last axis of x, on the left it is (out, in).
    last = 1 if place == 1 else 2
    out, into = ranks[place] - last, ranks[place] - (3 - last)
    out, into = (into, out) if swapped[place] else (out, into)
    after = rank - last
    before = rank - (3 - last) if swapped[1 - place] else after
    locked, computed = _stored(node, (place, *([BIAS] if node.op_type == "Gemm" else [])), view)
    locked = locked or ("its weight has batch axes" if ranks[place] > 2 else "")
    bias = None if _reads(node, BIAS) in computed else slot(node, BIAS)
    return Found(Linear(slot(node, place), bias, out, into, 1, before, after, locked), source, node.output[0], computed)


def _stored(node: onnx.NodeProto, places: tuple[int, ...], view: View) -> tuple[str, tuple[str, ...]]:
    """Why weight or bias cannot be rewritten, and which of them are computed."""
    locked, computed = "", []
    for place, what in zip(places, ("weight", "bias"), strict=False):
        name = _reads(node, place)
        if name and not view.is_constant(name):
            maker = view.document.producers.get(name)
            how = "an input of the graph" if maker is None else f"computed in the graph by {maker.op_type}"
            locked = locked or f"its {what} is {how}"
            computed.append(name)
    return locked, tuple(computed)


def _reads(node: onnx.NodeProto, place: int) -> str:
    return node.input[place] if len(node.input) > place else ""


def _padding_leak(node: onnx.NodeProto, view: View) -> str:
    automatic = attribute(node, "auto_pad", b"NOTSET").decode()
    if automatic == "VALID":
        return ""
    wide = any(size > 1 for size in view.shape(node.input[1])[2:])
    pads = any(attribute(node, "pads", ())) if automatic in ("NOTSET", "") else wide
    return "pads with zeros" if pads else ""


def _transposed_leak(node: onnx.NodeProto, view: View) -> str:
    """With taps or strides of more than 1, outputs get inputs through different sets of taps."""
    sizes = (*view.shape(node.input[1])[2:], *attribute(node, "strides", ()))
    even = all(size == 1 for size in sizes) and not any(attribute(node, "output_padding", ()))
    enlarged = attribute(node, "output_shape", None) is not None or attribute(node, "auto_pad", b"NOTSET") not in (
        b"NOTSET",
        b"VALID",
        b"",
    )
    return "" if even and not enlarged else "gives its outputs from different numbers of inputs"
