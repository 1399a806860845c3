"""The values inside an ONNX graph, and the modules of the source model that they belong to."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx

from bntools.backends.onnx.order import reads
from bntools.runner import Outputs, Trace

SCOPES = "pkg.torch.onnx.name_scopes"  # written by PyTorch's dynamo exporter, one entry a module and one for the node
UNREADABLE = ("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SplitToSequence", "SequenceErase", "Optional")


def trace(model: onnx.ModelProto, read: Callable[[bytes, Sequence[str]], Outputs]) -> Trace:
    """The values of the main graph in topological order, how they depend on each other, and how to read them.

    ``read(extra, points)`` runs the model, with ``extra`` appended to its bytes, and returns these values: one
    session for all of them. The outputs of the graph stay what they are, so that it runs as ever, and no
    weight is copied for it.
    """
    present = {output.name for output in model.graph.output}
    values = tuple(points(model))

    def read_points(wanted: Sequence[str]) -> Outputs:
        return read(more_outputs(name for name in dict.fromkeys(wanted) if name not in present), wanted)

    ops = {output: (node.op_type, node.name) for node in model.graph.node for output in node.output if output}
    return Trace(values, modules(model), read_points, dependencies(model, set(values)), ops)


def points(model: onnx.ModelProto) -> Iterator[str]:
    """The names of the values that nodes compute, in topological order, constants left out."""
    for node in model.graph.node:
        if node.op_type != "Constant" and node.op_type not in UNREADABLE:
            yield from (output for output in node.output if output)


def dependencies(model: onnx.ModelProto, known: set[str]) -> dict[str, tuple[str, ...]]:
    """For each of the known values, those from which its node computes it, also in subgraphs of the node."""
    result: dict[str, tuple[str, ...]] = {}
    through: dict[str, tuple[str, ...]] = {}  # what stands for a value that is none of the known ones
    for node in model.graph.node:
        read = [one for name in reads(node) for one in ((name,) if name in known else through.get(name, ()))]
        for output in node.output:
            (result if output in known else through)[output] = tuple(dict.fromkeys(read))
    return result


def more_outputs(names: Iterable[str]) -> bytes:
    """What turns the bytes of a model, appended to them, into one with these values as further outputs.

    The encoding of a protobuf message followed by that of another is the encoding of both merged
    (protobuf.dev/programming-guides/encoding, "Last One Wins").
    """
    graph = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in names])
    return onnx.ModelProto(graph=graph).SerializeToString()


def modules(model: onnx.ModelProto) -> dict[str, str]:
    """The output value of each module of the source model by the module's path, in topological order.

    That is what the last node inside the module computes. Empty for a file without such names.
    """
    last: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Constant" or not node.output or not node.output[0]:
            continue
        for path in scopes(node):
            last.pop(path, None)  # so that the order is that of the last node
            last[path] = node.output[0]
    return last


def scopes(node: onnx.NodeProto) -> list[str]:
    """The paths of the modules that a node lies in, outermost first; empty if the file does not say."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return [path for path in _literal(entry.value)[:-1] if path]
    return _torchscript_scopes(node.name)


def _literal(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # the file is not ours: a strange entry is no reason to fail
        return []
    return [str(part) for part in value] if isinstance(value, list) else []


def _torchscript_scopes(name: str) -> list[str]:
    """The TorchScript exporter names a node ``/layer1/layer1.0/conv1/Conv``.

    A part is the name of an attribute, that of an entry of a container begins with the container's
    (``layer1.0``): here ``layer1``, ``layer1.0`` and ``layer1.0.conv1``.
    """
    if not name.startswith("/"):
        return []
    path: list[str] = []
    paths = []
    for part in name.split("/")[1:-1]:
        if path and part.startswith(path[-1] + "."):
            path[-1] = part
        else:
            path.append(part)
        paths.append(".".join(path))
    return paths
