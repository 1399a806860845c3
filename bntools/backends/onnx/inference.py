"""Models that were exported in training mode: refused with one message, and converted on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from bntools.backends.onnx.document import STANDARD, Document, all_nodes, opened, subgraphs
from bntools.backends.onnx.layers import OP, attribute, called, drop_attributes, found, trains
from bntools.errors import BntoolsError

FLAG = 2  # the place of Dropout's training_mode among its inputs, from opset 12 on
NAMED = 5


@dataclass(frozen=True)
class Training:
    """A node in training mode: its name, the graph or function it lies in, its place in that, and the opset there."""

    name: str
    root: int
    place: int
    node: onnx.NodeProto
    opset: int


def check_inference(document: Document) -> None:
    """Raise BntoolsError where a node is in training mode: what the model computes then depends on each batch."""
    if nodes := in_training(document):
        more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        raise BntoolsError(
            f"{document.name} was exported in training mode: {', '.join(one.name for one in nodes[:NAMED])}{more} "
            f"would use each batch's own statistics, or drop values at random. Export it in eval mode, or convert it: "
            f"bntools.to_inference(model), --to-inference on the command line"
        )


def to_inference(model: Any) -> list[str]:
    """Turn BatchNormalization and Dropout from training into inference form, in place; returns their names.

    BatchNormalization then uses its stored statistics. Outputs that only training has go. Raises
    BntoolsError, changing nothing, where something reads them.
    """
    document = opened(model)
    nodes = in_training(document)
    _check_unread(document, nodes)
    if not nodes:
        return []
    if document.source is not None and not isinstance(document.source, (Path, onnx.ModelProto)):
        _carry(document.source, nodes)
    for one in nodes:
        _convert(one.node, one.opset)
    _forget(document.proto, {one.root for one in nodes})
    document.refresh()
    if isinstance(document.source, Path):
        from bntools.backends.onnx.files import replace  # here: files.py imports what reads and writes everything

        replace(document)
    return [one.name for one in nodes]


def in_training(document: Document) -> list[Training]:
    """Every BatchNormalization and Dropout in training mode, in the order of the file."""
    names = iter(found(document))
    result = []
    for number, (root, opset) in enumerate(_roots(document)):
        constants: dict[str, onnx.TensorProto] | None = None
        for place, node in enumerate(all_nodes(root)):
            if node.domain not in STANDARD:
                continue
            if node.op_type == OP:
                name, training = next(names).name, trains(node, opset)
            elif node.op_type == "Dropout":
                constants = _constants(root) if constants is None else constants
                name, training = called(node), _drops(document, node, opset, constants)
            else:
                continue
            if training:
                result.append(Training(name, number, place, node, opset))
    return result


def _roots(document: Document) -> Iterator[tuple[Any, int]]:
    """The main graph and every function, with the opset of each."""
    yield document.proto.graph, document.opset
    for function in document.proto.functions:
        versions = [one.version for one in function.opset_import if one.domain in STANDARD]
        yield function, max(versions, default=document.opset)


def _drops(document: Document, node: onnx.NodeProto, opset: int, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a Dropout drops values. Where its flag is an input or computed, the caller decides, and it stays."""
    if opset < 7:
        return not attribute(node, "is_test", 0)
    if opset < 12 or len(node.input) <= FLAG or not node.input[FLAG]:
        return False
    name = node.input[FLAG]
    value = document.array(constants[name]) if name in constants else document.constant(name)
    return value is not None and bool(value.any())


def _constants(root: Any) -> dict[str, onnx.TensorProto]:
    """What is constant in a graph or function, graphs inside it included, as far as it is stored as a tensor."""
    found: dict[str, onnx.TensorProto] = {}
    for node in all_nodes(root):
        if node.op_type == "Constant" and node.domain in STANDARD and node.output:
            found.update((node.output[0], one.t) for one in node.attribute if one.name == "value")
        for graph in subgraphs(node):
            found |= {tensor.name: tensor for tensor in graph.initializer}
    return found


def _check_unread(document: Document, nodes: Sequence[Training]) -> None:
    for number, (root, _) in enumerate(_roots(document)):
        read: Counter[str] = Counter()
        for node in all_nodes(root):
            read.update(node.input)
            for graph in subgraphs(node):
                read.update(value.name for value in graph.output)
        outputs = {value if isinstance(value, str) else value.name for value in root.output}
        for one in nodes:
            for output in one.node.output[1:] if one.root == number else ():
                if output and (read[output] or output in outputs):
                    user = "an output of the model" if output in outputs else "read by another node"
                    raise BntoolsError(
                        f"{document.name}: {one.name} cannot be brought into inference form: its output {output!r}, "
                        f"which only training has, is {user}. Nothing changed; remove that use, or export in eval mode"
                    )


def _convert(node: onnx.NodeProto, opset: int) -> None:
    del node.output[1:]
    if opset < 7:
        drop_attributes(node, "is_test")
        node.attribute.append(onnx.helper.make_attribute("is_test", 1))
    elif node.op_type == OP:
        drop_attributes(node, "training_mode")
    else:
        del node.input[FLAG:]


def _forget(proto: onnx.ModelProto, roots: set[int]) -> None:
    """Remove the types of values that are computed no more."""
    if 0 not in roots:
        return
    for graph in (proto.graph, *(inner for node in all_nodes(proto.graph) for inner in subgraphs(node))):
        known = {name for node in graph.node for name in node.output}
        for value in [value for value in graph.value_info if value.name not in known]:
            graph.value_info.remove(value)


def _carry(model: Any, nodes: Sequence[Training]) -> None:
    """The same changes in the onnx_ir.Model that the message was made of: its nodes are in the same order."""
    import onnx_ir as ir

    roots = [model.graph, *model.functions.values()]
    for number in {one.root for one in nodes}:
        inside = list(ir.traversal.RecursiveGraphIterator(roots[number]))
        for one in nodes:
            if one.root != number:
                continue
            node = inside[one.place]
            assert node.op_type == one.node.op_type
            node.resize_outputs(1)
            if one.opset < 7:
                node.attributes["is_test"] = ir.AttrInt64("is_test", 1)
            elif node.op_type == OP:
                node.attributes.pop("training_mode", None)
            else:
                node.resize_inputs(FLAG)
