"""What a node reads, the graphs inside it included, and an order in which nodes can run."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import onnx

from bntools.backends.onnx.document import subgraphs
from bntools.errors import BntoolsError


def reads(node: onnx.NodeProto) -> list[str]:
    """The values of its graph that a node reads, also those that a graph inside it takes from there."""
    return [*filter(None, node.input), *captured(node)]


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the graphs inside a node read and do not define."""
    for inner in subgraphs(node):
        known = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
        known |= {tensor.values.name for tensor in inner.sparse_initializer}
        known |= {output for one in inner.node for output in one.output}
        names = [name for one in inner.node for name in reads(one)]
        names += [value.name for value in inner.output]
        yield from dict.fromkeys(name for name in names if name and name not in known)


def in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in an order in which they can run: a file need not list them so."""
    nodes = list(graph.node)
    makers = {output: i for i, node in enumerate(nodes) for output in node.output if output}
    before = [{makers[name] for name in names if name in makers} for names in map(reads, nodes)]
    if all(maker < i for i, makers_of in enumerate(before) for maker in makers_of):
        return nodes
    try:
        return [nodes[i] for i in TopologicalSorter(dict(enumerate(before))).static_order()]
    except CycleError as error:
        raise BntoolsError(f"the ONNX graph {graph.name!r} has a cycle: it cannot run") from error
