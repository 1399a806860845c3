"""The neutral graph of an ONNX model: its nodes as they stand in the file, with the shapes of one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import onnx

from bntools.backends.onnx.document import STANDARD, opened, subgraphs, uses
from bntools.backends.onnx.layers import found, obstacle, trains
from bntools.backends.onnx.linear import is_bias, linear_of
from bntools.backends.onnx.operators import SIZES, swapped, transparent
from bntools.backends.onnx.order import in_order, reads
from bntools.backends.onnx.probing import probe
from bntools.backends.onnx.valuetypes import FLOATS, value_types
from bntools.backends.onnx.view import Shape, View, label, slot
from bntools.graph import Bias, Graph, Node, Norm, Op, Other, Scale

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Meaning = tuple[Op, tuple[str, ...], tuple[str, ...], frozenset[str]]


def graph(model: Any, example: Any) -> Graph:
    """The graph of an ONNX model in any of its forms, with the shapes that its values have for ``example``, a batch.

    Raises BntoolsError where the model does not take the example or ONNX Runtime does not run the model.
    """
    document = opened(model)
    shapes, parameters = probe(document, example)
    view = View(document, shapes, value_types(document), parameters, uses(document.proto.graph))
    return _Description(view).graph()


class _Description:
    """The neutral graph in the making: values are numbered as they come up."""

    def __init__(self, view: View):
        self.view = view
        self.numbers: dict[str, int] = {}
        self.shapes: dict[int, Shape] = {}
        self.fixed: dict[str, str] = {}
        self.layers = {one.node.output[0]: one for one in found(view.document) if not one.inside}

    def graph(self) -> Graph:
        ordered = in_order(self.view.document.proto.graph)
        following = {matmul: add for add in ordered if (matmul := self._product_before(add))}
        left_out = self.view.document.constants.union(add.output[0] for add in following.values())
        nodes = [
            neutral
            for node in ordered
            if node.output and node.output[0] not in left_out
            for neutral in self._nodes(node, following.get(node.output[0]))
        ]
        outputs = {self._number(name): "an output of the model" for name in self.view.document.outputs}
        dtypes = frozenset(FLOATS[kind] for kind in self.view.types.values() if kind is not None and kind in FLOATS)
        return Graph(tuple(nodes), self.shapes, outputs, frozenset(), dtypes, self.fixed)

    def _nodes(self, node: onnx.NodeProto, following: onnx.NodeProto | None) -> Iterator[Node]:
        """The neutral nodes that one node of the file is: one, or one for each part of a split."""
        try:
            meanings = self._meanings(node, following)
        except (KeyError, IndexError):  # a shape or parameter is unknown, an input is missing
            meanings = []
        for op, inputs, outputs, slots in meanings or [_other(node)]:
            yield Node(op, label(node), self._all(inputs), self._all(outputs), slots)

    def _meanings(self, node: onnx.NodeProto, following: onnx.NodeProto | None) -> list[Meaning]:
        view = self.view
        if node.domain not in STANDARD or any(True for _ in subgraphs(node)):
            return []
        if node.output[0] in self.layers:
            return self._norm(node)
        if node.op_type in LINEAR:
            linear = linear_of(node, view, following)
            if linear is None:
                return []
            view.shape(linear.source)
            view.shape(linear.output)
            reads = {linear.op.weight} | ({linear.op.bias} if linear.op.bias else set())
            return [(linear.op, (linear.source, *linear.computed), (linear.output,), frozenset(reads))]
        if node.op_type in ("Add", "Sub") and len(node.input) == 2:
            for place in (1, 0):
                if is_bias(node, place, view):
                    return self._bias(node, place)
        if node.op_type == "Mul" and view.is_constant(node.input[0]):
            node = swapped(node)
        ops = transparent(node, view)
        if ops is None:
            return []
        for name in (*node.input, *node.output[: len(ops)]):
            if name:
                view.shape(name)
        if len(ops) > 1 or (node.op_type == "Split" and ops):
            return [(op, (node.input[0],), (output,), frozenset()) for op, output in zip(ops, node.output, strict=True)]
        inputs = node.input[:1] if isinstance(ops[0], Scale) else filter(None, node.input)
        return [(ops[0], tuple(inputs), tuple(filter(None, node.output)), frozenset())]

    def _norm(self, node: onnx.NodeProto) -> list[Meaning]:
        one, document = self.layers[node.output[0]], self.view.document
        if trains(node, document.opset):
            self.fixed[one.name] = (
                "it is in training mode and normalizes with each batch's own statistics: "
                "convert the model to inference first"
            )
        elif len(self.view.shape(node.input[0])) < 2:
            self.fixed[one.name] = "its input has no axis of channels"
        if one.name in self.fixed or obstacle(document, one):
            return []
        reads = frozenset(slot(node, place) for place in (1, 2, 3, 4))
        return [(Norm(one.name, 1), (node.input[0],), (node.output[0],), reads)]

    def _bias(self, node: onnx.NodeProto, place: int) -> list[Meaning]:
        source, result = node.input[1 - place], node.output[0]
        shape = self.view.shape(node.input[place])
        whole = self.view.shape(source)
        if all(size == 1 for size in shape) and len(whole) > 1:
            shape = (1, whole[1], *(1 for _ in whole[2:]))  # one number can become one for each channel
        name = slot(node, place)
        return [(Bias(name, shape), (source,), (result,), frozenset({name}))]

    def _product_before(self, node: onnx.NodeProto) -> str | None:
        """The output of the MatMul whose bias an Add is, if it is one and nothing else reads that output."""
        if node.op_type != "Add" or node.domain not in STANDARD or len(node.input) != 2:
            return None
        try:
            place = next((place for place in (1, 0) if is_bias(node, place, self.view)), None)
        except KeyError:
            return None
        source = node.input[1 - place] if place is not None else ""
        maker = self.view.document.producers.get(source)
        single = maker is not None and self.view.uses[source] == 1 and source not in self.view.document.outputs
        if maker is None or not single or maker.op_type != "MatMul" or maker.domain not in STANDARD:
            return None
        return source if linear_of(maker, self.view, None) is not None else None

    def _all(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(self._number(name) for name in names)

    def _number(self, name: str) -> int:
        if name not in self.numbers:
            self.numbers[name] = len(self.numbers)
            with suppress(KeyError):  # no tensor: whatever makes or reads it is an Other
                self.shapes[self.numbers[name]] = self.view.shape(name)
        return self.numbers[name]


def _other(node: onnx.NodeProto) -> Meaning:
    """An operation that nothing gets past; it also reads what the graphs inside it take from outside."""
    sized = node.op_type in SIZES and node.domain in STANDARD
    inputs = [] if sized else reads(node)
    return Other(), tuple(inputs), tuple(filter(None, node.output)), frozenset()
