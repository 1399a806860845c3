"""Taking nodes of one input and one output out of a graph, and putting one in; the graph's outputs keep their names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

from bntools.backends.onnx.document import subgraphs


def take_out(graph: onnx.GraphProto, gone: Collection[str]) -> None:
    """Remove the nodes with these first outputs: what read them reads their first input.

    Where the output is one of the graph's, the input is called by its name from now on. Where that cannot be, since
    the input is an output, an input or a constant itself, an Identity stays between the two.
    """
    outputs = {value.name for value in graph.output}
    named = outputs | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    made = {output for node in graph.node for output in node.output}
    rename: dict[str, str] = {}
    removed = []
    for i, node in enumerate(graph.node):
        if not node.output or node.output[0] not in gone:
            continue
        source, result = _now(rename, node.input[0]), node.output[0]
        if result not in outputs:
            rename[result] = source
        elif source not in named and source in made:
            rename[source] = result
        else:
            _make_identity(node)
            continue
        removed.append(i)
    for i in reversed(removed):
        del graph.node[i]
    _rename(graph, {name: _now(rename, name) for name in rename})


def insert_after(graph: onnx.GraphProto, output: str, node: onnx.NodeProto) -> None:
    """Put a node behind the one that makes ``output``."""
    place = next(i for i, one in enumerate(graph.node) if output in one.output)
    graph.node.insert(place + 1, node)


def _now(rename: Mapping[str, str], name: str) -> str:
    while name in rename:
        name = rename[name]
    return name


def _make_identity(node: onnx.NodeProto) -> None:
    node.op_type = "Identity"
    del node.input[1:]
    del node.output[1:]
    del node.attribute[:]


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Call values by other names wherever they are made or read; graphs inside may have their own of a name."""
    for node in graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                if name in names:
                    field[i] = names[name]
        for inner in subgraphs(node):
            own = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
            own |= {output for one in inner.node for output in one.output}
            _rename(inner, {name: new for name, new in names.items() if name not in own})
