"""The values inside an ONNX graph, and the modules of the source model that they belong to."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence

import onnx

from bntools.runner import Outputs, Trace

SCOPES = "pkg.torch.onnx.name_scopes"  # written by PyTorch's dynamo exporter, one entry a module and one for the node
UNREADABLE = ("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SplitToSequence", "SequenceErase", "Optional")


def trace(model: onnx.ModelProto, run: Callable[[bytes], Outputs]) -> Trace:
    """The values of the main graph in topological order; ``run`` runs a serialized model on the batch.

    Values that are read become outputs of a copy of the model: one session for all of them.
    """

    def read(points: Sequence[str]) -> Outputs:
        outputs = run(with_outputs(model, points))
        return {point: outputs[point] for point in points if point in outputs}

    return Trace(tuple(points(model)), modules(model), read)


def points(model: onnx.ModelProto) -> Iterator[str]:
    """The names of the values that nodes compute, in topological order, constants left out."""
    for node in model.graph.node:
        if node.op_type != "Constant" and node.op_type not in UNREADABLE:
            yield from (output for output in node.output[:1] if output)


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


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """The model, serialized, with these values as its only outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    known = {value.name: value for value in (*model.graph.output, *model.graph.value_info)}
    for name in dict.fromkeys(names):
        copy.graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))
    return copy.SerializeToString()


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
